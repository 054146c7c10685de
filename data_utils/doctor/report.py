"""The findings and what the dataset looks like, as one HTML file that needs no network."""

import base64
import os
from collections import Counter
from html import escape

import numpy as np

from ..motion import HIGH, LOW
from .diagnosis import KINDS, Diagnosis
from .drawings import bars, curves
from .examination import Examination

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #d9dee7; --paper: #fff; --card: #f6f8fb;
  --error: #c62f2f; --warning: #b06a00; --accent: #2563a8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a2b3; --line: #333c4a; --paper: #14181f;
  --card: #1c222c; --error: #ff7b72; --warning: #f0b04f; --accent: #7ab2f4; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1200px; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .8rem; } h3 { font-size: 1rem; }
.soft { color: var(--soft); } .error { color: var(--error); } .warning { color: var(--warning); }
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
svg .bar { fill: var(--accent); }
"""


def write_report(path: str, examination: Examination, findings: list[Diagnosis], title: str):
    """Writes the report. Every text that comes from a file is escaped."""
    sections = [
        _headline(examination, findings, title),
        _findings(findings),
        _lengths(examination),
        _ranges(examination, findings),
        _trajectories(examination),
        _texts(examination),
        _contact_sheets(examination),
        _episodes(examination, findings),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Dataset report: {escape(title)}</title><style>{STYLE}</style>"
    )
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{"".join(sections)}</body></html>\n'
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def _table(columns: list[str], rows: list[list[str]], numbers: range = range(0), flagged: set = frozenset()) -> str:
    """Cells are HTML already. numbers: columns set flush right. flagged: rows set off."""
    classes = ['<{0} class="number">' if i in numbers else "<{0}>" for i in range(len(columns))]
    header = "".join(f"{classes[i].format('th')}{name}</th>" for i, name in enumerate(columns))
    body = ""
    for r, row in enumerate(rows):
        cells = "".join(f"{classes[i].format('td')}{cell}</td>" for i, cell in enumerate(row))
        body += f'<tr class="flagged">{cells}</tr>' if r in flagged else f"<tr>{cells}</tr>"
    return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def _headline(examination: Examination, findings: list[Diagnosis], title: str) -> str:
    summaries = examination.summaries.values()
    errors = sum(finding.is_error for finding in findings)
    cameras = {camera for summary in summaries for camera in summary.cameras}
    figures = [
        (f"{len(summaries):,}", "episodes", ""),
        (f"{sum(summary.length for summary in summaries):,}", "frames", ""),
        (str(len(cameras)), "cameras", ""),
        (str(errors), "errors", "error" if errors else ""),
        (str(len(findings) - errors), "warnings", "warning" if len(findings) > errors else ""),
    ]
    boxes = "".join(f'<div><b class="{kind}">{value}</b>{name}</div>' for value, name, kind in figures)
    return f'<h1>Dataset report</h1><div class="soft">{escape(title)}</div><div class="figures">{boxes}</div>'


def _findings(findings: list[Diagnosis]) -> str:
    if not findings:
        return "<h2>Findings</h2><p>None. Nothing looks wrong with this dataset.</p>"
    parts = []
    for kind, heading in KINDS.items():
        of_kind = [finding for finding in findings if finding.kind == kind]
        if not of_kind:
            continue
        rows = []
        for f in of_kind:
            level = "error" if f.is_error else "warning"
            texts = [escape(text) for text in (f.path, f.where, f.expected, f.found, f.advice)]
            rows.append([f'<span class="{level}">{level}</span>', *texts])
        table = _table(["", "file", "where", "expected", "found", "what to do"], rows)
        parts.append(f"<details open><summary>{heading} ({len(of_kind)})</summary>{table}</details>")
    return f"<h2>Findings</h2>{''.join(parts)}"


def _lengths(examination: Examination) -> str:
    lengths = [summary.length for summary in examination.summaries.values() if summary.length]
    if not lengths:
        return ""
    text = f"Shortest {min(lengths)}, median {np.median(lengths):.0f}, longest {max(lengths)} frames."
    return f"<h2>Episode lengths</h2><p>{text}</p><figure>{bars(lengths)}</figure>"


def _ranges(examination: Examination, findings: list[Diagnosis]) -> str:
    parts = []
    for name, label in (("action", "action"), ("qpos", "observations/qpos")):
        sound = [s for s in examination.summaries.values() if getattr(s, f"{name}_motion") is not None]
        dims = Counter(getattr(s, name).dim for s in sound).most_common(1)
        sound = [s for s in sound if getattr(s, name).dim == dims[0][0]]
        if not sound:
            continue
        moments = [getattr(s, name) for s in sound]
        total = sum(moments[1:], start=moments[0])
        motion = np.stack([getattr(s, f"{name}_motion") for s in sound])  # (E, 7, D)
        # of all frames, from each episode's own; exact when episodes are alike
        low, high = np.median(motion[:, LOW], axis=0), np.median(motion[:, HIGH], axis=0)
        flagged = {d for d in range(total.dim) if any(_is_about(finding, label, d) for finding in findings)}
        rows = [
            [str(d), *(f"{value[d]:.4g}" for value in (total.min, low, total.mean, high, total.max, total.std))]
            for d in range(total.dim)
        ]
        columns = ["dimension", "minimum", "1 %", "mean", "99 %", "maximum", "std"]
        parts.append(f'<h3>{label}</h3><div class="scroll">{_table(columns, rows, range(7), flagged)}</div>')
    note = "1 % and 99 % are the medians of the episodes' quantiles. Dimensions with findings are set off."
    return f'<h2>Ranges</h2><p class="soft">{note}</p>{"".join(parts)}' if parts else ""


def _is_about(finding: Diagnosis, label: str, dimension: int) -> bool:
    name, _, dims = finding.where.partition("dimension")
    return name.startswith(label) and str(dimension) in dims.removeprefix("s").replace(",", " ").split()


def _trajectories(examination: Examination) -> str:
    looks = [examination.looks[path] for path in examination.shown if path in examination.looks]
    parts = []
    for name in ("action", "qpos"):
        tracks = [look.tracks[name] for look in looks if name in look.tracks]
        if not tracks:
            continue
        panels = "".join(
            f"<figure>{curves([(rows, values[:, d]) for rows, values in tracks if values.shape[1] > d])}"
            f"<figcaption>{name}, dimension {d}</figcaption></figure>"
            for d in range(max(values.shape[1] for _, values in tracks))
        )
        parts.append(f'<h3>{name} over frames, {len(tracks)} episodes</h3><div class="panels">{panels}</div>')
    return f"<h2>Trajectories</h2>{''.join(parts)}" if parts else ""


def _texts(examination: Examination) -> str:
    instructions = Counter(text for s in examination.summaries.values() for text in s.instructions)
    reasonings = sum((look.reasonings for look in examination.looks.values()), Counter())
    parts = []
    for heading, unit, texts in (("Instructions", "episodes", instructions), ("Reasonings", "texts", reasonings)):
        rows = [[f"{count:,}", escape(text) or "<i>(empty)</i>"] for text, count in texts.most_common(200)]
        more = f'<p class="soft">… and {len(texts) - 200} more</p>' if len(texts) > 200 else ""
        table = _table([unit, "text"], rows) if rows else '<p class="soft">None.</p>'
        parts.append(f"<h2>{heading} ({len(texts)} different)</h2>{table}{more}")
    return "".join(parts)


def _contact_sheets(examination: Examination) -> str:
    sheets = ""
    for path in examination.shown:
        look = examination.looks.get(path)
        rows = ""
        for camera, pictures in look.pictures.items() if look else ():
            encoded = [(t, base64.b64encode(data).decode()) for t, data in pictures]
            images = "".join(
                f'<img alt="frame {t}" title="frame {t}" src="data:image/jpeg;base64,{data}">' for t, data in encoded
            )
            rows += f'<div class="sheet"><span class="soft">{escape(camera)}</span>{images}</div>'
        if rows:
            sheets += f"<details open><summary>{escape(path)}</summary>{rows}</details>"
    return f"<h2>Contact sheets ({len(examination.shown)} episodes)</h2>{sheets}" if sheets else ""


def _episodes(examination: Examination, findings: list[Diagnosis]) -> str:
    counts = Counter(finding.path for finding in findings)
    rows, flagged = [], set()
    folder = os.path.commonpath(map(os.path.abspath, examination.paths))
    for number, (path, summary) in enumerate(examination.summaries.items()):
        name = path if len(examination.paths) == 1 else os.path.relpath(path, folder)
        lag = "" if summary.lag is None else str(summary.lag)
        cells = [name, str(summary.length), str(summary.sim), lag, ", ".join(summary.cameras), str(counts[path])]
        rows.append([escape(cell) for cell in cells])
        if counts[path]:
            flagged.add(number)
    table = _table(["episode", "frames", "sim", "lag", "cameras", "findings"], rows, flagged=flagged)
    note = f"In {escape(folder)}. Lag: frames by which the states follow the actions, where that is clear."
    return f'<h2>Episodes</h2><p class="soft">{note}</p>{table}'
