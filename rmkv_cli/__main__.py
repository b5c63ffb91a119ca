"""Entry point of the `rmkv` command and of `python -m rmkv_cli`, the form that torchrun needs."""

from rmkv_cli.cli.signals import handle_signals


def main() -> None:
    """Run `rmkv`; install the signal handlers before the slow imports."""
    handle_signals()
    from rmkv_cli.cli.main import main

    main()


if __name__ == "__main__":
    main()
