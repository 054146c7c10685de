"""What a LeRobot dataset that is being written holds so far: published episodes, and staged ones."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .lerobot_files import published_episodes

STAGED = "episode.json"


@dataclass
class Options:
    """What the command line says. `fps` and `robot_type`: None takes a LeRobot source's, else 50 and aloha."""

    cameras: dict[str, str] | None = None
    fps: int | None = None
    robot_type: str | None = None
    encoder: str = "libsvtav1"
    data_megabytes: int = 100
    video_megabytes: int = 200


@dataclass
class State:
    """What OUT holds: rows of published episodes, staged ones after them, and what both are made of."""

    out: Path
    settings: dict | None = None
    rows: list[dict] = field(default_factory=list)
    staged: list[dict] = field(default_factory=list)
    sources: list[dict] = field(default_factory=list)  # {"name", "fingerprint"} by episode
    tasks: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, out: Path) -> "State":
        """Reads it, and removes what an interrupted run left unfinished."""
        state = cls(out)
        if (out / "meta" / "info.json").is_file():
            state._read_published()
        published = len(state.rows)
        for folder in sorted(state.staging.glob("*")) if state.staging.is_dir() else ():
            index = folder.name.removeprefix("episode_")
            if not index.isdecimal() or int(index) < published:
                shutil.rmtree(folder)
                continue
            staged = json.loads((folder / STAGED).read_text(encoding="utf-8"))
            state.settings = state.settings or staged["settings"]
            state.note(staged)
        return state

    def _read_published(self):
        path = self.out / "meta" / "dexvla_sources.json"
        if not path.is_file():
            raise UserError(
                f"OUT {self.out}: expected a new folder or a dataset that this command began, found a LeRobot dataset "
                "without meta/dexvla_sources.json; name another folder"
            )
        info = json.loads((self.out / "meta" / "info.json").read_text(encoding="utf-8"))
        written = json.loads(path.read_text(encoding="utf-8"))
        self.settings = written["settings"]
        self.rows = published_episodes(self.out, info["total_episodes"])
        self.sources = written["episodes"][: len(self.rows)]
        for row in self.rows:
            for task in row["tasks"]:
                self.tasks.setdefault(task, len(self.tasks))

    def note(self, staged: dict):
        self.staged.append(staged)
        self.sources.append(staged["source"])
        for task in staged["row"]["tasks"]:
            self.tasks.setdefault(task, len(self.tasks))

    @property
    def staging(self) -> Path:
        return self.out / ".staging"

    def folder(self, staged: dict) -> Path:
        return self.staging / f"episode_{staged['row']['episode_index']:06d}"

    @property
    def frames(self) -> int:
        row = self.staged[-1]["row"] if self.staged else self.rows[-1] if self.rows else {"dataset_to_index": 0}
        return row["dataset_to_index"]
