"""Draw docs/evidence.svg, the README's figure, from the results of benchmarks/quality.py."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks/quality/results.jsonl"
MODELS = {
    "RMKV": "RMKV",
    "Gated DeltaNet": "Gated DeltaNet",
    "no memory, twice the look-back": "no memory",
    "Llama": "Llama",
}
"""Rows of the study and their names in the figure; the position is the colour's number."""
SEGMENT = 64
STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.page { fill: #fff }
.axis { stroke: #8c959f; fill: none }
.c0 { stroke: #0969da; fill: #0969da } .c1 { stroke: #bc4c00; fill: #bc4c00 }
.c2 { stroke: #8250df; fill: #8250df } .c3 { stroke: #57606a; fill: #57606a }
polyline { fill: none !important; stroke-width: 2.5 }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117 }
  text { fill: #e6edf3 }
  .c0 { stroke: #58a6ff; fill: #58a6ff } .c1 { stroke: #f0883e; fill: #f0883e }
  .c2 { stroke: #bc8cff; fill: #bc8cff } .c3 { stroke: #8b949e; fill: #8b949e }
}"""


def figure() -> str:
    """Return the figure as SVG: recall by distance, and bits per byte beyond the attention window."""
    results = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    runs = {row: [result for result in results if result["row"] == row] for row in MODELS}
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 270" role="img" aria-labelledby="title">',
        '<title id="title">RMKV beside models of equal size: recall by distance, and loss beyond the window</title>',
        f"<style>\n{STYLE}\n</style>",
        '<rect class="page" width="800" height="270" rx="8"/>',
        *recall_panel(runs),
        *loss_panel(runs),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def recall_panel(runs: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Yield the left panel: the share of values recalled, by the number of tokens between."""
    distances = list(next(iter(runs.values()))[0]["recall"])
    xs = [60 + 75 * n for n in range(len(distances))]
    top, height = 60, 160
    yield '<text class="title" x="20" y="24">Values recalled, of 8 pairs</text>'
    for share in (0, 0.5, 1):
        y = top + height * (1 - share)
        yield f'<line class="axis" x1="45" x2="375" y1="{y:.0f}" y2="{y:.0f}" stroke-opacity="0.3"/>'
        yield f'<text x="38" y="{y + 4:.0f}" text-anchor="end">{share:.0%}</text>'
    for x, distance in zip(xs, distances, strict=True):
        yield f'<text x="{x}" y="{top + height + 20}" text-anchor="middle">{int(distance) * SEGMENT:,}</text>'
    yield f'<text x="210" y="{top + height + 40}" text-anchor="middle">tokens of text between</text>'
    for number, found in reversed(list(enumerate(runs.values()))):
        shares = [mean(run["recall"][distance] for run in found) for distance in distances]
        points = " ".join(f"{x},{top + height * (1 - share):.1f}" for x, share in zip(xs, shares, strict=True))
        yield f'<polyline class="c{number}" points="{points}"/>'
    yield '<text x="225" y="58" stroke="none" class="c0">RMKV</text>'
    yield f'<text x="225" y="{top + height - 10}" stroke="none">all others</text>'


def loss_panel(runs: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Yield the right panel: bits per byte beyond the window, the smaller the better."""
    losses = {row: mean(run["bits_per_byte"]["beyond"] for run in found) for row, found in runs.items()}
    yield '<text class="title" x="430" y="24">Bits per byte beyond the window</text>'
    yield '<text x="430" y="262">lower is better</text>'
    for number, (row, loss) in enumerate(losses.items()):
        y, width = 60 + 48 * number, 90 * loss
        yield f'<text x="540" y="{y + 18}" text-anchor="end">{MODELS[row]}</text>'
        yield f'<rect class="c{number}" x="550" y="{y}" width="{width:.0f}" height="26" rx="3"/>'
        yield f'<text x="{558 + width:.0f}" y="{y + 18}">{loss:.2f}</text>'


if __name__ == "__main__":
    (DOCS / "evidence.svg").write_text(figure(), encoding="utf-8")
