"""Loss curve of a run, as a PNG and for the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rmkv_cli.errors import UserError, pip_install
from rmkv_cli.training.metrics import read_metrics

Points = tuple[list[float], list[float]]


def draw_loss_curve(run: Path, png: Path) -> str:
    """Draw a run's training and validation loss over tokens: write `png`, and return the chart for the terminal.

    Raises:
        UserError: matplotlib and plotext are not installed, or the run has no metrics.
    """
    try:
        import matplotlib as mpl
        import plotext
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; {pip_install('plot')}") from None
    records = read_metrics(run / "metrics.jsonl")
    if not records:
        raise UserError(f"{run}: has no metrics yet")
    train = _points(smooth([(r["tokens"], r["loss"]) for r in records if "loss" in r]))
    held_out = _points([(r["tokens"], r["validation"]["loss"]) for r in records if "validation" in r])

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*train, label="training", linewidth=1)
    axes.plot(*held_out, "o-", label="held out")
    axes.set(xlabel="tokens", ylabel="loss, nats per token", title=run.name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(png, dpi=150)
    pyplot.close(figure)

    screen = plotext.figure
    screen.clear()
    screen.plot_size(80, 20)
    screen.draw(screen.signal(*train).lines())
    if held_out[0]:
        screen.draw(screen.signal(*held_out, marker="o"))
    screen.title("loss in nats per token: a line for training, o held out")
    screen.label("tokens", "x")
    return str(plotext.uncolorize(screen.build().string())).rstrip()


def smooth(pairs: Sequence[tuple[float, float]], most: int = 100) -> list[tuple[float, float]]:
    """Return at most about `most` means of consecutive pairs, because the loss of a single step is noisy."""
    size = -(-len(pairs) // most)
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _points(pairs: Sequence[tuple[float, float]]) -> Points:
    return [x for x, _ in pairs], [y for _, y in pairs]
