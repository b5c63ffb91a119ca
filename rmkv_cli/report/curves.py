"""Curves of a report: what the training recorded, over the tokens read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rmkv_cli.report.pictures import Line, Picture, draw_lines
from rmkv_cli.report.run import Run
from rmkv_cli.training.curve import smooth


@dataclass(frozen=True)
class Curve:
    """A figure that the records contain, drawn over the tokens read."""

    name: str
    """Name of its picture, where it is drawn alone."""
    title: str
    unit: str
    key: str
    part: str | None = None
    """Object in the records that contains `key`; None if the record itself does."""
    bottom: float | None = None
    """Lower limit of its axis; None for the least value drawn."""


CURVES = {
    "loss": (
        Curve("training-loss", "training loss", "nats per token", "loss"),
        Curve("validation-loss", "validation loss", "nats per token", "loss", "validation"),
        Curve("bits-per-byte", "validation, bits per byte", "bits per byte", "bits_per_byte", "validation"),
    ),
    "teacher": (
        Curve("divergence", "KL divergence from the teacher", "nats per token", "kl", bottom=0),
        Curve("alignment", "distance from the teacher's attention output", "relative distance", "align", bottom=0),
    ),
    "reward": (
        Curve("reward", "mean score of the answers", "score", "reward", bottom=0),
        Curve("solved", "prompts with a right answer", "share of prompts", "solved", bottom=0),
    ),
    "answers": (
        Curve("entropy", "entropy of the answers", "nats per token", "entropy", bottom=0),
        Curve("answer-length", "length of the answers", "tokens per answer", "answer_tokens", bottom=0),
    ),
    "optimizer": (
        Curve("learning-rate", "learning rate", "learning rate", "learning_rate"),
        Curve("gradient-norm", "gradient norm", "gradient norm", "grad_norm", bottom=0),
    ),
    "speed": (
        Curve("tokens-per-second", "speed", "tokens per second", "tokens_per_second", bottom=0),
        Curve("data-wait", "time spent waiting for data", "share of time", "data_wait", bottom=0),
    ),
}
"""Groups of curves that a single run shows in one picture, each of at most two units, by the picture's name."""


def curves(runs: Sequence[Run]) -> list[Picture]:
    """Return the pictures over the tokens read; curves that no run has figures for are left out.

    A single run has a picture for each group of curves, with an axis for each unit. Several have a picture for each
    curve, which compares them. A line has about 100 points, each the mean of consecutive ones.
    """
    drawn = []
    for name, group in CURVES.items():
        found = {curve: lines for curve in group if (lines := _lines(curve, runs))}
        steps = any(curve.part is None for curve in found)
        bad = [record["tokens"] for record in runs[0].bad_steps()] if len(runs) == 1 and steps else []
        if len(runs) == 1 and len(found) > 1:
            lines = [replace(line, label=curve.title, place=i) for i, (curve, (line,)) in enumerate(found.items())]
            drawn.append(draw_lines(name, name, "tokens read", lines, show_title=False, bad_steps=bad))
        else:
            drawn += [
                draw_lines(curve.name, curve.title, "tokens read", lines, bad_steps=bad)
                for curve, lines in found.items()
            ]
    return drawn


def _lines(curve: Curve, runs: Sequence[Run]) -> list[Line]:
    """Return the line of each run that has figures for a curve."""
    return [
        Line(run.name, smooth(points), place, curve.unit, marked=curve.part is not None, bottom=curve.bottom)
        for place, run in enumerate(runs)
        if (points := run.points(curve.key, curve.part))
    ]
