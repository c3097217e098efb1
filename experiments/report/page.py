"""A document as a list of blocks, which can be written as Markdown or as one self-contained HTML page."""

import base64
import html
from pathlib import Path
from typing import Any


class Blocks(list[tuple[str, Any]]):
    """A report as a list of (kind, content): rendered to Markdown and to HTML."""

    def heading(self, level: int, text: str) -> None:
        self.append(("heading", (level, text)))

    def text(self, text: str) -> None:
        self.append(("text", text))

    def table(self, caption: str, header: list[str], rows: list[list[str]]) -> None:
        self.append(("table", (caption, header, rows)))

    def code(self, text: str) -> None:
        self.append(("code", text))

    def figure(self, path: Path, caption: str) -> None:
        self.append(("figure", (path, caption)))


def to_markdown(blocks: Blocks, folder: Path) -> str:
    """Markdown that links the figures by paths relative to the folder."""
    parts = []
    for kind, content in blocks:
        if kind == "heading":
            parts.append("#" * content[0] + " " + content[1])
        elif kind == "text":
            parts.append(content)
        elif kind == "code":
            parts.append(f"```\n{content}\n```")
        elif kind == "figure":
            parts.append(f"![{content[1]}]({content[0].relative_to(folder).as_posix()})\n\n*{content[1]}*")
        else:
            caption, header, rows = content
            lines = [header, ["---"] * len(header), *rows]
            lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]  # a bare | would end the cell
            parts.append(f"*{caption}*\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; margin-top: 2.2rem; } h1 { margin-top: 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
.caption, figcaption { font-size: .88rem; font-style: italic; margin: 1.2rem 0 .4rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #999; }
.wide { overflow-x: auto; margin-bottom: 1.2rem; } figure { margin: 1.5rem 0; } img { max-width: 100%; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; }
"""


def to_html(blocks: Blocks, title: str) -> str:
    """One self-contained HTML page that includes the figures."""

    def cells(tag: str, row: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    parts = []
    for kind, content in blocks:
        if kind == "heading":
            parts.append(f"<h{content[0]}>{html.escape(content[1])}</h{content[0]}>")
        elif kind == "text":
            parts.append(f"<p>{html.escape(content)}</p>")
        elif kind == "code":
            parts.append(f"<pre>{html.escape(content)}</pre>")
        elif kind == "figure":
            data, caption = base64.b64encode(content[0].read_bytes()).decode(), html.escape(content[1])
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        else:
            caption, header, rows = content
            parts.append(
                f'<p class="caption">{html.escape(caption)}</p><div class="wide"><table><thead>{cells("th", header)}'
                f"</thead><tbody>{''.join(cells('td', row) for row in rows)}</tbody></table></div>"
            )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
