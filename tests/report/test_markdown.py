"""Markdown shows any text literally."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from report_pages import Page

from rmkv_cli.markdown import CONTROLS, code, escape, span, table

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]) | st.sampled_from("`*_[]<>|~#&\\!\n\t()1. -$"))
NASTY = "<script>alert(1)</script> &amp; `a` ``b`` | ~~c~~ [d](e) ![f](g) <http://h.i> *j* __k__ \\ # l"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"

    def show(markdown):
        path.write_text(MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown), encoding="utf-8")
        return Page(path)

    return show


def one_line(text):
    return " ".join(text.split())


@settings(deadline=None)
@given(TEXTS)
@example(NASTY)
@example("- a")
@example("````\n```")
def test_words_cells_and_code_survive_rendering(shown, text):
    page = shown(f"# x {escape(text)} x")
    assert [one_line(heading) for heading in page.texts["h1"]] == [one_line(f"x {text} x")]
    page = shown(table(["a", text], [["x" + text + "x", "1"], ["b", text]]))
    assert [one_line(cell) for cell in page.texts["td"]] == [one_line(f"x{text}x"), "1", "b", one_line(text)]
    assert one_line(shown(f"so: {span(f'x{text}')}").texts["p"][0]) == one_line(f"so: x{text}")
    assert shown(code(text, "text")).texts["pre"] == [f"{text}\n"]
    for markdown in (escape(text), table(["a"], [[text]]), code(text, "text"), span(text)):
        assert not {"script", "a", "img", "em", "strong"} & set(shown(f"x\n\n{markdown}").tags)


def test_control_characters_become_visible_symbols():
    assert code("\x1b[31m\x00\x9b\n\t", "text") == "```text\n␛[31m␀\ufffd\n\t\n```"
    assert escape("a\x07b") == "a␇b"
    assert "\n" not in map(chr, CONTROLS)


def test_ordinary_names_stay_readable():
    assert escape("learning_rate 3e-4, story-1.txt (v2)") == "learning_rate 3e-4, story-1.txt (v2)"
