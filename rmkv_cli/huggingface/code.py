"""The Python of an exported folder: the layers of rmkv_cli.model and their transformers interface, side by side."""

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
    """Return the text of each file, by name: what `MODELING` needs, the modules that these need, and so on.

    Imports among them become relative. What reads and writes files stays behind, as transformers does that itself, and
    so does `rmkv_cli.config`: a plain object with its attributes stands for it.
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
    """Return a module's text as it is exported, and the modules of ours that it imports."""
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
