"""GO or NO-GO: the checks of what was measured, their thresholds, and what to do."""

from dataclasses import dataclass

import numpy as np

from evaluate.measures import Measures

# Pairs of thresholds: from the first on a warning, from the second on NO-GO. Where no reason is given they are rules of
# thumb: loose enough for a policy that works, far from what a broken one shows
ERROR_TO_HOLDING = (0.7, 1.0)  # 1: standing still would have been as close to the recording
ERROR_TO_CONSTANT = (0.5, 1.0)  # 1: so would one and the same action, whatever the cameras show
FOLLOWED = (0.6, 0.25)  # of the recorded movement; 0: the policy repeats where the robot is. Small is bad here
BOUNDARY_JUMP = (3.0, 10.0)  # times the 99th percentile step; 3 is an offset of 1 % of the range per chunk, 10 of 3 %
JERK = (5.0, 15.0)  # times the recording's; 5 is noise of 0.2 % of the range in every step, 15 of 0.6 %
STUCK = (0.05, 0.25)  # share of a joint's values; those where the recording is there too, as grippers are, do not count
MOVEMENT = (0.4, 0.1)  # spread of a joint's values, of the recording's. Small is bad here
REASONING = (0.8, 0.5)  # exact matches; the frame at which a sub-step begins is a matter of taste. Small is bad here
SIMILAR = 0.9  # difflib's ratio: labels in free words are rarely met exactly, but nearly


@dataclass(frozen=True)
class Latency:
    """Of single queries, in ms: the very first one, and percentiles of the `queries` after it."""

    first: float
    p50: float
    p99: float
    queries: int


@dataclass(frozen=True)
class Check:
    """One question to a policy. level: "pass", "warning", "error" (NO-GO) or "skipped". advice: what to do about it."""

    name: str
    level: str
    found: str
    expected: str
    advice: str = ""


def _grade(
    name: str,
    value: float | None,
    thresholds: tuple[float, float],
    form: str,
    advice: str,
    *,
    unit: str = "",
    more: str = "",
) -> Check:
    """A value against (warning, NO-GO); small is bad where they fall. `form` shows values, `more` follows the found."""
    good, bad = thresholds
    smaller_is_bad = good > bad
    sign, relation = (-1, "above") if smaller_is_bad else (1, "below")
    expected = f"{relation} {form.format(good)}" + (f"; NO-GO from {form.format(bad)}" if np.isfinite(bad) else "")
    if value is None:
        return Check(name, "skipped", "too little was recorded to tell", expected)
    if not np.isfinite(value):
        return Check(name, "error", "no number", expected, "see the check of finite numbers")
    level = "error" if sign * value >= sign * bad else "warning" if sign * value >= sign * good else "pass"
    return Check(name, level, f"{form.format(value)}{unit}{more}", expected, "" if level == "pass" else advice)


def _worst(measures: Measures, values: np.ndarray | None, highest: bool = True) -> tuple[float | None, str]:
    """Of the moving joints: the worst value, and `, joint`."""
    if values is None:
        return None, ""
    judged = np.where(measures.moving, values, -np.inf if highest else np.inf)
    i = int(judged.argmax() if highest else judged.argmin())
    return float(judged[i]), f" ({measures.joints[i]})"


