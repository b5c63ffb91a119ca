"""Interactive input: line editing, history, and completion of commands and file names."""

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle


class CommandCompleter(Completer):
    """Completes a line's first word to a command, and the rest to a file name if the command takes one."""

    def __init__(self, commands: Iterable[str], with_file: Collection[str]) -> None:
        self._commands, self._with_file = list(commands), with_file
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield the completions of the line before the cursor."""
        command, space, rest = document.text_before_cursor.partition(" ")
        if space and command in self._with_file:
            yield from self._paths.get_completions(Document(rest), complete_event)
        elif command and not space:
            yield from (Completion(name, -len(command)) for name in self._commands if name.startswith(command))


def typed_messages(completer: Completer) -> Iterator[str]:
    """Yield the messages that the user types, of one or more lines each, until Ctrl-D; Ctrl-C discards the input."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        completer=completer,
        complete_style=CompleteStyle.READLINE_LIKE,
        complete_while_typing=False,
        history=open_history(),
    )
    while True:
        try:
            message = session.prompt()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        yield message


def open_history() -> History:
    """Return the input history: a file that only its owner can read, or memory if the file cannot be created."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "rmkv" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)
