"""Python modules of an exported folder: the layers of rmkv_cli.model and their transformers interface."""

import ast
from importlib.resources import files

CONFIGURATION, MODELING = "configuration_rmkv", "modeling_rmkv"
PACKAGES = ("rmkv_cli.huggingface", "rmkv_cli.model")
ON_DISK = {
    *("rmkv_cli.model.pretrained", "rmkv_cli.model.state_file", "rmkv_cli.model.tensors"),
    *("rmkv_cli.errors", "rmkv_cli.files"),
}
READ_OR_WRITE_FILES = {"save", "load", "save_pretrained", "from_pretrained"}


def exported_modules() -> dict[str, str]:
    """Return the text of each module by file name: `MODELING` and all modules that it needs, directly or indirectly.

    Imports among them become relative. Functions that read or write files are left out, as transformers does that
    itself. A plain object with the same attributes replaces `rmkv_cli.config`.
    """
    modules: dict[str, str] = {}
    wanted = [f"rmkv_cli.huggingface.{MODELING}"]
    while wanted:
        package, _, name = wanted.pop().rpartition(".")
        if f"{name}.py" not in modules:
            modules[f"{name}.py"], imported = _rewrite(files(package).joinpath(f"{name}.py").read_text("utf-8"))
            wanted += imported
    return dict(sorted(modules.items()))


def _rewrite(text: str) -> tuple[str, list[str]]:
    """Return the exported text of a module, and the names of the modules of this package that it imports."""
    lines, imported = text.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.ImportFrom(module="rmkv_cli.config", names=names):
                new = f"from types import {', '.join(f'SimpleNamespace as {each.name}' for each in names)}\n"
            case ast.ImportFrom(module=str(module)) if module.startswith("rmkv_cli."):
                package, _, name = module.rpartition(".")
                new = ""
                if package in PACKAGES and module not in ON_DISK:
                    new = "".join(lines[node.lineno - 1 : node.end_lineno]).replace(module, f".{name}", 1)
                    imported.append(module)
            case ast.FunctionDef(name=name) if name in READ_OR_WRITE_FILES:
                new = ""
            case _:
                continue
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        lines[first - 1 : node.end_lineno] = [new] + [""] * ((node.end_lineno or first) - first)
    return "".join(lines).rstrip() + "\n", imported
