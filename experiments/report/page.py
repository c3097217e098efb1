"""A document as a list of blocks, which can be written as Markdown or as one self-contained HTML page."""

import base64
import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EMPTY = ("-", "")  # cells without a value; a column of them is left out


class Blocks(list[tuple[str, Any]]):
    """A report as a list of (kind, content): rendered to Markdown and to HTML."""

    def heading(self, level: int, text: str) -> None:
        self.append(("heading", (level, text)))

    def text(self, text: str) -> None:
        self.append(("text", text))

    def verdict(self, text: str) -> None:
        """The result in words, set apart."""
        self.append(("verdict", text))

    def table(self, caption: str, header: list[str], rows: list[list[str]]) -> None:
        """A table, without the columns that are empty in every row."""
        kept = [i for i in range(len(header)) if i == 0 or not rows or any(row[i] not in EMPTY for row in rows)]
        cut = [[row[i] for i in kept] for row in [header, *rows]]
        self.append(("table", (caption, cut[0], cut[1:])))

    def code(self, text: str) -> None:
        self.append(("code", text))

    def figure(self, path: Path, caption: str) -> None:
        self.append(("figure", (path, caption)))

    @contextmanager
    def folded(self, summary: str) -> Iterator[None]:
        """What is added inside is shown only when the reader opens it."""
        self.append(("fold", summary))
        yield
        if self[-1] == ("fold", summary):
            self.pop()  # nothing was added
        else:
            self.append(("end of fold", None))


def to_markdown(blocks: Blocks, folder: Path) -> str:
    """Markdown that links the figures by paths relative to the folder."""
    parts = []
    for kind, content in blocks:
        if kind == "heading":
            parts.append("#" * content[0] + " " + content[1])
        elif kind == "text":
            parts.append(content)
        elif kind == "verdict":
            parts.append(f"**{content}**")
        elif kind == "code":
            parts.append(f"```\n{content}\n```")
        elif kind == "figure":
            parts.append(f"![{content[1]}]({content[0].relative_to(folder).as_posix()})\n\n*{content[1]}*")
        elif kind == "fold":
            parts.append(f"<details><summary>{html.escape(content)}</summary>")
        elif kind == "end of fold":
            parts.append("</details>")
        else:
            caption, header, rows = content
            lines = [header, ["---"] * len(header), *rows]
            lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]  # a bare | would end the cell
            parts.append(f"*{caption}*\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


STYLE = """
:root { --ink: #222; --paper: #fff; --line: #ddd; --quiet: #666; --code: #f4f4f4; --accent: #1f6fb4; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #16181b; --line: #3a3d41; --quiet: #9a9a9a;
  --code: #22252a; --accent: #6db1ea; } img { filter: invert(.88) hue-rotate(180deg); } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
nav { font-size: .85rem; padding: 1rem; } nav a { display: block; color: var(--quiet); padding: .15rem 0; }
nav a { text-decoration: none; } nav a:hover { color: var(--accent); }
h1, h2, h3 { line-height: 1.25; margin: 2.4rem 0 .8rem; } h1 { margin-top: .5rem; }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--accent); padding: .2rem 0 .2rem 1rem; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
.caption, figcaption { font-size: .88rem; color: var(--quiet); margin: 1.2rem 0 .4rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid var(--quiet); }
.wide { overflow-x: auto; margin-bottom: 1.2rem; } figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
pre { background: var(--code); padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .84rem; }
details { border-top: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
@media (min-width: 80rem) { body { display: grid; grid-template-columns: 14rem minmax(0, 1fr); }
  nav { position: sticky; top: 0; height: 100vh; overflow-y: auto; box-sizing: border-box; padding-top: 2rem; } }
@media (max-width: 80rem) { nav { border-bottom: 1px solid var(--line); columns: 12rem; } }
@media print { nav { display: none; } body { display: block; font-size: 11px; } figure, tr { break-inside: avoid; } }
"""
OPEN_TO_PRINT = 'addEventListener("beforeprint",()=>document.querySelectorAll("details").forEach(d=>d.open=true))'


def to_html(blocks: Blocks, title: str) -> str:
    """One self-contained HTML page that includes the figures, with its contents at the side."""

    def cells(tag: str, row: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    parts, contents = [], []
    for kind, content in blocks:
        if kind == "heading":
            level, text = content
            anchor = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
            parts.append(f'<h{level} id="{anchor}">{html.escape(text)}</h{level}>')
            if level == 2:
                contents.append(f'<a href="#{anchor}">{html.escape(text)}</a>')
        elif kind == "text":
            parts.append(f"<p>{html.escape(content)}</p>")
        elif kind == "verdict":
            parts.append(f'<p class="verdict">{html.escape(content)}</p>')
        elif kind == "code":
            parts.append(f"<pre>{html.escape(content)}</pre>")
        elif kind == "figure":
            data, caption = base64.b64encode(content[0].read_bytes()).decode(), html.escape(content[1])
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        elif kind == "fold":
            parts.append(f"<details><summary>{html.escape(content)}</summary>")
        elif kind == "end of fold":
            parts.append("</details>")
        else:
            caption, header, rows = content
            parts.append(
                f'<p class="caption">{html.escape(caption)}</p><div class="wide"><table><thead>{cells("th", header)}'
                f"</thead><tbody>{''.join(cells('td', row) for row in rows)}</tbody></table></div>"
            )
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><script>{OPEN_TO_PRINT}</script>"
    )
    body = f"<nav>{''.join(contents)}</nav>\n<main>\n" + "\n".join(parts) + "\n</main>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
