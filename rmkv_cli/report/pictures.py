"""Pictures of a report: lines, and heat maps of tasks."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmkv_cli.evaluation.pictures import heat_map_size, paint_heat_map
from rmkv_cli.evaluation.tasks import TaskReport
from rmkv_cli.files import atomic_file
from rmkv_cli.markdown import escape
from rmkv_cli.report.run import Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INKS = ("#2a7fd4", "#d0600a", "#1d9a58", "#b8569e", "#a37c00", "#7d74d8", "#c8515a", "#6f8088")
"""Colours of lines, each with a contrast of at least 3 to white and to the page's dark ground (WCAG 2, 1.4.11)."""
DASHES = ("-", "--", "-.", ":")  # so that lines also differ in print
WIDTH, HEIGHT = 5.0, 3.1  # inches: a phone shows it at two thirds of that, with text still 8 pixels high
LEGEND, LEGEND_ROW = 64, 0.2  # characters of names that fit side by side; inches that each further row takes


@dataclass(frozen=True)
class Picture:
    """A figure with its description in words."""

    name: str
    """Name of its file, without the ending."""
    words: str
    figure: "Figure"

    @property
    def markdown(self) -> str:
        """Markdown that shows the file."""
        return f"![{escape(self.words)}]({self.name}.png)"

    def write_png(self, folder: Path) -> None:
        """Write the picture for a white ground into a folder."""
        with atomic_file(folder / f"{self.name}.png") as aside, _any_script():
            self.figure.savefig(aside, dpi=150, format="png")

    def svg(self) -> str:
        """Return the picture for an HTML page with any ground: what is black takes the colour of the page's text."""
        import matplotlib as mpl

        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}), _any_script():
            self.figure.savefig(file := BytesIO(), format="svg", transparent=True)
        text = file.getvalue().decode()
        text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
        _, head, body = re.split(r'(<svg [^>]*?viewBox="[^"]*")[^>]*>', text, maxsplit=1)
        width = float(self.figure.get_figwidth() * 96)
        (box,) = re.findall(r'viewBox="[^"]*"', head)
        opening = f'<svg {box} style="width:{width:.0f}px" role="img" aria-labelledby="{self.name}-title">'
        body = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{self.name}-", body)  # ids must be unique in a page
        body = body.replace("#000000", "currentColor").replace("xlink:href", "href")
        return f'{opening}<title id="{self.name}-title">{_xml(self.words)}</title>{body.strip()}'


@dataclass(frozen=True)
class Line:
    """A line of a picture."""

    label: str
    points: Points
    place: int
    """Which colour and dashes it has."""
    unit: str
    marked: bool = False
    """Whether each point has a marker; a lone point always has one."""
    bottom: float | None = None
    """Lower limit of its axis; None for the least value drawn."""


def draw_lines(
    name: str,
    title: str,
    across: str,
    lines: Sequence[Line],
    *,
    show_title: bool = True,
    bad_steps: Sequence[float] = (),
    by_doublings: bool = False,
) -> Picture:
    """Draw lines of at most two units, the second unit on an axis to the right.

    Args:
        name: name of the picture's file, without the ending.
        title: what the lines show.
        across: label of the horizontal axis.
        lines: lines to draw; more than one get a legend.
        show_title: whether the picture itself shows the title; the words for it always do.
        bad_steps: where skipped steps are marked at the foot.
        by_doublings: whether the horizontal axis is logarithmic.
    """
    units = list(dict.fromkeys(line.unit for line in lines))
    with _style():
        figure = _figure(WIDTH, HEIGHT)
        left = figure.subplots()
        axes = {unit: left if unit == units[0] else left.twinx() for unit in units}
        drawn = []
        for line in lines:
            drawn += axes[line.unit].plot(
                *zip(*line.points, strict=True),
                color=INKS[line.place % len(INKS)],
                linestyle=DASHES[line.place % len(DASHES)],
                marker="o" if line.marked or len(line.points) == 1 else None,
                markersize=3.5,
                linewidth=1.5,
            )
            if line.bottom is not None:
                axes[line.unit].set_ylim(line.bottom, None)
        labels = [f"{line.label}{' (right)' * (line.unit != units[0])}" for line in lines]
        if bad_steps:
            foot = left.get_xaxis_transform()
            drawn += left.plot(bad_steps, [0.02] * len(bad_steps), "x", color=INKS[6], markersize=5, transform=foot)
            labels.append("skipped steps")
        _label_across(left, across, by_doublings)
        left.set_title(title if show_title else "")
        for unit, axis in axes.items():
            axis.set_ylabel(unit)
        for unit in units[1:]:
            axes[unit].spines["right"].set_visible(True)
            axes[unit].grid(visible=False)
        if len(labels) > 1:  # the space keeps matplotlib from leaving out a name that begins with an underscore
            labels = [f" {' '.join(label.split())}" for label in labels]
            columns = max(1, min(3, LEGEND // max(map(len, labels))))
            figure.set_figheight(HEIGHT + LEGEND_ROW * (-(-len(labels) // columns) - 1))
            figure.legend(drawn, labels, loc="outside lower center", ncols=columns)
    ends = "; ".join(f"{line.label}: from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
    return Picture(name, f"{title}, {' and '.join(units)}, by {across}. {ends}", figure)


def positions(losses: dict[str, Points]) -> Picture:
    """Return the picture of the loss by position in the document; a name's points are pairs of position and loss."""
    lines = [Line(name, points, i, "nats per token", marked=True) for i, (name, points) in enumerate(losses.items())]
    return draw_lines("loss-by-position", "loss by position in the document", "position", lines, by_doublings=True)


def heat_map(name: str, measured: str, report: TaskReport) -> Picture:
    """Return the heat map of a task's accuracy; `measured` names the run and the evaluation."""
    cells = ", ".join(f"{c.accuracy:.2f} at {c.row:g} and {c.segments:,}" for c in report.cells)
    words = f"{measured}: accuracy by {report.axis} and segments of noise: {cells}"
    with _style():
        figure = _figure(*heat_map_size(report))
        paint_heat_map(report, figure)
    return Picture(name, words, figure)


def _label_across(axes: "Axes", across: str, by_doublings: bool) -> None:
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    if by_doublings:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}") if by_doublings else EngFormatter(sep=""))
    axes.set_xlabel(across)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _style() -> Iterator[None]:
    """Draw in the report's style; `$` in a name does not begin a formula."""
    import matplotlib as mpl

    parameters: dict[Any, Any] = {
        "text.parse_math": False,
        "legend.frameon": False,
        "axes.grid": True,
        "grid.alpha": 0.35,
    }
    parameters |= {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(parameters):
        yield


@contextmanager
def _any_script() -> Iterator[None]:
    """Suppress the warning for each letter that matplotlib's font lacks and draws as a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s)Glyph .* missing from font")
        yield


def _xml(text: str) -> str:
    from html import escape as escape_html

    return escape_html(" ".join(text.split()))
