"""The `rmkv` command: its groups, and how every error becomes one line and an exit code."""

import io
import os
import signal
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from rmkv_cli.cli import (
    chat,
    config,
    data,
    demo,
    evaluate,
    generate,
    huggingface,
    inspect,
    params,
    read,
    report,
    serve,
    tokenizer,
    train,
)
from rmkv_cli.errors import UserError, one_line
from rmkv_cli.progress import stderr


def build() -> typer.Typer:
    """Return the application with all its commands. Nothing heavy is imported until a command runs."""
    app = typer.Typer(
        name="rmkv",
        help="RMKV: a language model with a fixed recurrent memory. Start with `rmkv demo`.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print it.")] = False,
    ) -> None: ...

    model = typer.Typer(no_args_is_help=True, help="Train, evaluate, use and count a model (also at the top level).")
    for home in (app, model):
        home.command("train", epilog="Example: rmkv train --preset tiny --data data --set train.tokens=1000000")(
            train.train
        )
        home.command("eval", epilog="Example: rmkv eval --model runs/tiny --data data")(evaluate.evaluate)
        home.command("generate", epilog="Example: rmkv generate --model runs/tiny --prompt 'Once upon a time'")(
            generate.generate
        )
        home.command("chat", epilog="Example: rmkv chat --model runs/tiny --state notes.rmkv")(chat.chat)
        home.command("read", epilog="Example: rmkv read book.txt --model runs/tiny --out book.rmkv")(read.read)
        home.command("serve", epilog="Example: rmkv serve --model runs/tiny")(serve.serve)
        home.command("params", epilog="Example: rmkv params --preset 600m --row-tokens 131072")(params.params)
    app.command("count-params", epilog="Example: rmkv count-params --preset tiny")(params.params)
    app.command("report", epilog="Example: rmkv report runs/tiny")(report.report)
    app.command("demo", epilog="Example: rmkv demo")(demo.demo)
    app.command("push", epilog="Example: rmkv push exported my-name/my-model --private")(huggingface.push)
    app.add_typer(tokenizer.app, name="tokenizer")
    app.add_typer(data.app, name="data")
    app.add_typer(config.app, name="config")
    app.add_typer(inspect.app, name="inspect")
    app.add_typer(huggingface.export_app, name="export")
    app.add_typer(huggingface.import_app, name="import")
    app.add_typer(model, name="model")
    return app


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rmkv {version('rmkv')}")
        raise typer.Exit


def main() -> None:
    """Run `rmkv`. Exit code 0: done; 1: the work failed; 2: bad input, said in one line; 130: stopped by Ctrl-C.

    RMKV_DEBUG=1 shows the traceback instead.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where it is not UTF-8; stderr escapes such characters by itself
    if sys.stdin is None:  # closed: nothing can be read
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is cleaned up
    try:
        build()()
    except (UserError, OSError) as error:
        if os.environ.get("RMKV_DEBUG") == "1":
            raise
        stderr().print(f"error: {one_line(error)}", style="red")
        sys.exit(2)
