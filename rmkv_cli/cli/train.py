"""`rmkv train`."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rmkv_cli.cli.options import ConfigFile, Json, Overrides, Preset, print_json, read_config
from rmkv_cli.config import load_config
from rmkv_cli.errors import UserError
from rmkv_cli.progress import stderr


def train(
    preset: Preset = None,
    config: ConfigFile = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="What `rmkv data mix` made.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder. [default: runs/NAME]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    overrides: Overrides = None,
    allow_noncausal: Annotated[
        bool, typer.Option("--allow-noncausal", help="Train the published wiring, which sees the future.")
    ] = False,
    nproc: Annotated[
        int,
        typer.Option("--nproc", min=1, help="Processes, one a GPU; several machines: see docs/distributed.md."),
    ] = 1,
    as_json: Json = False,
) -> None:
    """Train a model. Ctrl-C saves; `--resume` goes on exactly where it stopped."""
    name = preset or (config.stem if config else None)
    if run is None:
        if name is None:
            raise UserError(
                "give a config (--preset NAME or --config FILE), or a run to go on with: --resume --run DIR"
            )
        run = Path("runs") / name
    moved = [f"train.data={data}"] if data else []
    if resume:
        if overrides:
            raise UserError(f"--set has no effect with --resume: {run} goes on with its own config.toml")
        if not (run / "config.toml").is_file():
            raise UserError(f"{run}: no run to go on with (it has no config.toml)")
        resolved = load_config(run / "config.toml", moved)
    else:
        resolved = read_config(preset, config, [*(overrides or ()), *moved])

    if nproc > 1 and "RANK" not in os.environ:  # which each of the processes has
        from rmkv_cli.training.launch import launch

        raise typer.Exit(launch(nproc, sys.argv[1:], run))

    if "RANK" in os.environ:  # DDP warns that it looks for unused weights, where a row happens to use all of them
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a KeyboardInterrupt inside an import may be swallowed there
    from rmkv_cli.training import NonFiniteError
    from rmkv_cli.training import train as train_run

    signal.signal(signal.SIGINT, before)
    try:
        outcome = train_run(resolved, run, resume=resume, allow_noncausal=allow_noncausal)
    except NonFiniteError as error:
        stderr().print(f"error: not a finite number at {error}", style="red")
        raise typer.Exit(1) from None
    if outcome is None:  # one of several processes, of which the first tells
        _leave(0)
    if as_json:
        print_json(
            {
                "run": str(outcome.run),
                "step": outcome.step,
                "tokens": outcome.tokens,
                "finished": outcome.tokens >= resolved.train.tokens,
                "validation": outcome.validation,
            }
        )
    else:
        print(f"{outcome.run}: {outcome.tokens:,} tokens in {outcome.step:,} steps")
    if outcome.tokens < resolved.train.tokens:
        stderr().print(f"stopped; go on with: rmkv train --resume --run {run}")
    _leave(outcome.exit_code)


def _leave(code: int) -> NoReturn:
    """End with this exit code; as one of several processes at once.

    There threads of the process group may live on (functional collectives keep it), and one that drops a tensor while
    the interpreter is torn down aborts the process.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(code)
    raise typer.Exit(code)
