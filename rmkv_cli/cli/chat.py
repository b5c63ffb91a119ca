"""`rmkv chat`."""

import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rmkv_cli.cli.loading import Adapter, Device, Dtype, load_model
from rmkv_cli.cli.options import (
    FrequencyPenalty,
    MinP,
    Model,
    NoRepeatNgram,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    at_least,
)
from rmkv_cli.cli.signals import end_by_signal
from rmkv_cli.config import parse
from rmkv_cli.errors import UserError, did_you_mean, one_line, pip_install
from rmkv_cli.files import require_file, require_new, require_writable
from rmkv_cli.progress import plural, progress, stderr

if TYPE_CHECKING:
    from rmkv_cli.generation import Conversation

COMMANDS = {
    "/help": ("", "show this"),
    "/read": ("FILE", "read a text of any length, as a message that is not answered"),
    "/save": ("FILE", "save the model's state, for --state, /load and `rmkv generate --state`"),
    "/load": ("FILE", "continue from a saved state instead, or from one of `rmkv read`"),
    "/reset": ("", "forget everything except --system"),
    "/stats": ("", "show the tokens read, the size of the state and the rates of the last turn"),
    "/quit": ("", "end the chat, as Ctrl-D does"),
}
KEYS = "Alt-Enter: new line; Ctrl-C: stop the answer. To send a message that begins with /, put a space before it."


def chat(
    model: Model,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="NOTES",
            help="Continue from this file if it exists, and save into it at the end; a tuned memory stays unchanged.",
        ),
    ] = None,
    mode: Annotated[
        Literal["single", "instruct", "chat"],
        typer.Option(
            help="chat: each turn follows all earlier ones. instruct: the model knows earlier turns only from its "
            "memory, and sees none of their tokens. single: each message stands alone, and nothing is remembered."
        ),
    ] = "chat",
    system: Annotated[str, typer.Option(metavar="TEXT", help="System message of a new conversation.")] = "",
    max_tokens: Annotated[
        int, typer.Option(parser=at_least(0), metavar="N", help="Generate at most N tokens per answer.")
    ] = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    no_repeat_ngram: NoRepeatNgram = 0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed and messages give the same answers. [default: random]")
    ] = None,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Chat with a model that keeps its memory between turns and, with --state, between sessions.

    If standard input is not a terminal, each of its lines is a message or a command, and stdout gets the answers.
    """
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        try:
            from rmkv_cli.cli.terminal import CommandCompleter, typed_messages
        except ModuleNotFoundError:
            raise UserError(f"typing needs prompt_toolkit: {pip_install('chat')}; or pipe lines in") from None
        with_file = {name for name, (argument, _) in COMMANDS.items() if argument}
        messages = typed_messages(CommandCompleter(COMMANDS, with_file))
    else:
        messages = _lines()

    from rmkv_cli.generation import Conversation, SamplingConfig, is_start, load_notes

    values = {
        "repetition_penalty": repetition_penalty,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "no_repeat_ngram": no_repeat_ngram,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": secrets.randbelow(2**31) if seed is None else seed,
    }
    config = parse(SamplingConfig, values, "sampling")
    tuned = state if state is not None and state.exists() and is_start(state) else None
    if tuned is not None:
        state = None  # a tuned memory is no place for a conversation
    if state is not None:
        require_writable(state)
    rmkv, tokenizer = load_model(model, device, dtype, adapter)
    start = load_notes(tuned, rmkv, tokenizer) if tuned is not None else None
    conversation = Conversation(rmkv, tokenizer, config, max_tokens, mode, system, start)
    if tuned is not None:
        _report(f"starting from the tuned memory {tuned}; it stays unchanged, and /save FILE saves the conversation")
    if state is not None and state.exists():
        conversation.load(state)
        _report(f"continuing from {state}" + ("; --system is not set again" if system else ""))
    if typed:
        _report(f"/help shows the commands. {KEYS}")
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # what nohup does
        signal.signal(signal.SIGHUP, end_by_signal)  # closing the terminal ends the chat as SIGTERM does
    try:
        _converse(conversation, messages, typed, state)
    finally:
        if state is not None and conversation.empty:
            _report(f"nothing was read, so {state} was not written")
        elif state is not None:
            conversation.save(state)
            _report(f"saved {state}")


def _lines() -> Iterator[str]:
    """Yield standard input's lines; bytes that are not UTF-8 become what the tokenizer refuses."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "surrogateescape").rstrip("\r\n")


def _converse(conversation: "Conversation", messages: Iterator[str], typed: bool, state: Path | None) -> None:
    """Answer messages and run commands until the input ends; report an error and continue."""
    for message in messages:
        try:
            if message.strip() == "/quit":
                return
            if message.startswith("/"):
                try:
                    _command(conversation, message, state)
                except OSError as error:  # an error of a file; an error of stdout ends the chat
                    raise UserError(one_line(error)) from None
            elif message.strip():
                _answer(conversation, message.strip())
        except UserError as error:
            stderr().print(f"error: {error}", style="red")
        except KeyboardInterrupt:
            if not typed:
                raise
            _report("stopped")


def _answer(conversation: "Conversation", message: str) -> None:
    """Print the answer as it is generated, then a newline, even after Ctrl-C."""
    with closing(conversation.say(message)) as pieces:
        try:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
        finally:
            print(flush=True)


def _command(conversation: "Conversation", line: str, state: Path | None) -> None:
    """Run a command; raise `UserError` if it does not exist or fails."""
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command{did_you_mean(name, COMMANDS) or '; /help shows them'}")
    wanted, _ = COMMANDS[name]
    if bool(argument) != bool(wanted):
        raise UserError(f"{name}: should be `{name} {wanted}`" if wanted else f"{name}: takes no argument")
    path = Path(os.path.expanduser(argument.strip()))  # noqa: PTH111 - Path's raises where there is no such user
    match name:
        case "/help":
            for command, (takes, does) in COMMANDS.items():
                _report(f"{command} {takes}".ljust(12) + does)
            _report(KEYS)
        case "/read":
            _read(conversation, path)
        case "/save":
            if path != state:
                require_new(path)
            conversation.save(path)
            _report(f"saved {path}")
        case "/load":
            conversation.load(path)
            _report(f"continuing from {path}")
        case "/reset":
            conversation.reset()
            _report("started a new conversation")
        case "/stats":
            _stats(conversation)


def _read(conversation: "Conversation", path: Path) -> None:
    from rmkv_cli.generation import text_pieces

    require_file(path)
    with path.open("rb") as file, progress(f"reading {path}", path.stat().st_size, "bytes") as advance:
        reading = conversation.read(text_pieces(file, str(path), advance, conversation.tokenizer.parts))
    _report(f"read {plural(reading.tokens, 'token')} at {reading.tokens / reading.seconds:,.0f}/s")


def _stats(conversation: "Conversation") -> None:
    carried, question, answer = conversation.memory.state, conversation.question, conversation.answer
    _report(f"{plural(int(carried.position), 'token')} so far, in a state of {carried.size():,} bytes")
    if question is not None and answer is not None and answer.ids:
        _report(
            f"last turn: read {plural(question.tokens, 'token')} at {question.tokens / question.seconds:,.0f}/s, "
            f"generated {len(answer.ids):,} at {len(answer.ids) / answer.seconds:,.0f}/s"
        )


def _report(message: str) -> None:
    stderr().print(message, style="dim")
