"""Messages on stderr."""

from rmkv_cli.progress import stderr


def test_a_message_is_printed_as_it_is(capsys):
    message = "runs/[red]/x:smile:[/b]: " + "a long path " * 20
    stderr().print(message, style="yellow")
    assert capsys.readouterr().err == message + "\n"
