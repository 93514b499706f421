"""Read a page back: its tags, its text and its scripts."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from farss.report import write_report


class Page(HTMLParser):
    """Tags, attributes and text of a page; the contents of its scripts apart."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = tag
            self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif not self.inside:
            self.text.append(data)

    @property
    def words(self) -> str:
        """The page's text with single spaces."""
        return " ".join(" ".join(self.text).split())

    @property
    def ids(self) -> set[str | None]:
        """The sections that are there."""
        return {attrs.get("id") for tag, attrs in self.tags if tag == "section"}


def draw(folder: Path) -> Page:
    """Write and read a report, without its figures as files."""
    return Page(write_report(folder, figures=False))
