"""Entry point of the `rmkv` command and of `python -m rmkv_cli`, the form that torchrun needs."""

import os

from rmkv_cli.cli.signals import handle_signals


def main() -> None:
    """Run `rmkv`; install the signal handlers before the slow imports."""
    handle_signals()
    # OpenMP reads it when torch is imported. Threads that spin while they wait are slow beside other busy processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from rmkv_cli.cli.main import main

    main()


if __name__ == "__main__":
    main()
