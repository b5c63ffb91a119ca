"""`python -m rmkv_cli`: the same as `rmkv` (torchrun needs a module)."""

from rmkv_cli.cli.main import main

if __name__ == "__main__":
    main()
