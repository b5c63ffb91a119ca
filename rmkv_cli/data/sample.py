"""The sample corpus: prose and code from the local Python's standard library, and generated worked problems."""

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from rmkv_cli.data.problems import problems
from rmkv_cli.errors import UserError
from rmkv_cli.files import atomic_directory, require_new

SKIPPED = {
    *("test", "tests", "idlelib", "turtledemo", "lib2to3", "encodings", "ensurepip", "pydoc_data"),
    *("site-packages", "dist-packages", "__pycache__"),
}
MIX = """\
# Three sources from the local Python installation: `rmkv data mix mix.toml --tokenizer tokenizer.json --out data`
seed = 0
validation = 0.05

[[sources]]
kind = "files"
name = "prose"
weight = 2
files = ["prose.jsonl"]

[[sources]]
kind = "files"
name = "code"
weight = 2
files = ["code.jsonl"]

[[sources]]
kind = "files"
name = "reasoning"
weight = 1
files = ["reasoning.jsonl"]
format = "prompt_response"
"""
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
CODE_PER_PROSE = 1.1  # in bytes; with these two ratios the three sources are exhausted at about the same time
REASONING_PER_PROSE = 0.3


def make_sample(out: Path) -> dict[str, int]:
    """Write prose.jsonl, code.jsonl, reasoning.jsonl and mix.toml to the new folder `out`; return the files' sizes.

    The same Python gives the same files. Prose and code share no text, because docstrings are removed from the code.

    Raises:
        UserError: `out` exists, or this Python lacks the sources of its standard library.
    """
    require_new(out)
    with atomic_directory(out) as folder:
        prose, code = [], []
        for path in _modules():
            docstrings, rest = split_docstrings(path.read_bytes())
            if docstrings:
                prose.append({"text": docstrings})
            if rest:
                code.append({"text": rest})
        if not code:
            raise UserError("this Python lacks the sources of its standard library, from which the sample is made")
        prose += [{"text": text} for text in _topics()]
        size = sum(len(document["text"].encode()) for document in prose)
        _write(folder / "prose.jsonl", prose, size)
        _write(folder / "code.jsonl", code, CODE_PER_PROSE * size)
        _write(folder / "reasoning.jsonl", problems(seed=0), REASONING_PER_PROSE * size)
        (folder / "mix.toml").write_text(MIX, encoding="utf-8")
        return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def _modules() -> list[Path]:
    """Return the library's modules in a fixed order that mixes the subjects."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts)]
    return sorted(paths, key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())


def split_docstrings(source: bytes) -> tuple[str, str]:
    """Return a module's docstrings as one text, and its code without them; ("", "") if it is not Python in UTF-8."""
    try:
        source.decode()
        tree = _parse(source)
        docstrings, cuts, shared_line = [], [], False
        for node in ast.walk(tree):
            if isinstance(node, Documented) and (docstring := ast.get_docstring(node)):
                docstrings.append(docstring)
                cuts.append((node.body[0], b"pass" if len(node.body) == 1 else b""))
        lines = source.splitlines(keepends=True)
        for cut, replacement in sorted(cuts, key=lambda pair: -pair[0].lineno):
            first, last = cut.lineno - 1, (cut.end_lineno or 0) - 1
            before, after = lines[first][: cut.col_offset], lines[last][cut.end_col_offset :]
            line = before + replacement + after
            lines[first : last + 1] = [line] if line.strip() else []
            shared_line |= bool((before + after).strip())
        code = b"".join(lines)
        if shared_line:
            _parse(code)  # the rest of a line that a docstring shared with code may be invalid
    except (SyntaxError, ValueError):
        return "", ""
    return "\n\n".join(docstrings), code.decode()


def _parse(source: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes in code that is not ours
        return ast.parse(source)


def _topics() -> Iterator[str]:
    """Yield the topics of the language reference, which `help("topics")` lists."""
    file = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    if file.is_file():
        for node in _parse(file.read_bytes()).body:
            if isinstance(node, ast.Assign):
                yield from ast.literal_eval(node.value).values()


def _write(file: Path, records: Iterable[dict[str, str]], limit: float) -> None:
    """Write records to a jsonl file until their text has `limit` bytes."""
    size = 0
    with file.open("w", encoding="utf-8") as stream:
        for record in records:
            size += sum(len(text.encode()) for text in record.values())
            if size > limit:
                return
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
