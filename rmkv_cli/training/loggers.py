"""Loggers that receive a run's records as well as metrics.jsonl: TensorBoard, trackio, Weights & Biases."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rmkv_cli.config import Config
from rmkv_cli.errors import UserError, pip_install

Log = Callable[[dict[str, Any]], None]
INSTALLS = {"tensorboard": pip_install("log"), "trackio": pip_install("log"), "wandb": "pip install wandb"}


def require_loggers(names: Sequence[str]) -> None:
    """Raise `UserError` if one of these loggers is not installed."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name has a spec, but no origin
            raise UserError(f"train.loggers: {name} is not installed; {INSTALLS[name]}")


@contextmanager
def open_loggers(config: Config, run: Path, step: int) -> Iterator[Log]:
    """Open the config's loggers and return a function that sends them a record.

    Records after `step` will be sent again by a resumed run; TensorBoard drops its old ones.
    """
    with redirect_stdout(sys.stderr):  # stdout is for results only
        opened = [
            _tensorboard(run, step) if name == "tensorboard" else _open_board(name, config, run, step)
            for name in config.train.loggers
        ]

    def log(record: dict[str, Any]) -> None:
        for send, _ in opened:
            send(record)

    try:
        yield log
    finally:
        with redirect_stdout(sys.stderr):
            for _, close in opened:
                close()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Return a record's numbers except its step, with nested ones as `validation/loss` and so on."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= {f"{key}/{inner}": x for inner, x in value.items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in flat.items() if key != "step" and isinstance(value, int | float)}


def _tensorboard(run: Path, step: int) -> tuple[Log, Callable[[], None]]:
    """Return functions that write a record into the run's folder `tensorboard` and that close the writer."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def send(record: dict[str, Any]) -> None:
        for key, value in scalars(record).items():
            writer.add_scalar(key, value, record["step"])

    return send, writer.close


def _open_board(name: str, config: Config, run: Path, step: int) -> tuple[Log, Callable[[], None]]:
    """Return functions that send a record to trackio or wandb, in the project `rmkv` by the run's name, and that close
    it."""
    board = import_module(name)
    if name == "wandb":  # resumes by id, which is unique even for another run in the same folder
        started = (run / "tokenizer.json").stat().st_mtime_ns
        keys = {"id": f"{run.name}-{started:x}", "resume": "allow", "dir": run}
    else:
        keys = {"resume": "allow" if step else "never"}
    board.init(project="rmkv", name=run.name, config=config.model_dump(), **keys)
    return lambda record: board.log(scalars(record), step=record["step"]), board.finish
