"""What HTML reports share: the look of the page, its top, and tables."""

from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #d9dee7; --paper: #fff; --card: #f6f8fb;
  --error: #c62f2f; --warning: #b06a00; --pass: #1f7a46; --accent: #2563a8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a2b3; --line: #333c4a; --paper: #14181f;
  --card: #1c222c; --error: #ff7b72; --warning: #f0b04f; --pass: #56c88a; --accent: #7ab2f4; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1200px; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .8rem; } h3 { font-size: 1rem; }
.soft { color: var(--soft); } .error { color: var(--error); } .warning { color: var(--warning); }
.pass { color: var(--pass); } td > span { white-space: nowrap; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.5rem 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1.2rem; }
.figures b { display: block; font-size: 1.5rem; line-height: 1.2; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem .35rem 0; vertical-align: top;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } .scroll td, .scroll th { white-space: nowrap; overflow-wrap: normal; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } .flagged { background: #f0b04f33; }
details { border: 1px solid var(--line); border-radius: 8px; padding: .5rem 1rem; margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; } code { font-size: .9em; }
.sheet { display: flex; flex-wrap: wrap; gap: 3px; align-items: center; margin: .25rem 0 .6rem; }
.sheet img { width: 160px; border-radius: 3px; display: block; } .sheet span { width: 100%; font-size: .8rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: .8rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5rem; }
figcaption { font-size: .8rem; color: var(--soft); } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 10px system-ui, sans-serif; } svg .axis { stroke: var(--line); }
svg .bar { fill: var(--accent); } figure img { width: 100%; display: block; }
"""


def write_page(path: str, title: str, sections: list[str]):
    """Writes sections of HTML as a page of its own, which needs no network."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{"".join(sections)}</body></html>\n'
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def html_table(columns: list[str], rows: list[list[str]], numbers: range = range(0), flagged: set = frozenset()) -> str:
    """Cells are HTML already. numbers: columns set flush right. flagged: rows set off."""
    classes = ['<{0} class="number">' if i in numbers else "<{0}>" for i in range(len(columns))]
    header = "".join(f"{classes[i].format('th')}{name}</th>" for i, name in enumerate(columns))
    body = ""
    for r, row in enumerate(rows):
        cells = "".join(f"{classes[i].format('td')}{cell}</td>" for i, cell in enumerate(row))
        body += f'<tr class="flagged">{cells}</tr>' if r in flagged else f"<tr>{cells}</tr>"
    return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def headline(heading: str, title: str, figures: list[tuple[str, str, str]]) -> str:
    """The top of a page. figures: value, what it is, class ("", "pass", "warning" or "error")."""
    boxes = "".join(f'<div><b class="{kind}">{value}</b>{name}</div>' for value, name, kind in figures)
    return f'<h1>{heading}</h1><div class="soft">{escape(title)}</div><div class="figures">{boxes}</div>'
