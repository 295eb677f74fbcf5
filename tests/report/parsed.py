"""A parsed report: what tests of the page ask it."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

from visor_jax.report.numbers import MINUS, TIMES
from visor_jax.report.page import write_report
from visor_jax.workdir.folder import Workdir

VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """A parsed page: tags, addresses, the text of every section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._section = "header"
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handle_data("" if tag == "wbr" else " ")
        if tag not in VOID:
            self._open.append(tag)
        given = dict(attrs)
        self.elements.append((tag, given))
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag == "section":
            self._section = given["id"] or ""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            return
        for typeset, typed in ((MINUS, "-"), (TIMES, "x"), ("\N{RIGHT SINGLE QUOTATION MARK}", "'")):
            data = data.replace(typeset, typed)
        self.sections[self._section] = self.sections.get(self._section, "") + data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.sections.values()).split())

    def section(self, name: str) -> str:
        return " ".join(self.sections[name].split())

    def pictures(self, kind: str) -> list[bytes]:
        start = f"data:image/{kind};base64,"
        return [base64.b64decode(a.removeprefix(start), validate=True) for a in self.addresses if a.startswith(start)]


def report_of(folder: Path) -> tuple[str, Page]:
    html = write_report(Workdir(folder)).read_text(encoding="utf-8")
    return html, Page(html)
