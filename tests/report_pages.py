"""Parse reports, for tests."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from rmkv_cli.config import load_config


class Page(HTMLParser):
    """Contents of an HTML page: its elements, their attributes, and the texts of blocks, headings and cells."""

    BLOCKS = ("pre", "h1", "h2", "td", "th", "blockquote", "title", "p")

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], {block: [] for block in self.BLOCKS}
        self._open = []
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag in self.BLOCKS:
            self._open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        if tag in self.BLOCKS:
            self._open.remove(tag)

    def handle_data(self, data):
        for tag in self._open:
            self.texts[tag][-1] += data

    def values(self, name):
        """Return the values of an attribute on all elements."""
        return [value for _, attribute, value in self.attributes if attribute == name]


def section(markdown, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", markdown, re.MULTILINE | re.DOTALL)[1]


def records_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_records(run, records):
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def data_of(run):
    return Path(load_config(run / "config.toml").train.data)