def judge(measures: Measures) -> list[Check]:
    """The checks of what was measured, the most telling first."""
    m = measures
    error = m.share(m.error)
    jump, jump_at = _worst(m, m.jump)
    jerk, jerk_at = _worst(m, m.jerk)
    stuck, stuck_at = _worst(m, m.stuck)
    moved, moved_at = _worst(m, m.movement, highest=False)
    checks = [
        Check(
            "finite numbers",
            "pass" if m.finite == 1 else "error",
            f"{m.finite:.2%} of the predicted ones",
            "all",
            "" if m.finite == 1 else "the weights or statistics hold NaN or overflow; take an earlier checkpoint",
        ),
        _grade(
            "error against holding still",
            error / max(m.share(m.holding), 1e-9),
            ERROR_TO_HOLDING,
            "{:.2f}",
            "train longer or on more episodes; check that task, cameras and camera_map are those of training",
            more=f" (mean error {error:.1%} of the joints' range, holding still {m.share(m.holding):.1%})",
        ),
        _grade(
            "error against a constant action",
            error / max(m.share(m.constant), 1e-9),
            ERROR_TO_CONSTANT,
            "{:.2f}",
            "the policy hardly looks at its input: check the statistics and the training loss (action_loss)",
            more=f" (constant {m.share(m.constant):.1%})",
        ),
        _grade(
            "movement that is followed",
            m.followed,
            FOLLOWED,
            "{:.0%}",
            "it stays where the robot is: sim=False in a real robot's files? Cut idle frames, train longer",
        ),
        _grade(
            "movement of each joint",
            moved,
            MOVEMENT,
            "{:.2f}",
            "the joint is dead: look at its picture; was it in the training data, and in its statistics?",
            more=moved_at,
        ),
        _grade(
            "jumps between chunks",
            jump,
            BOUNDARY_JUMP,
            "{:.1f}",
            "train longer; execute with temporal ensembling, blending or a shorter query_frequency",
            unit=" × the recorded steps",
            more=jump_at,
        ),
        _grade(
            "jerk",
            jerk,
            JERK,
            "{:.1f}",
            "noise in the actions: train longer, act with --ema, or execute with smoothing or ensembling",
            unit=" × the recorded",
            more=jerk_at,
        ),
        _grade(
            "values stuck at the limits",
            stuck,
            STUCK,
            "{:.1%}",
            "predictions are cut off at dataset_stats.json's range: are these the statistics it was trained with?",
            unit=" while the recording is elsewhere",
            more=stuck_at,
        ),
    ]
    if m.exact is not None:
        thresholds = REASONING if m.similarity < SIMILAR else (REASONING[0], -np.inf)
        advice = "see the most frequent mistakes; train longer, check the labels, or act with --no_reasoning"
        more = f" exactly, similarity {m.similarity:.0%}"
        checks.append(_grade("reasoning", m.exact, thresholds, "{:.0%}", advice, more=more))
    return checks


def judge_latency(latency: Latency, steps: int, fps: float) -> Check:
    """Whether the policy keeps up with a robot that asks it every `steps` of its `fps` control steps a second.

    Never NO-GO: another machine may be the one that acts.
    """
    period = steps / fps * 1000
    fits = latency.p99 < period
    advice = "the robot would wait that long for every chunk: ask before the running chunk ends (evaluate.client)"
    if latency.p50 >= period:
        advice = "too slow even while a chunk runs: --no_reasoning, a GPU, or more steps between queries"
    return Check(
        "latency",
        "pass" if fits else "warning",
        f"p99 {latency.p99:.0f} ms a query",
        f"below {period:.0f} ms, {steps} × {1000 / fps:.0f} ms from one query to the next",
        "" if fits else advice,
    )


def judge_recordings(rewards: dict[str, int], success: int) -> Check:
    """Whether recorded actions reach the reward `success` in the simulator; rewards: episode -> highest one."""
    name, expected = "recorded actions in the simulator", "all succeed"
    if not rewards:
        return Check(name, "skipped", "nothing to replay", expected)
    failed = [path for path, reward in rewards.items() if reward < success]
    found = f"{len(rewards) - len(failed)} of {len(rewards)} succeed"
    if not failed:
        return Check(name, "pass", found, expected)
    advice = f"the data is at fault: record them again, with the same simulator; first {failed[0]}"
    return Check(name, "error" if len(failed) > len(rewards) / 2 else "warning", found, expected, advice)


def is_go(checks: list[Check]) -> bool:
    return all(check.level != "error" for check in checks)
