"""What summaries of episodes tell about a dataset. No file is opened, so training runs these checks too.

The thresholds are for what stands out of the dataset itself, by a wide margin: a sound recording gives no finding.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from ..episodes import stored_camera
from ..errors import Finding
from ..motion import HIGH, LOW, MAX_AT, MAX_STEP, MAX_STEP_AT, MIN_AT, STEP
from ..normalization import MIN_STD
from ..summary import EpisodeSummary
from .diagnosis import Diagnosis, common_folder, warning

TINY_RANGE = 1e-3  # in the robot's units: noise, once it is stretched to [-1, 1]
SPIKE = 3  # ranges of a dimension between a few frames and all others
SHIFT = 10  # ranges between an episode and all others, as when it is in degrees
WORTH_A_SHIFT = 5  # episodes; of fewer none is the odd one
JUMP = 10, 3, 0.3  # times a big step, times the usual biggest step, ranges
COMMON = 0.1  # of the episodes: what more of them do is no accident
MAX_TOKENS = 256  # that are generated at evaluation
SHOWN_AT_START = 10


def fast_findings(
    summaries: Iterable[EpisodeSummary],
    chunk_size: int,
    camera_names: list[str] | None = None,
    camera_map: dict[str, str | list[str]] | None = None,
    use_reasoning: bool = True,
) -> list[Diagnosis]:
    """Warnings about episodes that can be read, and about the dataset they make. Without `camera_names`, about all
    cameras."""
    sound = [summary for summary in summaries if summary.action_motion is not None]
    if not sound:
        return []
    findings = _short(sound, chunk_size) + _texts(sound, use_reasoning) + _lag(sound)
    findings += _image_sizes(sound, camera_names, camera_map)
    for name in ("action", "qpos"):
        # episodes of another size are errors of their own
        dim = Counter(getattr(summary, name).dim for summary in sound).most_common(1)[0][0]
        alike = [summary for summary in sound if getattr(summary, name).dim == dim]
        motion = np.stack([getattr(summary, f"{name}_motion") for summary in alike])  # (E, 7, D)
        label = "action" if name == "action" else "observations/qpos"
        low = np.stack([getattr(summary, name).min for summary in alike])  # (E, D)
        high = np.stack([getattr(summary, name).max for summary in alike])
        findings += _hardly_moving(label, alike, high.max(axis=0) - low.min(axis=0))
        findings += _outliers_and_jumps(label, alike, motion, low, high)
    return findings


def print_fast_findings(*args, **options):
    """Prints the first of `fast_findings`, whose arguments it takes, as warnings."""
    findings = fast_findings(*args, **options)
    for finding in findings[:SHOWN_AT_START]:
        print(f"warning: {finding}")
    if len(findings) > SHOWN_AT_START:
        print(f"… and {len(findings) - SHOWN_AT_START} more: python -m data_utils.doctor")


def start_up_findings(
    summaries: list[EpisodeSummary],
    camera_names: list[str] | None,
    camera_map: dict[str, str | list[str]] | None,
    use_reasoning: bool,
) -> list[Diagnosis]:
    """What training stops at, of every episode. Without `camera_names`, cameras are held against most episodes'."""
    without_task = camera_names is None
    if without_task:
        counts = Counter(camera for summary in summaries for camera in summary.cameras)
        readable = sum(summary.length > 0 for summary in summaries)
        camera_names = [camera for camera, count in counts.items() if 2 * count > readable]
    dims = {}
    for name in ("action", "qpos"):
        counts = Counter(getattr(s, name).dim for s in summaries if getattr(s, name) is not None)
        dims[name] = counts.most_common(1)[0][0] if counts else None
    findings = []
    for summary in summaries:
        cameras = camera_names + [camera for camera in summary.cameras if camera not in camera_names]
        found = summary.findings_for(cameras, camera_map, use_reasoning, dims["action"], dims["qpos"])
        if without_task:
            missing = "a camera of camera_names"
            found = [
                replace(f, expected="the camera, as in most episodes") if f.expected == missing else f for f in found
            ]
        findings += [Diagnosis.of(finding, _kind(finding, summary)) for finding in found]
    return findings


def _kind(finding: Finding, summary: EpisodeSummary) -> str:
    of_cameras = [broken for group in summary.camera_findings.values() for broken in group]
    if finding in of_cameras or finding.where.startswith("observations/images"):
        return "frames" if ", frame" in finding.where else "cameras"
    return "texts" if finding.where.startswith(("substep_reasonings", "reasoning", "language")) else "layout"


