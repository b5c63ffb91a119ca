"""Measure compressed notes: their size, and the loss of the text that follows them.

python benchmarks/notes.py --model runs/first docs/memory.md docs/formats.md

Each text is read up to several places. From the notes there, exact or compressed, the model predicts the next tokens.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from rmkv_cli.generation import load_notes, read_prompt, save_notes
from rmkv_cli.markdown import table
from rmkv_cli.model import RMKV, find_model
from rmkv_cli.tokenizer import Tokenizer

FOLLOWING = 128  # predicted tokens


@torch.inference_mode()
def measure(folder: Path, texts: list[Path], places: int) -> str:
    """Return a table: the size of notes, and the loss in nats per token of the text that follows them."""
    model, tokenizer = RMKV.from_pretrained(folder), Tokenizer.load(folder)
    ways = (None, "bf16", "int8")
    sizes: dict[str | None, list[int]] = {way: [] for way in ways}
    losses: dict[str | None, list[float]] = {way: [] for way in ways}
    with TemporaryDirectory() as place:
        for text in texts:
            characters = text.read_text()
            for number in range(1, places + 1):
                stop = len(characters) * number // (places + 1)
                read = read_prompt(model, tokenizer, characters[:stop])
                ids = torch.tensor([tokenizer.encode(characters[stop:])[: FOLLOWING + 1]])
                for way in ways:
                    file = Path(place) / "notes.rmkv"
                    save_notes(file, read, model, tokenizer, way)
                    state = load_notes(file, model, tokenizer).state
                    logits = model.head(model.hidden(ids[:, :-1], state)[0])[0]
                    sizes[way].append(file.stat().st_size)
                    losses[way].append(F.cross_entropy(logits, ids[0, 1:]).item())
    rows = []
    for way in ways:
        size, loss = (sum(x[way]) / len(x[way]) for x in (sizes, losses))
        change = max(abs(x - y) for x, y in zip(losses[way], losses[None], strict=True))
        rows.append([way or "exact", f"{size:,.0f}", f"{loss:.4f}", f"{change:.4f}"])
    return table(["numbers", "bytes", "nats per token", "largest change of a place"], rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--places", type=int, default=8, help="places in each text")
    options = parser.parse_args()
    print(measure(find_model(options.model), options.texts, options.places))


if __name__ == "__main__":
    main()
