"""Tables of the figures of runs, side by side."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from rmkv_cli.markdown import table
from rmkv_cli.model.cost import count_by_part, forward_flops_per_token
from rmkv_cli.progress import amount
from rmkv_cli.report.run import Run
from rmkv_cli.training.utilization import training_flops_per_token

Figure = int | float | None


def figures(run: Run) -> dict[str, Figure]:
    """Return a run's headline figures; None where the run has not recorded what a figure needs.

    Losses are in nats per token; the memory's costs are those of the final evaluation. FLOPs are the model's, three
    forward passes per token.
    """
    last = {key: _last(run.points(key, "validation")) for key in ("loss", "perplexity", "bits_per_byte")}
    losses = [loss for _, loss in run.points("loss", "validation")]
    final = run.final_evaluation()
    effect = final[1].memory if final else None
    tokens = run.records[-1]["tokens"] if run.records else 0
    flops = training_flops_per_token(run.config.model)
    return {
        "parameters": sum(count_by_part(run.config.model).values()),
        "steps": run.records[-1]["step"] if run.records else 0,
        "tokens": tokens,
        "tokens_planned": run.config.train.tokens,
        "bad_steps": len(run.bad_steps()),
        "training_loss": _last(run.points("loss")),
        "validation_loss": last["loss"],
        "best_validation_loss": min(losses, default=None),
        "perplexity": last["perplexity"],
        "bits_per_byte": last["bits_per_byte"],
        "memory_reset_cost": effect.reset_cost if effect else None,
        "memory_swapped_cost": effect.swapped_cost if effect else None,
        "tokens_per_second": _median(run.points("tokens_per_second")),
        "data_wait": _median(run.points("data_wait")),
        "mfu": _median(run.points("mfu")),
        "training_flops_per_token": flops,
        "training_flops": flops * tokens,
    }


ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters": ("parameters", "{:,}".format),
    "steps": ("steps", "{:,}".format),
    "tokens": ("tokens", "{:,}".format),
    "tokens_planned": ("tokens planned", "{:,}".format),
    "bad_steps": ("bad steps", "{:,}".format),
    "training_loss": ("training loss, last, nats per token", "{:.4f}".format),
    "validation_loss": ("validation loss, last, nats per token", "{:.4f}".format),
    "best_validation_loss": ("validation loss, best", "{:.4f}".format),
    "perplexity": ("perplexity, last", "{:,.2f}".format),
    "bits_per_byte": ("bits per byte, last", "{:.4f}".format),
    "memory_reset_cost": ("cost of resetting the memory, nats per token", "{:+.4f}".format),
    "memory_swapped_cost": ("cost of another document's memory, nats per token", "{:+.4f}".format),
    "tokens_per_second": ("tokens per second, median", "{:,.0f}".format),
    "data_wait": ("waiting for data, median", "{:.1%}".format),
    "mfu": ("MFU, median", "{:.1%}".format),
    "training_flops_per_token": ("FLOPs per token, training", amount),
    "training_flops": ("FLOPs of the training so far", "{:.3g}".format),
}


def figures_table(runs: Sequence[Run]) -> str:
    """Return the table of the headline figures that any of the runs has, with a column for each run."""
    found = [figures(run) for run in runs]
    rows = [
        [title, *("" if of_run[key] is None else written(of_run[key]) for of_run in found)]
        for key, (title, written) in ROWS.items()
        if any(of_run[key] is not None for of_run in found)
    ]
    return table(["", *(run.name for run in runs)], rows)


def cost_tables(runs: Sequence[Run]) -> str:
    """Return the tables of parameters and of the forward pass's FLOPs per token, by part of the model."""
    return "\n\n".join(
        _by_part(title, runs, [count(run.config.model) for run in runs])
        for title, count in (("parameters", count_by_part), ("FLOPs per token, forward", forward_flops_per_token))
    )


def _by_part(title: str, runs: Sequence[Run], counts: "Sequence[dict[str, Any]]") -> str:
    rows = [
        [part.replace("_", " "), *(f"{count[part]:,.0f}" for count in counts)]
        for part in counts[0]
        if any(count[part] for count in counts)
    ]
    total = ["all", *(f"{sum(count.values()):,.0f}" for count in counts)]
    return table([title, *(run.name for run in runs)], [*rows, total])


def _last(points: list[tuple[float, float]]) -> float | None:
    return points[-1][1] if points else None


def _median(points: list[tuple[float, float]]) -> float | None:
    return median(value for _, value in points) if points else None