def _short(summaries: list[EpisodeSummary], chunk_size: int) -> list[Diagnosis]:
    short = [summary for summary in summaries if summary.length < chunk_size]
    expected, advice = f"at least {chunk_size} frames (--chunk_size)", "the rest of every action chunk is padding"
    if len(short) > 3 and 2 * len(short) > len(summaries):
        found = f"fewer in {len(short)} of {len(summaries)} episodes"
        return [warning("short", common_folder(s.path for s in summaries), "", expected, found, advice)]
    return [warning("short", s.path, "", expected, str(s.length), advice) for s in short]


def _texts(summaries: list[EpisodeSummary], use_reasoning: bool) -> list[Diagnosis]:
    findings = []
    for summary in summaries:
        if "" in (text.strip() for text in summary.instructions):
            advice = "say in words what the robot is to do"
            findings.append(warning("texts", summary.path, "instruction", "a text", "an empty one", advice))
        if not use_reasoning:
            continue
        count, frame = summary.empty_reasonings
        if count:
            found = f"none ({count} of {summary.reasonings} are empty)"
            advice = "--fix fills it from the frame before, if there is one"
            findings.append(warning("texts", summary.path, f"reasoning, frame {frame}", "a text", found, advice))
        tokens, frame = summary.longest_reasoning
        if tokens > MAX_TOKENS:
            expected = f"at most {MAX_TOKENS} tokens, which is what is generated at evaluation"
            found, advice = f"about {tokens}", "shorten it"
            findings.append(warning("texts", summary.path, f"reasoning, frame {frame}", expected, found, advice))
    return findings


def _lag(summaries: list[EpisodeSummary]) -> list[Diagnosis]:
    """Action row t (t - 1 without `sim`) belongs to observation t, so the state must not have reached it by then."""
    findings = []
    for sim in (True, False):
        group = [summary for summary in summaries if summary.sim == sim]
        copies = [summary for summary in group if summary.copied]
        if copies and 2 * len(copies) > len(group):
            advice = "a policy would learn to stay where it is: store commands, or the states that follow"
            where, found = "action", f"the state of the same frame{_in_how_many(copies, group)}"
            findings.append(_about(copies, "lag", where, "commands, which the state follows", found, advice))
            continue
        clear = [summary for summary in group if summary.lag is not None]
        # A state equal to the command of its own frame may have been read after it: with `sim`, that is no evidence
        early = [summary for summary in clear if summary.lag < (0 if sim else 2)]
        if not early or 2 * len(clear) < len(group) or len(early) < 0.8 * len(clear):
            continue
        usual = Counter(summary.lag for summary in early).most_common(1)[0][0]
        expected = f"states that follow the action by {'0' if sim else '2'} frames or more, because `sim` is {sim}"
        found = f"{usual} frames{_in_how_many(early, group)}"
        advice = (
            "the actions lag behind: shift them, or record the commands"
            if sim
            else "observation t is trained with action t - 1; if action[t] was commanded at observation t, "
            "set `sim`: --fix --set_sim true"
        )
        findings.append(_about(early, "lag", "action", expected, found, advice))
    return findings


def _in_how_many(some: list[EpisodeSummary], group: list[EpisodeSummary]) -> str:
    return "" if len(some) == 1 else f" in {len(some)} of {len(group)} episodes"


def _about(summaries: list[EpisodeSummary], kind: str, where: str, expected: str, found: str, advice: str) -> Diagnosis:
    """A warning about one episode, or about the folder of several."""
    paths = [summary.path for summary in summaries]
    return warning(kind, paths[0] if len(paths) == 1 else common_folder(paths), where, expected, found, advice)


def _image_sizes(
    summaries: list[EpisodeSummary], camera_names: list[str] | None, camera_map: dict | None
) -> list[Diagnosis]:
    findings = []
    cameras = camera_names or sorted({camera for summary in summaries for camera in summary.image_sizes})
    for camera in cameras:
        stored = [(summary, stored_camera(camera, list(summary.image_sizes), camera_map)) for summary in summaries]
        sizes = [(summary, tuple(summary.image_sizes[name])) for summary, name in stored if name]
        sizes = [(summary, size) for summary, size in sizes if all(size)]
        usual = Counter(size for _, size in sizes).most_common(1)
        for summary, size in sizes:
            if abs(size[0] * usual[0][0][1] - size[1] * usual[0][0][0]) > 0.02 * size[1] * usual[0][0][0]:
                expected = "{} x {} pixels, as in most episodes".format(*usual[0][0])
                advice = "they are stretched to one shape; crop them alike"
                found = "{} x {}".format(*size)
                findings.append(
                    warning("mixed", summary.path, f"observations/images/{camera}", expected, found, advice)
                )
    return findings


