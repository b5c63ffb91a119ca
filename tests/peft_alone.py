"""PEFT on exported folders, in a process that cannot import rmkv_cli: `python peft_alone.py PLACE NAME...`.

PLACE/NAME contains an exported folder, `exported`, and an adapter of rmkv, `ours`; PLACE/ids.pt contains tokens. PEFT
trains another adapter, `theirs`, on all linear layers and cells. The logits with either go to PLACE/NAME/logits.pt.
"""

import sys
from pathlib import Path

from transformers_alone import Barred


def answer(place, ids, **more):
    """Load one adapter and train another."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def base():
        return AutoModelForCausalLM.from_pretrained(place / "exported", trust_remote_code=True)

    with torch.no_grad():
        found = {"base": base()(ids).logits, "ours": PeftModel.from_pretrained(base(), place / "ours")(ids).logits}
    model = base()
    cells = [name for name, _ in model.named_parameters() if name.endswith(("weight_ih", "weight_hh"))]
    config = LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", target_parameters=cells, **more)
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place / "theirs")
    with torch.no_grad():
        torch.save(found | {"theirs": model(ids).logits}, place / "logits.pt")


if __name__ == "__main__":
    sys.meta_path.insert(0, Barred)
    import torch

    folder, *names = sys.argv[1:]
    for name in names:
        more = {"use_rslora": True} if name == "minimal" else {}
        answer(Path(folder) / name, torch.load(Path(folder) / "ids.pt"), **more)
