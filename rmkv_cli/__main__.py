"""Provide the `rmkv` command, also as `python -m rmkv_cli` (torchrun needs a module)."""

from rmkv_cli.cli.signals import handle_signals


def main() -> None:
    """Run `rmkv`; signals end it from the first import on."""
    handle_signals()
    from rmkv_cli.cli.main import main

    main()


if __name__ == "__main__":
    main()
