"""What start-up needs to know of an episode: its size, its moments, and what is wrong with it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import numpy as np

from .episodes import stored_camera
from .errors import Finding
from .motion import from_text, is_copy, lag_of, motion_of, to_text
from .normalization import Moments


def estimated_tokens(text: str) -> int:
    """About how many tokens a tokenizer makes of a text: one for four ASCII characters, two for three others. Ordinary
    English has fewer, so the estimate errs on the long side by a little."""
    ascii_characters = sum(character.isascii() for character in text)
    return round(ascii_characters / 4 + (len(text) - ascii_characters) * 2 / 3)


@dataclass
class EpisodeSummary:
    """Facts of one episode, read without decoding images. They hold for any task, so they are kept between runs.

    findings: what is wrong whatever the task. camera_findings: what is wrong with a camera, if a task uses it.
    reasonings: number of reasoning texts; reasoning_findings: what is wrong with them.
    action_motion, qpos_motion: (7, D), see `motion_of`; lag, copied: see `lag_of`, `is_copy`.
    image_sizes: (width, height) of each camera's first frame. instructions: the different ones.
    empty_reasonings: how many, and the first one's frame. longest_reasoning: its estimated tokens, and its frame.
    An episode that cannot be read has findings and no moments.
    """

    path: str
    length: int = 0
    sim: bool = False
    action: Moments | None = None
    qpos: Moments | None = None
    cameras: list[str] = field(default_factory=list)
    reasonings: int = 0
    findings: list[Finding] = field(default_factory=list)
    camera_findings: dict[str, list[Finding]] = field(default_factory=dict)
    reasoning_findings: list[Finding] = field(default_factory=list)
    action_motion: np.ndarray | None = None
    qpos_motion: np.ndarray | None = None
    lag: int | None = None
    copied: bool = False
    image_sizes: dict[str, list[int]] = field(default_factory=dict)
    instructions: list[str] = field(default_factory=list)
    empty_reasonings: list[int] = field(default_factory=lambda: [0, 0])
    longest_reasoning: list[int] = field(default_factory=lambda: [0, 0])

    def find(self, where: str, expected: str, found, advice: str = "", *, camera: str | None = None):
        """Notes an error of the episode, or of one of its cameras."""
        findings = self.findings if camera is None else self.camera_findings.setdefault(camera, [])
        findings.append(Finding(self.path, where, expected, str(found), advice))

    def check_numbers(self, name: str, values: np.ndarray) -> Moments | None:
        """Moments of (N, D) finite floating point numbers; otherwise a finding and None."""
        if values.ndim != 2 or values.dtype.kind != "f" or not values.size:
            self.find(name, "shape (N, D) of float32 or float64", f"{values.shape} of {values.dtype}")
            return None
        self.length = self.length or len(values)
        if not np.isfinite(values).all():
            frame, column = np.argwhere(~np.isfinite(values))[0]
            self.find(f"{name}, frame {frame}, dimension {column}", "a finite number", values[frame, column])
            return None
        return Moments.of(values)

    def describe_motion(self, action: np.ndarray, qpos: np.ndarray):
        """Notes how finite actions (N, A) and states (N, S) move."""
        self.action_motion, self.qpos_motion = motion_of(action), motion_of(qpos)
        self.lag, self.copied = lag_of(action, qpos), is_copy(action, qpos)

    def describe_instructions(self, texts: Iterable[str]):
        self.instructions = sorted(set(texts))

    def describe_reasonings(self, texts: list[str | None]):
        empty = [t for t, text in enumerate(texts) if not (text or "").strip()]
        self.empty_reasonings = [len(empty), empty[0] if empty else 0]
        tokens = {text: estimated_tokens(text) for text in set(texts) if text}
        longest = max(tokens, key=tokens.get, default=None)
        self.longest_reasoning = [tokens[longest], texts.index(longest)] if tokens else [0, 0]

    def findings_for(
        self,
        camera_names: list[str] | None,
        camera_map: dict[str, str | list[str]] | None,
        use_reasoning: bool,
        action_dim: int | None,
        state_dim: int | None,
    ) -> list[Finding]:
        """What stands against using the episode in a task."""
        findings = list(self.findings)
        if not self.length:
            return findings
        for name, flag, expected, moments in (
            ("action", "--action_dim", action_dim, self.action),
            ("observations/qpos", "--state_dim", state_dim, self.qpos),
        ):
            if None not in (expected, moments) and expected != moments.dim:
                findings.append(Finding(self.path, name, f"{expected} columns ({flag})", str(moments.dim)))
        for camera in camera_names or []:
            stored = stored_camera(camera, self.cameras, camera_map)
            if stored is None:
                present = ", ".join(self.cameras) or "no cameras"
                where = f"observations/images/{camera}"
                findings.append(Finding(self.path, where, "a camera of camera_names", f"only {present}"))
            else:
                findings += self.camera_findings.get(stored, [])
        if use_reasoning:
            findings += self.reasoning_findings
            if not self.reasonings and not self.reasoning_findings:
                expected = "one text per frame (or `reasoning` with one, or --use_reasoning False)"
                findings.append(Finding(self.path, "substep_reasonings", expected, "none"))
        return findings

    def to_json(self) -> dict:
        def moments(value: Moments | None) -> dict | None:
            return value and {name: np.asarray(part).tolist() for name, part in vars(value).items()}

        return asdict(self) | {
            "action": moments(self.action),
            "qpos": moments(self.qpos),
            "action_motion": to_text(self.action_motion),
            "qpos_motion": to_text(self.qpos_motion),
        }

    @classmethod
    def from_json(cls, data: dict) -> "EpisodeSummary":
        def moments(value: dict | None) -> Moments | None:
            return value and Moments(**{k: v if k == "count" else np.array(v) for k, v in value.items()})

        def findings(values: list[dict]) -> list[Finding]:
            return [Finding(**value) for value in values]

        return cls(
            **data
            | {
                "action": moments(data["action"]),
                "qpos": moments(data["qpos"]),
                "findings": findings(data["findings"]),
                "camera_findings": {name: findings(values) for name, values in data["camera_findings"].items()},
                "reasoning_findings": findings(data["reasoning_findings"]),
                "action_motion": from_text(data["action_motion"]),
                "qpos_motion": from_text(data["qpos_motion"]),
            }
        )
