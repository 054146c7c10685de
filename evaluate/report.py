"""The judgement of a checkpoint as one HTML file that needs no network, and its pictures."""

import base64
import io
from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from data_utils.doctor.page import headline, html_table, write_page
from evaluate.judge import Check, Latency, is_go
from evaluate.measures import Measures, Replay, joint_names

RECORDED, PREDICTED, BASELINE = "#8a94a3", "#d9641e", "#2563a8"
MOST_MISTAKES = 12
MOST_LINES = 60  # that mark where chunks begin


def write_report(
    path: str,
    title: str,
    replays: list[Replay],
    measures: Measures,
    checks: list[Check],
    latency: Latency,
    rewards: dict[str, int],
):
    """Writes the page. Every text that comes from a file or a model is escaped; rewards: of recorded episodes."""
    sections = [
        _top(title, replays, measures, checks, latency),
        _checks(checks),
        _joints(measures),
        "<h2>Error over the chunk</h2>" + _picture(plot_horizon, measures, alt="error by step of the chunk"),
        _reasonings(measures),
        _rewards(rewards),
        "<h2>Predicted against recorded</h2>",
        *(_episode(replay, is_first=replay is replays[0]) for replay in replays),
    ]
    write_page(path, f"Open loop: {title}", sections)


def _top(title: str, replays: list[Replay], measures: Measures, checks: list[Check], latency: Latency) -> str:
    error = measures.share(measures.error)
    figures = [
        ("GO", "verdict", "pass") if is_go(checks) else ("NO-GO", "verdict", "error"),
        (str(len(replays)), "held-out episodes", ""),
        (f"{measures.queries:,}", "queries", ""),
        (f"{error:.1%}", "mean error, of the range", ""),
        (f"{error / max(measures.share(measures.holding), 1e-9):.2f}", "× that of holding still", ""),
        (f"{latency.p50:.0f} ms", f"a query (first {latency.first:.0f}, p99 {latency.p99:.0f})", ""),
    ]
    if measures.exact is not None:
        figures.insert(5, (f"{measures.exact:.0%}", "reasonings exact", ""))
    return headline("Open loop", title, figures)


def _checks(checks: list[Check]) -> str:
    rows = [
        [f'<span class="{check.level}">{check.level}</span>']
        + [escape(text) for text in (check.name, check.found, check.expected, check.advice)]
        for check in checks
    ]
    note = "One error is NO-GO. Replaying tells that a policy is broken; that it succeeds, only rollouts tell."
    return f'<h2>Checks</h2><p class="soft">{note}</p>' + html_table(
        ["", "check", "found", "expected", "what to do"], rows
    )


def _joints(m: Measures) -> str:
    columns = ["joint", "error", "95 %", "first step", "holding still", "constant", "of range", "jump ×", "jerk ×",
               "movement ×", "at limits", "stuck"]  # fmt: skip
    rows = []
    for i, joint in enumerate(m.joints):
        robot_units = [m.error[i], m.error_95[i], m.first_error[i], m.holding[i], m.constant[i]]
        ratios = [None if ratio is None else ratio[i] for ratio in (m.jump, m.jerk, m.movement)]
        judged = [f"{m.error[i] / m.span[i]:.1%}", *("" if ratio is None else f"{ratio:.1f}" for ratio in ratios)]
        cells = [*(f"{value:.4f}" for value in robot_units), *(judged if m.moving[i] else ["still", "", "", ""])]
        rows.append([joint, *cells, f"{m.limit[i]:.1%}", f"{m.stuck[i]:.1%}"])
    worse = {i for i in np.flatnonzero(m.moving) if not m.error[i] < m.holding[i]}
    note = (
        "Mean absolute error of the chunks in robot units, its 95th percentile, and that of a chunk's first "
        "step, beside two baselines: holding still, and the best constant action. × are multiples of the recording's; "
        "stuck: at the limits of the statistics while the recording is elsewhere. "
        "Joints that are not predicted better than by holding still are set off."
    )
    table = html_table(columns, rows, range(1, len(columns)), worse)
    return f'<h2>Joints</h2><p class="soft">{note}</p><div class="scroll">{table}</div>'


def _reasonings(m: Measures) -> str:
    if m.exact is None:
        return '<h2>Reasonings</h2><p class="soft">None: the policy wrote none, or none were recorded.</p>'
    text = f"{m.exact:.1%} exactly as recorded; {m.similarity:.1%} of the characters agree."
    rows = [[f"{count}", escape(want), escape(got)] for (want, got), count in m.mistakes.most_common(MOST_MISTAKES)]
    table = html_table(["times", "recorded", "written instead"], rows, range(1)) if rows else ""
    return f"<h2>Reasonings</h2><p>{text}</p>{table}"


def _rewards(rewards: dict[str, int]) -> str:
    if not rewards:
        return ""
    rows = [[escape(path), str(reward)] for path, reward in rewards.items()]
    return "<h2>Recorded actions in the simulator</h2>" + html_table(["episode", "highest reward"], rows, range(1, 2))


def _episode(replay: Replay, is_first: bool) -> str:
    picture = _picture(plot_actions, replay, alt=f"actions of {Path(replay.path).name}", dpi=80, columns=4)
    return f"<details{' open' if is_first else ''}><summary>{escape(replay.path)}</summary>{picture}</details>"


def _picture(plot, subject, alt: str, **options) -> str:
    data = io.BytesIO()
    plot(subject, data, **options)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{encoded}"></figure>'


def plot_actions(replay: Replay, output, dpi: int = 110, columns: int = 7):
    """One panel per action dimension; chunks are separate lines, so that jumps between them show. `output`: a path or
    a file."""
    names = joint_names(replay.recorded.shape[1])
    columns = min(len(names), columns)
    rows = -(-len(names) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.4 * rows), squeeze=False, layout="constrained")
    predicted = replay.predicted()  # (N, A)
    starts = replay.starts if replay.every > 1 else replay.starts[:1]  # chunks of one action are no lines
    for i, axis in enumerate(axes.flat):
        axis.set_visible(i < len(names))
        if i >= len(names):
            continue
        if len(starts) <= MOST_LINES:
            axis.vlines(starts, 0, 1, transform=axis.get_xaxis_transform(), color="#e4e7ec", linewidth=0.6)
        axis.plot(replay.recorded[:, i], label="recorded", color=RECORDED, linewidth=2)
        for start, end in zip(starts, [*starts[1:], len(predicted)]):
            label = "predicted" if start == 0 else None
            axis.plot(range(start, end), predicted[start:end, i], label=label, color=PREDICTED, linewidth=1.2)
        axis.set_title(names[i], fontsize=9)
        axis.tick_params(labelsize=7)
    axes.flat[0].legend(fontsize=8)
    fig.suptitle(f"{Path(replay.path).name}: predicted against recorded actions")
    fig.supxlabel("frame")
    fig.savefig(output, dpi=dpi, format="png")
    plt.close(fig)


def plot_horizon(measures: Measures, output, dpi: int = 90):
    """Mean error by step of the chunk, and that of holding still."""
    fig, axis = plt.subplots(figsize=(9, 3), layout="constrained")
    axis.plot(100 * measures.by_step, color=PREDICTED, label="the policy")
    axis.plot(100 * measures.holding_by_step, color=BASELINE, linestyle="--", label="holding still")
    axis.set(xlabel="step of the chunk", ylabel="mean error, % of the joints' range", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    fig.savefig(output, dpi=dpi, format="png")
    plt.close(fig)
