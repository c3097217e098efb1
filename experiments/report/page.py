"""Writes pages from the templates next to this file, each as Markdown, as HTML or as both.

A template such as `run.jinja` says what is on a page. `page.md` and `page.html` say what its headings, tables and
figures look like. No name from a file can become markup: HTML is escaped by jinja2, Markdown by `words.markdown`.
"""

import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.report import words


class Figures:
    """Draws each figure of a folder once, for all pages that show it."""

    def __init__(self, folder: Path):
        self.folder, self.drawn = folder, set[str]()

    def __call__(self, file: str, draw: Callable, *arguments: Any) -> Path:
        """Write a file by draw(*arguments, path=...) if it is not drawn yet; return its path."""
        path = self.folder / file
        if file not in self.drawn:
            draw(*arguments, path=path)
        self.drawn.add(file)
        return path


def render(template: str, kind: str, drawn: Figures, **values: Any) -> str:
    """The page of a template as Markdown or as one self-contained HTML page, by kind: "md" or "html".

    drawn: draws the figures into the folder of the page; values: what the template shows, `title` among them.
    """
    page = _environment(kind).get_template(f"page.{kind}")
    text = page.render(template=f"{template}.jinja", drawn=drawn, contents=[], **values)
    return re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n"


@cache
def _environment(kind: str) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=words.markdown if kind == "md" else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {one.__name__: one for one in FILTERS}
    return environment


def anchor(title: str) -> str:
    """The name of a heading in the address of a page."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def base64(path: Path) -> str:
    """The content of a file as HTML holds it."""
    return b64encode(path.read_bytes()).decode()


def filled(rows: Sequence[Sequence], header: Sequence[str]) -> list[list[str]]:
    """The cells of a table, header first, without the columns that have no value in any row."""
    cells = [[words.cell(value) for value in row] for row in rows]
    kept = [i for i in range(len(header)) if i == 0 or not rows or any(row[i] != words.NO_VALUE for row in cells)]
    return [[row[i] for i in kept] for row in [list(header), *cells]]


FILTERS = (anchor, base64, filled, words.counted, words.markdown, words.number, words.percent)
