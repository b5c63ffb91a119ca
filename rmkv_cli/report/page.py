"""Rendering of the report's Markdown as a self-contained HTML page."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict


def anchor(title: str) -> str:
    """Return the id of a heading, for links."""
    return title.lower().replace(" ", "-")


def page(markdown: str, title: str, pictures: Mapping[str, str]) -> str:
    """Return the HTML page, with `pictures` (SVG by file name) in place of the images in the Markdown.

    HTML in the Markdown is escaped.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    for rule in (image, heading_open, table_open, table_close):
        parser.add_render_rule(rule.__name__, rule)
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body=parser.render(markdown, {"pictures": pictures}))


def image(_: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, env: Any) -> str:
    """Render an image as the SVG of that name."""
    svg: str = env["pictures"][tokens[at].attrs["src"]]
    return svg


def heading_open(renderer: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, env: Any) -> str:
    """Render the start of a heading, with its id."""
    tokens[at].attrSet("id", anchor(tokens[at + 1].content))
    return renderer.renderToken(tokens, at, options, env)


def table_open(renderer: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, env: Any) -> str:
    """Render the start of a table, inside an element that scrolls if the table is wider than the screen."""
    return f'<div class="wide" tabindex="0">{renderer.renderToken(tokens, at, options, env)}'


def table_close(renderer: RendererHTML, tokens: Sequence[Token], at: int, options: OptionsDict, env: Any) -> str:
    """Render the end of a table."""
    return f"{renderer.renderToken(tokens, at, options, env)}</div>"
