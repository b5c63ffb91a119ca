"""Pictures of measurements, drawn with matplotlib."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmkv_cli.errors import UserError, pip_install
from rmkv_cli.evaluation.inspect import MemoryReport
from rmkv_cli.evaluation.tasks import TaskReport
from rmkv_cli.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Raise `UserError` if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise UserError(f"a picture needs matplotlib: {pip_install('plot')}")


def draw_heat_map(report: TaskReport, png: Path) -> None:
    """Write a heat map of a task's accuracy, rows by segments; errors as in `require_matplotlib`."""
    with _picture(png, *heat_map_size(report)) as figure:
        paint_heat_map(report, figure)


def heat_map_size(report: TaskReport) -> tuple[float, float]:
    """Return the width and height of a task's heat map in inches."""
    rows, columns = ({getattr(cell, axis) for cell in report.cells} for axis in ("row", "segments"))
    return 2 + 0.75 * len(columns), 1.4 + 0.45 * len(rows)


def paint_heat_map(report: TaskReport, figure: "Figure") -> None:
    """Paint a task's accuracy, rows by segments, on an empty figure."""
    rows = list(dict.fromkeys(cell.row for cell in report.cells))
    columns = list(dict.fromkeys(cell.segments for cell in report.cells))
    accuracy = np.array([cell.accuracy for cell in report.cells]).reshape(len(rows), len(columns))
    axes = figure.subplots()
    axes.pcolormesh(accuracy, vmin=0, vmax=1, cmap="viridis")  # its colours also differ in print
    axes.set_xticks([x + 0.5 for x in range(len(columns))], [f"{column:,}" for column in columns])
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [f"{row:g}" for row in rows])
    axes.set(xlabel="segments of noise", ylabel=report.axis, title=f"{report.task['kind']}: accuracy")
    axes.invert_yaxis()
    axes.grid(visible=False)
    for (y, x), value in np.ndenumerate(accuracy):
        ink = "#111111" if value > 0.55 else "#ffffff"
        axes.text(x + 0.5, y + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)


def draw_memory(report: MemoryReport, png: Path) -> None:
    """Write a picture of each layer's half-lives, effective ranks and value; errors as in `require_matplotlib`."""
    layers = range(len(report.layers))
    maps: list[tuple[str, str, Any]] = []
    ranks: dict[str, list[Any]] = {}
    slots = [[slot.half_life for slot in layer.slots] for layer in report.layers]
    if slots[0] and slots[0][0] is not None:
        maps.append(("slots' half-life, segments", "slot", slots))
    if report.layers[0].effective_rank is not None:
        ranks["slots"] = [layer.effective_rank for layer in report.layers]
    stores = [layer.store for layer in report.layers]
    if heads := next((len(store.half_life) for store in stores if store), 0):
        none = [np.nan] * heads
        maps.append(("store's half-life, segments", "head", [store.half_life if store else none for store in stores]))
        ranks["store, mean of heads"] = [np.mean(store.effective_rank if store else none) for store in stores]
    panels = len(maps) + bool(ranks) + 1
    with _picture(png, 4 * panels, 3 + 0.15 * len(layers)) as figure:
        axes = list(np.ravel(figure.subplots(1, panels)))
        for (title, columns, values), panel in zip(maps, axes, strict=False):
            image = panel.imshow(values, norm="log", vmin=1, vmax=1000, aspect="auto")
            figure.colorbar(image, format="%g", extend="both")
            panel.set(title=title, xlabel=columns, ylabel="layer")
            panel.locator_params(axis="x", integer=True)
        for panel in axes[len(maps) :]:
            panel.invert_yaxis()
        for name, values in ranks.items():
            axes[-2].plot(values, layers, "o-", label=name)
        if ranks:
            axes[-2].set(title="effective rank", xlim=(0, None))
            axes[-2].legend()
        axes[-1].barh(layers, [layer.cost_without for layer in report.layers], label="this layer's")
        axes[-1].axvline(report.cost_without, color="black", linestyle="--", label="all")
        axes[-1].set(title="cost of resetting it, nats per token")
        axes[-1].locator_params(axis="x", nbins=4)
        axes[-1].legend()
        for panel in axes:
            panel.set_yticks(layers[:: -(-len(layers) // 12)])


@contextmanager
def _picture(png: Path, width: float, height: float) -> Iterator["Figure"]:
    """Provide an empty figure of a size in inches; write it to `png` at the end."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with atomic_file(png) as aside:
        figure.savefig(aside, dpi=150, format="png")
