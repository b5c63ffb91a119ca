"""The `rmkv` command: its subcommands, and the handling of errors as one line and an exit code."""

import io
import os
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
    merge,
    params,
    quantize,
    read,
    report,
    serve,
    tokenizer,
    train,
    upcycle,
)
from rmkv_cli.cli.signals import handle_signals
from rmkv_cli.errors import explain, one_line
from rmkv_cli.progress import stderr


def build() -> typer.Typer:
    """Return the application with all its commands. Heavy libraries are imported only when a command runs."""
    app = typer.Typer(
        name="rmkv",
        help="RMKV: a language model with a fixed-size recurrent memory. Start with `rmkv demo`.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
        ] = False,
    ) -> None: ...

    model = typer.Typer(
        no_args_is_help=True, help="Train, evaluate and use a model. The same commands exist at the top level."
    )
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
        home.command("merge", epilog="Example: rmkv merge runs/base runs/adapter --out merged")(merge.merge)
        home.command("quantize", epilog="Example: rmkv quantize runs/tiny --out small --bits 4 --data data")(
            quantize.quantize
        )
        home.command("upcycle", epilog="Example: rmkv upcycle runs/tiny --experts 8 --out sparse")(upcycle.upcycle)
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


def _version(requested: bool) -> None:
    if requested:
        print(f"rmkv {version('rmkv')}")
        raise typer.Exit


def main() -> None:
    """Run `rmkv` and exit with its code.

    Exit codes are 0 on success; 1 if the work failed or the reader of stdout closed it; 2 for an error that the user
    can fix, reported in one line, or with its traceback if RMKV_DEBUG=1; 128 + N after signal N, such as 130 after
    Ctrl-C.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next opened file would get its number
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # in other encodings than UTF-8; stderr escapes by default
    handle_signals()
    stdout, line = sys.stdout, None
    try:
        build()()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:  # raised before Typer, which otherwise handles it
        code = 130
    except BaseException as error:
        line, code = explain(error), 2
        if line is None or os.environ.get("RMKV_DEBUG") == "1":
            raise
    try:
        stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # otherwise Python flushes again and complains
        if isinstance(error, BrokenPipeError):
            line, code = None, 1
        else:
            line, code = f"standard output: {one_line(error)}", 2
    if line is not None:
        stderr().print(f"error: {line}", style="red")
    sys.exit(code)
