"""`rmkv train`."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rmkv_cli.cli.options import ConfigFile, Json, Overrides, Preset, at_least, print_json, read_config, read_recipe
from rmkv_cli.cli.tables import console, size, table
from rmkv_cli.config import mix_path, resumed_config, tunes_only
from rmkv_cli.errors import UserError
from rmkv_cli.progress import plural, stderr


def train(
    preset: Preset = None,
    config: ConfigFile = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder from `rmkv data mix`.")] = None,
    mix: Annotated[
        str | None,
        typer.Option(
            metavar="MIX", help="Stream this mix.toml or shipped mix; with --resume, use it to find moved files."
        ),
    ] = None,
    from_model: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Start from this model folder, checkpoint or run instead of random weights; see docs/finetuning.md.",
        ),
    ] = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the run. [default: runs/NAME]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the run's last checkpoint.")] = False,
    overrides: Overrides = None,
    allow_noncausal: Annotated[
        bool, typer.Option("--allow-noncausal", help="Allow the published wiring, in which tokens see later tokens.")
    ] = False,
    profile: Annotated[
        int | None,
        typer.Option(
            parser=at_least(1),
            metavar="STEPS",
            help="Profile N steps: write a trace and list the ten most expensive operations.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, run two steps, estimate time, memory and disk, and leave no files."
        ),
    ] = False,
    price: Annotated[
        float | None, typer.Option(min=0, metavar="PER_HOUR", help="With --dry-run, estimate the cost at this price.")
    ] = None,
    nproc: Annotated[
        int,
        typer.Option("--nproc", min=1, help="Processes, one per GPU. For several machines, see docs/distributed.md."),
    ] = 1,
    as_json: Json = False,
) -> None:
    """Train a model. Ctrl-C saves a checkpoint and stops; `--resume` continues exactly where the run stopped.

    Combine `--resume` with `--set` to extend a finished run.
    """
    if sum(map(bool, (resume, profile, dry_run))) > 1:
        raise UserError("--resume, --profile and --dry-run cannot be combined; give only one of them")
    if (nproc > 1 or "RANK" in os.environ) and (profile or dry_run):
        raise UserError("--profile and --dry-run use a single process; leave out --nproc and torchrun")
    if price is not None and not dry_run:
        raise UserError("--price needs --dry-run")
    name = preset or (config.stem if config else None)
    if run is None:
        if name is None:
            raise UserError("give a config (--preset NAME or --config FILE), or a run to resume (--resume --run DIR)")
        run = Path("runs") / name
    if data and mix:
        raise UserError("--data and --mix: training reads either prepared data or a stream; give only one of them")
    moved = [f"train.data={data}"] if data else [f"train.mix={mix_path(mix).absolute()}"] if mix else []
    if resume:
        if from_model:
            raise UserError(f"--from starts a new run, but --resume continues {run}; leave out one of them")
        if not (run / "config.toml").is_file():
            raise UserError(f"{run}: no run to resume (it has no config.toml)")
        resolved = resumed_config(run / "config.toml", overrides or (), moved)
    elif from_model:
        resolved = read_recipe(preset, config, [*(overrides or ()), *moved], from_model)
    elif preset and tunes_only(preset):
        raise UserError(f"--preset {preset}: fine-tunes an existing model; give it with --from MODEL")
    else:
        resolved = read_config(preset, config, [*(overrides or ()), *moved])
    if mix and resolved.train.data:
        raise UserError(f"--mix: this training reads prepared data, train.data = '{resolved.train.data}'; see --data")

    if nproc > 1 and "RANK" not in os.environ:  # set in each process that `launch` starts
        from rmkv_cli.training.launch import launch

        raise typer.Exit(launch(nproc, sys.argv[1:], run))

    from rmkv_cli.training import BadStepError
    from rmkv_cli.training import dry_run as try_run
    from rmkv_cli.training import profile as profile_run
    from rmkv_cli.training import train as train_run

    try:
        if dry_run:
            report = try_run(resolved, run, price=price, allow_noncausal=allow_noncausal)
            (print_json if as_json else _print_dry_run)(report)
            return
        if profile:
            report = profile_run(resolved, run, profile, allow_noncausal=allow_noncausal)
            (print_json if as_json else _print_profile)(report)
            return
        outcome = train_run(resolved, run, resume=resume, allow_noncausal=allow_noncausal)
    except BadStepError as error:
        stderr().print(f"error: {error}", style="red")
        raise typer.Exit(error.job_exit_code if "RANK" in os.environ else 1) from None
    if outcome is None:  # not the first process, which alone reports
        _leave(0)
    if as_json:
        print_json(
            {
                "run": str(outcome.run),
                "step": outcome.step,
                "tokens": outcome.tokens,
                "finished": outcome.finished,
                "validation": outcome.validation,
            }
        )
    else:
        print(f"{outcome.run}: {plural(outcome.tokens, 'token')} in {plural(outcome.step, 'step')}")
    if not outcome.finished:
        stderr().print(f"stopped; resume with: rmkv train --resume --run {run}")
    _leave(outcome.exit_code)


def _leave(code: int) -> NoReturn:
    """Exit with this code; in a distributed run, without Python's shutdown.

    Functional collectives keep the process group's threads alive. A thread that frees a tensor during Python's shutdown
    aborts the process.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(code)
    raise typer.Exit(code)


def _print_dry_run(report: dict[str, Any]) -> None:
    memory, disk = report["memory_bytes"], report["disk_bytes"]
    shown = table("this run", "estimate")
    shown.add_row("parameters", f"{report['parameters']:,}")
    shown.add_row("tokens", f"{report['tokens']:,}")
    shown.add_row("steps", f"{report['steps']:,}")
    shown.add_row("tokens per second", f"{report['tokens_per_second']:,.0f}")
    shown.add_row("hours", f"{report['hours']:,.2f}")
    if "cost" in report:
        shown.add_row("cost", f"{report['cost']:,.2f}")
    shown.add_row("memory, estimated", size(memory["estimated"]))
    shown.add_row("memory, peak of two steps", f"{size(memory['peak'])} of {size(memory['total'])}")
    shown.add_row("checkpoint", size(report["checkpoint_bytes"]))
    shown.add_row("disk, all kept checkpoints", f"{size(disk['needed'])} ({size(disk['free'])} free)")
    console().print(shown)


def _print_profile(report: dict[str, Any]) -> None:
    shown = table("operation", "calls per step", "ms per step", "share")
    for each in report["operations"]:
        shown.add_row(each["name"], f"{each['calls']:,.1f}", f"{each['milliseconds']:,.3f}", f"{each['share']:.1%}")
    console().print(shown)
    size = f"{plural(report['rows'], 'row')} of {plural(report['segments'], 'segment')}"
    print(f"{plural(report['steps'], 'step')} of one micro-batch each ({size}); trace: {report['trace']}")
