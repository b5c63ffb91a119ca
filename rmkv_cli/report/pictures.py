"""The pictures of a report: lines of the runs over their tokens and positions, heat maps of their tasks."""

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
from rmkv_cli.report.run import Points, Run
from rmkv_cli.training.curve import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INKS = ("#2a7fd4", "#d0600a", "#1d9a58", "#b8569e", "#a37c00", "#7d74d8", "#c8515a", "#6f8088")
"""Lines' colours: each has a contrast of 3 or more to white and to the page's dark ground (WCAG 2, 1.4.11)."""
DASHES = ("-", "--", "-.", ":")  # told apart in print, too
WIDTH, HEIGHT = 5.0, 3.1  # inches: on a telephone it has 2 thirds of that, and its words are still of 8 pixels


@dataclass(frozen=True)
class Picture:
    """A figure with the words for those who do not see it."""

    name: str
    """Of its file, without the ending."""
    words: str
    figure: "Figure"

    @property
    def markdown(self) -> str:
        """The Markdown that shows its file."""
        return f"![{escape(self.words)}]({self.name}.png)"

    def write_png(self, folder: Path) -> None:
        """Write it for a white ground into a folder."""
        with atomic_file(folder / f"{self.name}.png") as aside, _any_script():
            self.figure.savefig(aside, dpi=150, format="png")

    def svg(self) -> str:
        """Return it for any ground, as a part of an HTML page: its black is the page's colour of text."""
        import matplotlib as mpl

        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}), _any_script():
            self.figure.savefig(file := BytesIO(), format="svg", transparent=True)
        text = file.getvalue().decode()
        text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
        _, head, body = re.split(r'(<svg [^>]*?viewBox="[^"]*")[^>]*>', text, maxsplit=1)
        width = float(self.figure.get_figwidth() * 96)
        (box,) = re.findall(r'viewBox="[^"]*"', head)
        opening = f'<svg {box} style="width:{width:.0f}px" role="img" aria-labelledby="{self.name}-title">'
        body = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{self.name}-", body)  # a page has each id once
        body = body.replace("#000000", "currentColor").replace("xlink:href", "href")
        return f'{opening}<title id="{self.name}-title">{_xml(self.words)}</title>{body.strip()}'


def curves(runs: Sequence[Run]) -> list[Picture]:
    """Return the pictures over the tokens read: loss, bits per byte, learning rate, gradient norm, speed, data wait.

    Those that no run has figures for are left out. A line has some 100 points, each the mean of those that follow one
    another.
    """
    kinds: list[tuple[str, str, str, str | None, dict[str, Any]]] = [
        ("training-loss", "training loss, nats a token", "loss", None, {}),
        ("divergence", "training, KL from the teacher, nats per token", "kl", None, {"bottom": 0}),
        (
            "alignment",
            "training, relative distance from the teacher's attention output",
            "align",
            None,
            {"bottom": 0},
        ),
        ("reward", "mean score of the model's answers", "reward", None, {"bottom": 0}),
        ("solved", "share of prompts with a right answer", "solved", None, {"bottom": 0}),
        ("entropy", "entropy of the answers, nats per token", "entropy", None, {"bottom": 0}),
        ("answer-length", "tokens per answer", "answer_tokens", None, {"bottom": 0}),
        ("validation-loss", "validation loss, nats a token", "loss", "validation", {"marker": "o"}),
        ("bits-per-byte", "validation, bits per byte", "bits_per_byte", "validation", {"marker": "o"}),
        ("learning-rate", "learning rate", "learning_rate", None, {}),
        ("gradient-norm", "norm of the gradient", "grad_norm", None, {"bottom": 0}),
        ("tokens-per-second", "tokens per second", "tokens_per_second", None, {"bottom": 0}),
        ("data-wait", "share of time waiting for data", "data_wait", None, {"bottom": 0}),
    ]
    drawn = []
    for name, title, key, part, how in kinds:
        lines = {run.name: smooth(points) for run in runs if (points := run.points(key, part))}
        bad = [record["tokens"] for run in runs for record in run.bad_steps()] if not part and len(runs) == 1 else []
        if lines:
            drawn.append(_lines(name, title, "tokens read", lines, bad=bad, names=[run.name for run in runs], **how))
    return drawn


def positions(found: dict[str, Points]) -> Picture:
    """Return the picture of the loss by position in the document, a line a name; points are (position, loss)."""
    title = "loss by position in the document, nats a token"
    return _lines("loss-by-position", title, "position", found, names=list(found), marker="o", by_doublings=True)


def heat_map(name: str, whose: str, report: TaskReport) -> Picture:
    """Return the heat map of a task's accuracy."""
    cells = ", ".join(f"{c.accuracy:.2f} at {c.row:g} and {c.segments:,}" for c in report.cells)
    words = f"{whose}: accuracy by {report.axis} and segments of noise: {cells}"
    with _style():
        figure = _figure(*heat_map_size(report))
        paint_heat_map(report, figure)
    return Picture(name, words, figure)


def _lines(
    name: str,
    title: str,
    across: str,
    lines: dict[str, Points],
    *,
    names: list[str],
    bad: Sequence[float] = (),
    marker: str | None = None,
    by_doublings: bool = False,
    bottom: float | None = None,
) -> Picture:
    """Draw a line a name, in the colour of its place in `names`; steps that were passed over are marked at the foot."""
    with _style():
        figure = _figure(WIDTH, HEIGHT)
        axes = figure.subplots()
        drawn = []
        for line, points in lines.items():
            at = names.index(line)
            drawn += axes.plot(
                *zip(*points, strict=True),
                color=INKS[at % len(INKS)],
                linestyle=DASHES[at % len(DASHES)],
                marker=marker or ("o" if len(points) == 1 else None),
                markersize=3.5,
                linewidth=1.5,
            )
        if bad:
            foot = axes.get_xaxis_transform()
            drawn += axes.plot(bad, [0.02] * len(bad), "x", color=INKS[6], markersize=5, transform=foot)
        _label(axes, title, across, by_doublings, bottom)
        labels = [" ".join(label.split()) for label in (*lines, *(["bad steps"] if bad else ()))]
        if len(labels) > 1:  # a space before it, as matplotlib leaves out what begins with an underscore
            figure.legend(drawn, [f" {label}" for label in labels], loc="outside lower center", ncols=3)
    ends = "; ".join(f"{line}: from {points[0][1]:.4g} to {points[-1][1]:.4g}" for line, points in lines.items())
    return Picture(name, f"{title}, by {across}. {ends}", figure)


def _label(axes: "Axes", title: str, across: str, by_doublings: bool, bottom: float | None) -> None:
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    if by_doublings:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}") if by_doublings else EngFormatter(sep=""))
    if bottom is not None:
        axes.set_ylim(bottom, None)
    axes.set(xlabel=across, title=title)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _style() -> Iterator[None]:
    """Draw in the report's way: a name is words, with `$` in it as well."""
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
    """Draw names in scripts that matplotlib's font lacks as boxes, without a warning for each letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s)Glyph .* missing from font")
        yield


def _xml(text: str) -> str:
    from html import escape as escape_html

    return escape_html(" ".join(text.split()))
