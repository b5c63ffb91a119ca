"""`rmkv params`."""

from typing import Annotated, Any

import typer

from rmkv_cli.cli.options import ConfigFile, Json, Overrides, Preset, at_least, print_json, read_config
from rmkv_cli.cli.tables import console, size, table
from rmkv_cli.progress import amount

TRAINABLE = {"all": '"all"', "adapters": '"adapters"', "memory start": '["memory start"]'}


def params(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    batch: Annotated[
        int | None, typer.Option(parser=at_least(1), metavar="N", help="Rows per batch. [default: micro_batch_size]")
    ] = None,
    row_tokens: Annotated[
        int | None, typer.Option(parser=at_least(1), metavar="N", help="Row length. [default: segments_max segments]")
    ] = None,
    train: Annotated[
        bool,
        typer.Option(
            "--train",
            help="Also show the training budget: tokens, FLOPs, hours per GPU model, memory.",
        ),
    ] = False,
    groups: Annotated[bool, typer.Option("--groups", help="Also show which parameters are trained, and how.")] = False,
    as_json: Json = False,
) -> None:
    """Count parameters, FLOPs per token, and memory of the state and of training, without allocating the weights."""
    resolved = read_config(preset, config, overrides)

    from rmkv_cli.model.cost import describe, tuning_memory

    longest = resolved.train.segments_max * resolved.model.segment_length
    rows = batch or resolved.train.micro_batch_size, row_tokens or longest
    report = describe(resolved, *rows)
    if train:
        from rmkv_cli.training.length import with_length
        from rmkv_cli.training.utilization import training_budget

        report["training"] = training_budget(with_length(resolved)) | {"memory_bytes": tuning_memory(resolved, *rows)}
    if groups:
        from rmkv_cli.training.optimizer import describe_groups

        report["groups"] = describe_groups(resolved)
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _print_report(report: dict[str, Any]) -> None:
    total, flops, assumed = report["parameters"], report["flops_per_token"], report["assumed"]
    parts = table("part", "parameters", "share", title="Parameters")
    for part, count in report["by_part"].items():
        parts.add_row(part.replace("_", " "), f"{count:,}", f"{count / total:.1%}")
    parts.add_section()
    parts.add_row("all", f"{total:,}", "100%", style="bold")

    replay = "with" if assumed["replay"] else "without"
    state, memory = report["state_bytes"], report["training_bytes"]
    costs = table("cost", "amount", title="Costs")
    costs.add_row("parameters touched per token", f"{report['touched_per_token']:,}")
    costs.add_row("FLOPs per token, forward", amount(flops["forward"]))
    costs.add_row(f"FLOPs per token, training {replay} replay", amount(flops["training"]))
    costs.add_row("state per sequence, between segments", size(state["at_boundary"]))
    costs.add_row("state per sequence, at most", size(state["at_most"]))
    costs.add_section()
    given = f"{assumed['batch']} of {assumed['lanes']} rows of {assumed['row_tokens']:,} tokens, {assumed['precision']}"
    costs.add_row(f"memory for training ({given}; estimate)", size(memory["total"]), style="bold")
    for part in ("weights", "gradients", "optimizer", "states", "activations"):
        costs.add_row(f"  {part}", size(memory[part]))
    if memory["teacher"]:
        costs.add_row("  teacher", size(memory["teacher"]))
    if memory["set_aside"]:
        costs.add_row("frozen weights in float32, beside a GPU's memory", size(memory["set_aside"]))
    screen = console()
    screen.print(parts)
    screen.print(costs)
    if "training" in report:
        budget = report["training"]
        training = table("training", "amount", title="Training budget")
        training.add_row("tokens", amount(budget["tokens"]))
        training.add_row("FLOPs, without replay", f"{budget['flops']:.3g}")
        training.add_section()
        for card, hours in budget["hours"].items():
            training.add_row(f"hours on one {card}, bf16, at an MFU of {budget['assumed_mfu']:.0%}", f"{hours:,.1f}")
        training.add_section()
        for trainable, bytes_ in budget["memory_bytes"].items():
            training.add_row(f"memory with train.trainable = {TRAINABLE[trainable]} (estimate)", size(bytes_))
        screen.print(training)
    if "groups" in report:
        groups = table("group", "parameters", "optimizer", "learning rate", "weight decay", title="Parameter groups")
        for group in report["groups"]:
            how = ("frozen", "", "")
            if group["trained"]:
                how = group["optimizer"], f"{group['learning_rate']:g}", f"{group['weight_decay']:g}"
            groups.add_row(group["name"], f"{group['parameters']:,}", *how)
        screen.print(groups)
