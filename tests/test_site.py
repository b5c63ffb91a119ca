"""The site builds from the pages, has no broken links, needs no network, and its references match the code."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rmkv_cli.config import Config, DataRecipe, Filters, QuantizationConfig, Sampling, Section, Slot, Stage, Writer
from rmkv_cli.config.load import EXERCISES, SOURCES, MixConfig
from rmkv_cli.config.mix import Phase

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def build(docs, out):
    """Build a folder of pages as `make docs` does."""
    command = [sys.executable, "-m", "sphinx", "-qEW", docs, out]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(DOCS, out)
    assert (done.returncode, done.stderr) == (0, "")
    return out


@pytest.mark.slow
def test_every_page_is_built_and_in_the_navigation_of_each(site):
    assert {path.stem for path in PAGES} <= {path.stem for path in site.glob("*.html")}
    navigation = re.search(r'<div class="sidebar-tree">.*?</div>', (site / "cli.html").read_text(), re.DOTALL)[0]
    linked = {name or "cli" for name in re.findall(r'href="([\w-]*)(?:\.html)?#?"', navigation)}
    assert linked == {path.stem for path in PAGES} - {"index"}


def test_it_takes_nothing_from_another_host(site):
    taken = set()
    for page in site.rglob("*.html"):
        text = page.read_text()
        taken |= set(re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]*)"', text))
        taken |= set(re.findall(r'<link\b[^>]*\bhref="([^"]*)"', text))
    for sheet in site.rglob("*.css"):
        taken |= set(re.findall(r"""(?:url\(|@import )["']?([^"')]*)""", sheet.read_text()))
    assert any(name.endswith("memory.svg") for name in taken)
    assert any(".css" in name for name in taken)
    assert [name for name in taken if re.match(r"(\w+:)?//", name)] == []


@pytest.mark.slow
def test_broken_links_are_errors(tmp_path):
    for name in ("conf.py", "cli.md"):
        shutil.copy(DOCS / name, tmp_path)
    text = "# A\n\n## B\n\n- [C](cli.md): D\n\n[c](cli.md#rmkv-train)\n"
    (tmp_path / "index.md").write_text(text)
    assert build(tmp_path, tmp_path / "right").returncode == 0
    wrong = "[1](absent.md) [2](cli.md#no-such-part) [3](#nor-this) ![4](absent.svg)\n"
    (tmp_path / "index.md").write_text(text + wrong)
    done = build(tmp_path, tmp_path / "wrong")
    assert done.returncode != 0
    for output in ("absent.md", "no-such-part", "nor-this", "absent.svg"):
        assert output in done.stderr


def test_a_page_that_is_not_in_the_navigation_is_an_error(tmp_path):
    shutil.copy(DOCS / "conf.py", tmp_path)
    (tmp_path / "index.md").write_text("# A\n")
    (tmp_path / "lost.md").write_text("# B\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "lost.md" in done.stderr


def test_the_links_of_the_readme_exist():
    links = re.findall(r"\]\(([^)]*)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 5
    for link in links:
        assert urlsplit(link).scheme or (ROOT / link.partition("#")[0]).is_file(), link


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_external_links_are_absolute(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\((\w+:[^)]*)\)", text):
        parts = urlsplit(link)
        assert parts.scheme == "https", link
        assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc), link
        assert not re.search(r"[\s<>]|[.,;]$", link), link


def sections(kind=Config):
    yield kind
    for field in kind.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation)


def test_every_key_of_the_config_is_in_its_reference():
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    documented = {row[0].strip("`") for row in rows}
    recipe = [DataRecipe, Writer, Slot, Sampling, Filters]
    kinds = [*sections(), Stage, MixConfig, Phase, *SOURCES.values(), *EXERCISES.values(), QuantizationConfig, *recipe]
    headings = {
        "model",
        "train",
        "memory",
        "rope",
        "adapter",
        "quantization",
        "teacher",
        "stages",
        "phases",
        "sources",
    } | {"rollouts", "tasks"}
    headings |= {"kind", "writer", "slots", "sampling", "filters", "rollouts", "tasks"}
    keys = {key for kind in kinds for key in kind.model_fields}
    assert len(keys) > 80
    assert keys - headings == documented - headings
    assert all(row[-1] for row in rows)
    assert all(f'kind = "{kind}"' in page for kind in [*SOURCES, *EXERCISES])


@pytest.mark.parametrize("name", ["cli", "config"])
def test_an_outdated_reference_is_detected(tmp_path, name):
    for file in [*DOCS.glob("make_*.py"), DOCS / "cli.md", DOCS / "configuration.md"]:
        shutil.copy(file, tmp_path)
    command = [sys.executable, tmp_path / f"make_{name}_reference.py", "--check"]
    page = tmp_path / {"cli": "cli.md", "config": "configuration.md"}[name]
    subprocess.run(command, check=True, capture_output=True)
    page.write_text(page.read_text().replace("seed", "sead"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"{page} is not up to date: run `make docs`\n"
