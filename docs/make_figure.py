"""Draw the figures of the README and of docs/benchmarks.md from the results of benchmarks.

docs/curves.svg shows those of benchmarks/curves.py, docs/evidence.svg those of benchmarks/quality.py.
"""

import json
from collections.abc import Callable, Iterator
from math import log2
from pathlib import Path
from statistics import mean
from typing import Any

DOCS = Path(__file__).parent
BENCHMARKS = DOCS.parent / "benchmarks"
CURVES = ("RMKV, store features 2", "Gated DeltaNet", "Llama with shifted keys", "Llama")
"""Rows of benchmarks/curves.py in the figure; the position is the colour's number."""
BUDGET = 16_000_000
MODELS = {
    "RMKV": "RMKV",
    "Gated DeltaNet": "Gated DeltaNet",
    "no memory, twice the look-back": "no memory",
    "Llama": "Llama",
}
"""The same of benchmarks/quality.py, with names in the figure."""
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


def evidence() -> str:
    """Return the figure of models after a million tokens: recall by distance, and bits per byte beyond the window."""
    results = read_results("quality")
    runs = {row: [result for result in results if result["row"] == row] for row in MODELS}
    title = "RMKV beside models of equal size: recall by distance, and loss beyond the window"
    return svg(title, 270, [*recall_panel(runs), *loss_panel(runs)])


def curves() -> str:
    """Return the figure of models by the tokens that they have read in training: bits per byte, and recall."""
    results = [result for result in read_results("curves") if result["budget"] == BUDGET]
    runs = {row: [result for result in results if result["row"] == row] for row in CURVES}
    bits = curves_panel(runs, 50, lambda run: run["bits_per_byte"]["all"], (1.6, 3.2), "{:.1f}")
    recall = curves_panel(runs, 450, lambda run: run["recall"]["15"], (0, 1), "{:.0%}")
    names = "".join(
        f'<tspan class="c{number}" dx="20">{row}</tspan>' for number, (row, found) in enumerate(runs.items()) if found
    )
    titles = (
        '<text class="title" x="20" y="24">Bits per byte of held-out text</text>',
        '<text class="title" x="420" y="24">Values recalled after 960 tokens</text>',
    )
    return svg("Loss and recall by tokens of training", 330, [*titles, *bits, *recall, f'<text y="318">{names}</text>'])


def curves_panel(
    runs: dict[str, list[dict[str, Any]]],
    left: int,
    value: Callable[[dict[str, Any]], float],
    limits: tuple[float, float],
    label: str,
) -> Iterator[str]:
    """Yield a panel of lines over the tokens of training, in millions and on a logarithmic scale."""
    (low, high), height, bottom, octave = limits, 210, 255, 78
    right = left + 4 * octave
    for i in range(5):
        level = low + (high - low) * i / 4
        y = bottom - height * i / 4
        yield f'<line class="axis" x1="{left}" x2="{right}" y1="{y:.0f}" y2="{y:.0f}" stroke-opacity="0.3"/>'
        yield f'<text x="{left - 7}" y="{y + 4:.0f}" text-anchor="end">{label.format(level)}</text>'
    for i in range(5):
        yield f'<text x="{left + octave * i}" y="{bottom + 20}" text-anchor="middle">{2**i}M</text>'
    yield f'<text x="{left + 2 * octave}" y="{bottom + 40}" text-anchor="middle">tokens of training</text>'
    for number, found in reversed(list(enumerate(runs.values()))):  # no line where a row has no results yet
        points = " ".join(
            f"{left + octave * log2(run['tokens'] / 1e6):.1f},{bottom - height * (value(run) - low) / (high - low):.1f}"
            for run in sorted(found, key=lambda run: run["tokens"])
        )
        yield f'<polyline class="c{number}" points="{points}"/>'


def read_results(benchmark: str) -> list[dict[str, Any]]:
    """Return all results of a benchmark."""
    text = (BENCHMARKS / benchmark / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def svg(title: str, height: int, parts: list[str]) -> str:
    """Return a drawing of the given height, 800 units wide."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" role="img" aria-labelledby="title">',
        f'<title id="title">{title}</title>',
        f"<style>\n{STYLE}\n</style>",
        f'<rect class="page" width="800" height="{height}" rx="8"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


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
    for name, draw in {"evidence": evidence, "curves": curves}.items():
        (DOCS / f"{name}.svg").write_text(draw(), encoding="utf-8")
