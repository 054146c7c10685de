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
from .page import headline, html_table, write_page


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
    write_page(path, f"Dataset report: {title}", sections)


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
    return headline("Dataset report", title, figures)


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
        table = html_table(["", "file", "where", "expected", "found", "what to do"], rows)
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
        parts.append(f'<h3>{label}</h3><div class="scroll">{html_table(columns, rows, range(7), flagged)}</div>')
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
        table = html_table([unit, "text"], rows) if rows else '<p class="soft">None.</p>'
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
    table = html_table(["episode", "frames", "sim", "lag", "cameras", "findings"], rows, flagged=flagged)
    note = f"In {escape(folder)}. Lag: frames by which the states follow the actions, where that is clear."
    return f'<h2>Episodes</h2><p class="soft">{note}</p>{table}'
