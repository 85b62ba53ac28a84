"""HTML pages that need no other file: text, tables, block maps and vector figures that follow light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from .tables import Column, Table, ranges

# What figures are drawn in: ours; what is there without being looked at; grid lines; blocks that stay.
BLUE, MUTE, LINE, PALE, BLACK = "#0072b2", "#b4bcc6", "#e3e6ea", "#eeeeee", "#000000"

# It becomes a colour of the page, which is another one in the dark.
_COLOURS = {
    BLUE: "var(--accent)",
    BLACK: "var(--ink)",
    MUTE: "var(--mute)",
    LINE: "var(--line)",
    PALE: "var(--line)",
    "#b0b0b0": "var(--line)",  # matplotlib's own grid
    "#ffffff": "var(--paper)",
}
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#5b6470;--mute:#b4bcc6;--line:#e3e6ea;--panel:#f6f8fa;
--accent:#0b67b8;--tint:#e9f2fb;--merged:#009e73}
@media(prefers-color-scheme:dark){:root{--paper:#13161a;--ink:#e6e9ed;--soft:#98a2ad;--mute:#59636e;--line:#2a3038;
--panel:#1a1f25;--accent:#62b0f7;--tint:#16283b}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:64rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:clamp(1.5rem,4.2vw,2.3rem);line-height:1.22;letter-spacing:-.015em;margin:.3rem 0 .8rem;
text-wrap:balance}
h2{font-size:1.15rem;margin:0}
p{max-width:46rem}
.kicker,.soft,figcaption,dt{color:var(--soft)}
.kicker{font-size:.9rem;margin:0}
p.soft{font-size:.92rem}
.wide svg,.narrow svg{width:100%}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:.9rem;margin:1.8rem 0}
.tile{background:var(--panel);border-radius:.7rem;padding:1rem 1.2rem}
.tile b{display:block;white-space:nowrap;font-size:1.6rem;line-height:1.2;
font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.tile span{color:var(--soft);font-size:.92rem}
figure{margin:1.5rem 0}
figcaption{font-size:.9rem;max-width:46rem}
svg{display:block;max-width:100%;height:auto}
svg text{fill:var(--ink);font-family:system-ui,-apple-system,"Segoe UI",sans-serif!important}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch;background:linear-gradient(90deg,var(--paper) 40%,transparent)
0/2.5rem 100%,linear-gradient(270deg,var(--paper) 40%,transparent) 100%/2.5rem 100%,linear-gradient(90deg,var(--mute),
transparent) 0/.7rem 100%,linear-gradient(270deg,var(--mute),transparent) 100%/.7rem 100%;background-repeat:no-repeat;
background-attachment:local,local,scroll,scroll}
.scroll svg{min-width:34rem}
.narrow{display:none}
@media(max-width:600px){.wide{display:none}.narrow{display:block}main{padding-top:1.5rem}}
details{border-top:1px solid var(--line);padding:.9rem 0}
summary{cursor:pointer;list-style-position:outside}
summary h2{display:inline}
summary .soft{margin-left:.5rem;font-size:.92rem}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;margin:.9rem 0;min-width:100%}
th,td{padding:.32rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:500;vertical-align:bottom}
.word{text-align:left}
.word:not(:first-child){white-space:normal;min-width:7rem}
.ours td{background:var(--tint)}
.ours td:first-child{box-shadow:inset 3px 0 var(--accent);font-weight:600}
.map{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.3rem .9rem;align-items:center;
font-size:.88rem;margin:1rem 0}
.map h3{grid-column:1/-1;font-size:.95rem;margin:.8rem 0 0}
.map svg{width:100%;height:.95rem}
.map .ours{font-weight:600}
.map span{overflow-wrap:anywhere}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .35em 0 1em;vertical-align:-.05em}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.2rem;font-size:.92rem;margin:1rem 0}
dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--panel);border-radius:.6rem;padding:.9rem 1.1rem;font-size:.84rem;line-height:1.5;
white-space:pre-wrap;overflow-wrap:anywhere}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page. parts: HTML, one after the other."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
    )
    return "\n".join([head, *parts, "</main></body></html>"]) + "\n"


def header(kicker: str, headline: str, below: str = "") -> str:
    """What the page says first."""
    text = f'<p class="kicker">{html.escape(kicker)}</p><h1>{html.escape(headline)}</h1>'
    return text + (f"<p>{html.escape(below)}</p>" if below else "")


def tiles(numbers: Sequence[tuple[str, str]]) -> str:
    """Large numbers side by side, each with what it says."""
    inside = []
    for number, words in numbers:
        inside.append(f'<div class="tile"><b>{html.escape(number)}</b><span>{html.escape(words)}</span></div>')
    return f'<div class="tiles">{"".join(inside)}</div>'


def section(title: str, parts: Sequence[str], note: str = "", shown: bool = False) -> str:
    """Parts under a heading that folds them."""
    aside = f'<span class="soft">{html.escape(note)}</span>' if note else ""
    opened = " open" if shown else ""
    return f"<details{opened}><summary><h2>{html.escape(title)}</h2>{aside}</summary>\n{''.join(parts)}</details>"


def paragraph(text: str) -> str:
    return f'<p class="soft">{html.escape(text)}</p>'


def html_table(table: Table, marked: Sequence[int] = ()) -> str:
    """Headings and rows, some of them marked; the caption below."""
    headings = [column.heading for column in table.columns]
    lines = ['<div class="scroll"><table>', f"<tr>{_html_cells('th', headings, table.columns)}</tr>"]
    for number, row in enumerate(table.rows):
        opening = "<tr class=ours>" if number in marked else "<tr>"
        lines.append(f"{opening}{_html_cells('td', row, table.columns)}</tr>")
    lines.append("</table></div>")
    return "\n".join(lines) + (paragraph(table.caption) if table.caption else "")


def _html_cells(tag: str, cells: Sequence[str], columns: Sequence[Column]) -> str:
    """The cells of a row, words at the left. tag: th for headings, td for the rest."""
    parts = []
    for cell, column in zip(cells, columns, strict=True):
        text, place = html.escape(cell), ""
        if column.words:
            text, place = text.replace(",", ",<wbr>"), ' class="word"'  # lists of blocks may be wrapped
        parts.append(f"<{tag}{place}>{text}</{tag}>")
    return "".join(parts)


def block_strip(removed: Sequence[int], depth: int, merged: Sequence[int] = ()) -> str:
    """The blocks of a model as cells in a row: those that are removed filled, those with merged weights in green."""
    cells = []
    for block in range(depth):
        colour = "var(--accent)" if block in removed else "var(--merged)" if block in merged else "var(--line)"
        cells.append(f'<rect x="{block}.08" width=".84" height="1" rx=".12" fill="{colour}"/>')
    label = f"removed: {ranges(removed) or 'none'}"
    return (
        f'<svg viewBox="0 0 {depth} 1" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f"<title>{label}</title>{''.join(cells)}</svg>"
    )


def block_map(lines: Sequence[tuple[str, str, bool]]) -> str:
    """Names beside their strips. lines: (name, strip, whether it is ours); a name without a strip is a heading."""
    parts = []
    for name, strip, ours in lines:
        text = html.escape(name)
        if strip:
            parts.append(f"<span{' class=ours' if ours else ''}>{text}</span>{strip}")
        else:
            parts.append(f"<h3>{text}</h3>")
    return f'<div class="map">{"".join(parts)}</div>'


def facts(values: Mapping[str, str]) -> str:
    """Headings beside what is said below them."""
    items = [f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in values.items()]
    return f"<dl>{''.join(items)}</dl>"


def code(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def figure(drawing: Figure, name: str, caption: str, *, narrow: Figure | None = None) -> str:
    """A drawing with its caption; where the page is narrow, another one, or one that can be moved."""
    drawn = vector(drawing, name)
    if narrow is None:
        shown = f'<div class="scroll">{drawn}</div>'
    else:
        shown = f'<div class="wide">{drawn}</div><div class="narrow">{vector(narrow, name + "-narrow")}</div>'
    return f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>"


def vector(drawing: Figure, name: str) -> str:
    """A drawing as SVG to stand inside a page: text stays text, colours are those of the page.

    name: makes the identifiers inside differ from those of other drawings.
    """
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        drawing.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})

    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # a page needs none
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for drawn, shown in _COLOURS.items():
        text = text.replace(drawn, shown)
    return text
