"""The site made of these pages, by Sphinx; `make docs` builds it. Its navigation is the list in index.md."""

import re

from sphinx.application import Sphinx

project = "RMKV"
extensions = ["myst_parser"]
myst_heading_anchors = 3  # as on GitHub
smartquotes = False

html_theme = "furo"
html_title = "RMKV"
html_copy_source = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}


def add_navigation(_: Sphinx, page: str, source: list[str]) -> None:
    """Append to index.md, for each of its headings with a list of pages, a table of contents of these pages."""
    if page == "index":
        for heading in re.split(r"^## ", source[0], flags=re.MULTILINE)[1:]:
            caption, _, text = heading.partition("\n")
            if pages := re.findall(r"^- \[.*?\]\(([\w-]+)\.md\)", text, re.MULTILINE):
                entries = "\n".join(pages)
                source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def setup(app: Sphinx) -> None:
    """Register the above with Sphinx."""
    app.connect("source-read", add_navigation)