def _hardly_moving(label: str, summaries: list[EpisodeSummary], ranges: np.ndarray) -> list[Diagnosis]:
    tiny = np.flatnonzero(ranges < TINY_RANGE)
    if not len(tiny):
        return []
    folder = common_folder(summary.path for summary in summaries)
    where = f"{label}, dimension{'s' * (len(tiny) > 1)} {', '.join(map(str, tiny))}"
    found = "none" if not ranges[tiny].any() else f"{ranges[tiny].max():.2g} at the most"
    if label == "action":
        advice = "min-max normalisation stretches what is there, noise included, to [-1, 1]; leave the dimension out"
    else:
        advice = f"its std is taken as {MIN_STD}, so the model sees next to nothing; leave the dimension out"
    return [warning("range", folder, where, "movement over the dataset", found, advice)]


def _outliers_and_jumps(
    label: str, summaries: list[EpisodeSummary], motion: np.ndarray, low: np.ndarray, high: np.ndarray
) -> list[Diagnosis]:
    """motion (E, 7, D); low and high (E, D) minima and maxima. At most one finding per episode."""
    inner_low, inner_high = motion[:, LOW], motion[:, HIGH]
    # Quantiles over episodes that one odd episode cannot move
    usual_low = np.quantile(inner_low, 0.25, axis=0, method="higher")
    usual_high = np.quantile(inner_high, 0.75, axis=0, method="lower")
    usual = np.maximum(usual_high - usual_low, np.median(inner_high - inner_low, axis=0))  # (D,)
    # A dimension may rest in most episodes; dimensions of one robot are of similar size
    floor = np.maximum(usual, np.median(usual))
    own = np.maximum(inner_high - inner_low, np.maximum(usual, 0.5 * np.median(usual)))  # (E, D)
    beyond = np.maximum(high - inner_high, inner_low - low) / (own + TINY_RANGE)
    shifted = np.maximum(inner_high - usual_high, usual_low - inner_low) / (floor + TINY_RANGE)
    spikes, shifts = _rare(beyond > SPIKE), _rare(shifted > SHIFT)
    if len(summaries) < WORTH_A_SHIFT:
        shifts[:] = False

    times_big, times_biggest, ranges = JUMP
    steps = motion[:, MAX_STEP]
    usual_step = np.median(motion[:, STEP], axis=0)
    usual_biggest = np.quantile(steps, 0.5, axis=0, method="lower")
    least = np.maximum(times_big * np.maximum(usual_step, motion[:, STEP]), times_biggest * usual_biggest)
    least = np.maximum(least, ranges * floor + TINY_RANGE)
    jumps = _rare(steps > least) if len(summaries) > 1 else np.zeros_like(spikes)

    findings = []
    for e in np.flatnonzero((spikes | shifts | jumps).any(axis=1)):
        if shifts[e].any():
            d = int(np.where(shifts[e], shifted[e], 0).argmax())
            where = f"{label}, dimension {d}"
            expected = f"values like those of the other episodes, {usual_low[d]:.4g} to {usual_high[d]:.4g}"
            found = f"{low[e, d]:.4g} to {high[e, d]:.4g}"
            kind, advice = "outlier", "the same units and zero everywhere?"
        elif spikes[e].any():
            d = int(np.where(spikes[e], beyond[e], 0).argmax())
            above = high[e, d] - inner_high[e, d] > inner_low[e, d] - low[e, d]
            where = f"{label}, frame {int(motion[e, MAX_AT if above else MIN_AT, d])}, dimension {d}"
            expected = f"a value near the episode's others, {inner_low[e, d]:.4g} to {inner_high[e, d]:.4g}"
            found = f"{high[e, d] if above else low[e, d]:.4g}"
            kind, advice = "outlier", "it sets the range that all actions are normalised by; repair or drop the episode"
        else:
            d = int(np.where(jumps[e], steps[e] / least[e], 0).argmax())
            where = f"{label}, frame {int(motion[e, MAX_STEP_AT, d])}, dimension {d}"
            expected = f"a step like the others, {max(usual_step[d], motion[e, STEP, d]):.2g} or less"
            found = f"{steps[e, d]:.4g}"
            kind, advice = "jump", "a gap in the recording? Cut the episode there, or drop it"
        others = int((spikes | shifts | jumps)[e].sum()) - 1
        found += f" (and in {others} more dimensions)" if others else ""
        findings.append(warning(kind, summaries[e].path, where, expected, found, advice))
    return findings


def _rare(flags: np.ndarray) -> np.ndarray:
    """(E, D) bool without the dimensions in which it is the rule rather than the exception."""
    return flags & (flags.sum(axis=0) <= max(1, COMMON * len(flags)))
