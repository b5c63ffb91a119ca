"""What transformers makes of exported folders, in a process that cannot import rmkv_cli; `alone` runs it.

In PLACE lie the folders; what is asked and what is answered are files there, too.
"""

import os
import subprocess
import sys
from pathlib import Path

STARTS = ["the cat sat", "on the log, and the dog sat on the mat and on", "x"]
NEW = 16  # tokens, of segments of 8
SAVED_AGAIN = "saved-again"
NARROW = "bfloat16"  # end of the names of folders that were exported in it


def alone(place, names, asked, **environment):
    """Run `answer` for each of the names, which transformers knows, with the questions; return its answers by name."""
    import torch

    torch.save(asked, place / "asked.pt")
    command = [sys.executable, "-I", "-X", "faulthandler", "-W", "error", __file__, place, *names]
    here = {"PATH": os.environ["PATH"], "HF_HOME": str(place / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), env=here | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    return torch.load(place / "answered.pt")


class Barred:
    """A finder of modules that finds some to be missing."""

    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] in ("rmkv_cli", "pydantic"):
            raise ModuleNotFoundError(f"No module named '{name}'")


def answer(name, asked):
    """Return the questions' answers by the model and tokenizer of this name; of ids alone, logits and loss."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    ids = asked["ids"]
    whole = model(ids, labels=ids)
    found = {"logits": whole.logits.detach(), "loss": whole.loss.item()}
    if asked.keys() == {"ids"}:
        return found
    cache, pieces = None, []
    with torch.no_grad():
        for part in ids.split(asked["lengths"], dim=1):
            out = model(part, past_key_values=cache)
            cache = out.past_key_values
            pieces.append(out.logits)
        again = [model(ids[:, -3:], past_key_values=cache).logits for _ in range(2)]
    found |= {"pieces": torch.cat(pieces, dim=1), "same twice": torch.equal(*again), "read": cache.get_seq_length()}
    found["last"] = model(ids, logits_to_keep=1).logits.detach()

    def write(batch, **options):
        """Return the new tokens of each row, up to its end."""
        rows = model.generate(**batch, max_new_tokens=NEW, **options)[:, batch["input_ids"].shape[1] :].tolist()
        return [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in rows]

    padded = tokenizer(STARTS, return_tensors="pt", padding=True)
    found["padding"] = padded["attention_mask"].tolist()
    each = [tokenizer(start, return_tensors="pt") for start in STARTS]
    for way, options in asked["ways"].items():
        found[way] = write(padded, **options)
        found[f"{way}, alone"] = [write(one, **options)[0] for one in each]
        found[f"{way}, no cache"] = write(padded, use_cache=False, **options)
    start = each[1]["input_ids"]
    with torch.no_grad():
        cache = model(start[:, :-1]).past_key_values
    found["from a cache"] = [write(each[1], past_key_values=cache, do_sample=False)[0] for _ in range(2)]
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": 30.0, "num_return_sequences": 8, "min_new_tokens": NEW}
    found["sampled"] = write(padded, **sampling)
    written = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found["pipeline"] = written(STARTS, max_new_tokens=NEW, do_sample=False, batch_size=3, return_full_text=False)
    found["chat"] = written(asked["chats"][0], max_new_tokens=8, do_sample=False)
    found["texts"] = [tokenizer(text.replace("<", "<\ue000"))["input_ids"] for text in asked["texts"]]
    found["decoded"] = [tokenizer.decode(ids) for ids in found["texts"]]
    found["chats"] = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in asked["chats"]]
    again = Path(name).with_name(f"{Path(name).name}-{SAVED_AGAIN}")
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    found["kept"] = tokenizer.decode(found["chats"][-1], skip_special_tokens=True)
    ended = model.generate(**each[0], max_new_tokens=NEW, do_sample=False, sequence_bias={(3,): 1000.0})
    found["ended"] = ended[0, each[0]["input_ids"].shape[1] :].tolist()
    found["losses"] = {}
    for side in ("left", "right"):
        batch = tokenizer(asked["rows"], return_tensors="pt", padding=True, padding_side=side)
        found["losses"][side] = model(**batch, labels=batch["input_ids"]).loss.item()
    for dtype in (torch.bfloat16, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype=dtype)
        for half in (loaded, model.to(dtype)):
            out = half(**batch, labels=batch["input_ids"])
            found.setdefault(dtype, []).append((out.loss.item(), out.logits.dtype, half.dtype))
            found.setdefault((dtype, "written"), []).append(
                [half.generate(**padded, max_new_tokens=NEW, **options).shape[1] for options in asked["ways"].values()]
            )
    narrow = Path(name).with_name(f"{Path(name).name}-{NARROW}")
    found["bfloat16"] = []
    for folder, dtype in ((narrow, "auto"), (narrow, torch.bfloat16), (name, torch.bfloat16)):
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
        with torch.no_grad():
            logits = loaded(ids).logits
        found["bfloat16"].append((logits, {key: x.dtype for key, x in loaded.state_dict().items()}))
    loaded.save_pretrained(f"{narrow}-{SAVED_AGAIN}")
    tokenizer.save_pretrained(f"{narrow}-{SAVED_AGAIN}")
    return found


if __name__ == "__main__":
    sys.meta_path.insert(0, Barred)
    import torch

    place, *names = sys.argv[1:]
    asked = torch.load(Path(place) / "asked.pt")
    torch.save({name: answer(name, asked) for name in names}, Path(place) / "answered.pt")
