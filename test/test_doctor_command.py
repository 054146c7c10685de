"""The doctor as a command: statistics, repairs, reports, exit codes; and what training says of its checks."""

import base64
import json
import shutil
from html.parser import HTMLParser

import cv2
import h5py
import numpy as np
import pytest

from aloha_scripts.constants import TASK_CONFIGS
from data_utils import UserError, get_norm_stats, load_data, open_episode, save_stats
from data_utils.doctor.__main__ import main
from data_utils.doctor.checks import fast_findings
from data_utils.index import summarize
from data_utils.summary import EpisodeSummary

from .helpers import CAMERAS, run, write_episode
from .test_doctor import HIGH, LEFT, LENGTH, change, poke


@pytest.fixture
def folder(tmp_path):
    """Six sound episodes, two of them with JPEG frames."""
    for i in range(6):
        write_episode(tmp_path / f"episode_{i}.hdf5", LENGTH, seed=i, jpeg=i % 3 == 2)
    return tmp_path


def test_stats(folder, capsys):
    save_stats(get_norm_stats(sorted(map(str, folder.glob("*.hdf5")))), folder)
    assert main([str(folder), "--strict"]) == 0
    stats = json.loads((folder / "dataset_stats.json").read_text())
    stats["action_max"][3] += 0.5
    (folder / "dataset_stats.json").write_text(json.dumps(stats))
    assert main([str(folder), "--fast"]) == 0 and main([str(folder), "--fast", "--strict"]) == 1
    assert f"warning [stats] {folder}/dataset_stats.json: action_max, dimension 3: expected" in capsys.readouterr().out


def test_stats_of_a_checkpoint(folder, tmp_path_factory, capsys):
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    with pytest.raises(UserError, match="expected dataset_stats.json there, found none"):
        main([str(folder), "--stats", str(checkpoint)])
    save_stats(get_norm_stats([str(folder / "episode_0.hdf5")]), checkpoint)
    before = (checkpoint / "dataset_stats.json").read_bytes()
    assert main([str(folder), "--fast", "--strict", "--fix", "--stats", str(checkpoint)]) == 1
    assert "more numbers that differ" in capsys.readouterr().out
    assert (checkpoint / "dataset_stats.json").read_bytes() == before
    assert main([str(folder / "episode_0.hdf5"), "--fast", "--strict", "--stats", str(checkpoint)]) == 0
    (checkpoint / "dataset_stats.json").write_text("{]")
    assert main([str(folder), "--fast", "--stats", str(checkpoint)]) == 1


def test_summaries_survive_the_cache(folder):
    poke(folder / "episode_1.hdf5", "action", (17, 4), 40)
    summaries = [summarize(str(path)) for path in sorted(folder.glob("*.hdf5"))]
    again = [EpisodeSummary.from_json(json.loads(json.dumps(summary.to_json()))) for summary in summaries]
    assert len(fast_findings(summaries, 50)) == 1
    assert fast_findings(again, 50) == fast_findings(summaries, 50)


def test_training_warns_of_what_looks_wrong(folder, capsys):
    load_data(str(folder), None, CAMERAS, 50)
    assert not capsys.readouterr().out
    poke(folder / "episode_1.hdf5", "action", (17, 4), 40)
    load_data(str(folder), None, CAMERAS, 50)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith(f"warning: {folder}/episode_1.hdf5: action, frame 17, dimension 4")
    load_data(str(folder), None, CAMERAS, 50, show_progress=False)
    assert not capsys.readouterr().out
    for i in range(30):
        shutil.copy(folder / "episode_1.hdf5", folder / f"short_{i:02d}.hdf5")
        change(folder / f"short_{i:02d}.hdf5", "language_raw", lambda old: [""])
    load_data(str(folder), None, CAMERAS, 50)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and lines[-1].endswith("more: python -m data_utils.doctor")


def contents(path):
    """Every dataset and attribute of a file."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
        return found, dict(file.attrs)


def is_clean(folder):
    return main([str(folder), "--strict"]) == 0


@pytest.mark.parametrize("jpeg, chunks", [(False, None), (True, None), (False, (1, 48, 64, 3))])
def test_fix_cuts_to_the_shortest(folder, capsys, jpeg, chunks):
    path = write_episode(folder / "episode_1.hdf5", LENGTH, seed=1, jpeg=jpeg)
    with h5py.File(path, "r+") as file:
        file["base_action"] = np.arange(2.0 * LENGTH).reshape(LENGTH, 2)
        file["observations/images"].attrs["exposure"] = 3
        if chunks:
            images = file[LEFT][()]
            del file[LEFT]
            file.create_dataset(LEFT, data=images, chunks=chunks, compression="gzip", compression_opts=1)
    change(path, HIGH, lambda old: old[:-3])
    before, _ = contents(path)
    assert not is_clean(folder)
    assert main([str(folder), "--fix", "--strict"]) == 0
    out = capsys.readouterr().out
    assert f"fixed: {path}: cut to 57 frames: action (60)" in out and "base_action (60)" in out and "9 more" not in out
    after, attributes = contents(path)
    assert before.keys() == after.keys() and bool(attributes["sim"]) and bool(attributes.get("compress")) == jpeg
    for name, values in after.items():
        if name == "compress_len":
            assert np.array_equal(values, before[name][:, :57])
        elif name == "language_raw":
            assert np.array_equal(values, before[name])
        else:
            assert len(values) == 57 and np.array_equal(values, before[name][:57])
    with h5py.File(path) as file:
        assert file["observations/images"].attrs["exposure"] == 3
        assert file[LEFT].chunks == chunks and file[LEFT].compression == ("gzip" if chunks else None)
    assert len(contents(f"{path}.bak")[0]["action"]) == LENGTH
    assert not list(folder.glob(".*")) and is_clean(folder)


def test_fix_leaves_what_it_would_have_to_guess(folder, capsys):
    change(folder / "episode_1.hdf5", HIGH, lambda old: old[:-6])
    with h5py.File(folder / "episode_2.hdf5", "r+") as file:
        del file["observations/qpos"]
    (folder / "episode_3.hdf5").write_bytes(b"no episode")
    change(folder / "episode_4.hdf5", "substep_reasonings", lambda old: ["", *old[1:]])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main([str(folder), "--fix"]) == 1
    out = capsys.readouterr().out
    assert "fixed: nothing" in out and out.count("error [") == 3 and out.count("warning [texts]") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_fix_sets_compress(folder, capsys):
    path = folder / "episode_2.hdf5"
    with h5py.File(path, "r+") as file:
        del file.attrs["compress"]
    assert main([str(folder)]) == 1
    assert main([str(folder), "--fix", "--strict"]) == 0
    assert f"fixed: {path}: compress: set" in capsys.readouterr().out
    assert is_clean(folder) and open_episode(path).frame(CAMERAS[0], 3).shape == (48, 64, 3)


def test_fix_fills_reasonings(folder, capsys):
    path = folder / "episode_1.hdf5"
    change(path, "substep_reasonings", lambda old: ["Grüße", "", " ", *old[3:]])
    assert main([str(folder), "--fix", "--strict"]) == 0
    assert "substep_reasonings: filled 2 empty ones from the frame before, first frame 1" in capsys.readouterr().out
    episode = open_episode(path)
    assert [episode.reasoning(t) for t in range(4)] == ["Grüße"] * 3 + ["Pick up the cube."]
    assert is_clean(folder)


def test_fix_sets_sim_only_when_told(folder):
    with h5py.File(folder / "episode_1.hdf5", "r+") as file:
        del file.attrs["sim"]
    main([str(folder), "--fix", "--fast"])
    assert not open_episode(folder / "episode_1.hdf5").sim
    main([str(folder), "--fix", "--fast", "--set_sim", "true"])
    assert open_episode(folder / "episode_1.hdf5").sim
    assert [path.name for path in folder.glob("*.bak*")] == ["episode_1.hdf5.bak"]
    main([str(folder), "--fix", "--fast", "--set_sim", "false"])
    assert not open_episode(folder / "episode_1.hdf5").sim
    assert "sim" not in h5py.File(folder / "episode_1.hdf5.bak").attrs
    assert h5py.File(folder / "episode_1.hdf5.bak2").attrs["sim"]


def test_fix_keeps_links(folder, capsys):
    path = folder / "episode_1.hdf5"
    link = h5py.ExternalLink("gone.hdf5", "/images")
    with h5py.File(path, "r+") as file:
        file["observations/images/cam_low"] = link
        file["same"] = h5py.SoftLink("/action")
    assert main([str(folder), "--fix", "--set_sim", "false"]) == 1  # the camera is broken, and stays so
    assert "cam_low: expected a dataset, found a link that leads nowhere" in capsys.readouterr().out
    with h5py.File(path) as file:
        kept = file.get("observations/images/cam_low", getlink=True)
        assert file.get("same", getlink=True).path == "/action"
        assert not file.attrs["sim"] and (kept.filename, kept.path) == (link.filename, link.path)


def test_fix_writes_stale_stats_anew(folder, capsys):
    save_stats(get_norm_stats([str(folder / "episode_0.hdf5")]), folder)
    stale = (folder / "dataset_stats.json").read_bytes()
    change(folder / "episode_1.hdf5", HIGH, lambda old: old[:-3])  # repaired first
    assert main([str(folder), "--fix", "--strict"]) == 0
    assert "dataset_stats.json: computed again from 6 episodes" in capsys.readouterr().out
    assert (folder / "dataset_stats.json.bak").read_bytes() == stale and is_clean(folder)


class Page(HTMLParser):
    """Checks that every element is closed; gathers texts and pictures."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.pictures = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("line", "rect", "polyline")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report(folder, capsys):
    change(folder / "episode_1.hdf5", "language_raw", lambda old: ["<script>alert(1)</script>"])
    poke(folder / "episode_1.hdf5", "action", (17, 4), 40)
    (folder / "episode_3.hdf5").write_bytes(b"no episode")
    output = folder / "report.html"
    assert main([str(folder), "--report", str(output)]) == 1
    assert f"wrote {output}" in capsys.readouterr().out
    text = output.read_text()
    page = Page(text)
    assert "<script" not in text and "http://" not in text and "https://" not in text
    assert "<script>alert(1)</script>" in page.text and "Pick up the cube." in page.text
    for i in range(6):
        assert f"episode_{i}.hdf5" in page.text
    assert "action, frame 17, dimension 4" in page.text
    assert len(page.pictures) == 5 * 3 * 5  # readable episodes, cameras, frames
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in page.pictures)
    assert text.count('<tr class="flagged"><td class="number">4</td>') == 1
    assert text.count("<polyline") == 2 * 14 * 5


def test_pictures_in_the_report_have_the_right_colours(tmp_path):
    path = write_episode(tmp_path / "episode_0.hdf5", LENGTH, cameras=["cam"], jpeg=True)
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 0] = 250
    encoded = cv2.imencode(".jpg", red)[1].reshape(1, -1)
    change(path, "observations/images/cam", lambda old: np.repeat(encoded, LENGTH, axis=0))
    main([str(tmp_path), "--report", str(tmp_path / "report.html")])
    picture = Page((tmp_path / "report.html").read_text()).pictures[2]
    (tmp_path / "picture.jpg").write_bytes(base64.b64decode(picture.partition(",")[2]))
    blue, green, red = cv2.imread(str(tmp_path / "picture.jpg")).mean(axis=(0, 1))
    assert red > 240 and max(blue, green) < 10


def test_tasks_and_exit_codes(folder, monkeypatch):
    task = {"dataset_dir": str(folder), "episode_len": LENGTH, "camera_names": CAMERAS}
    monkeypatch.setitem(TASK_CONFIGS, "doctor_task", task)
    assert main(["--task_name", "doctor_task", "--strict"]) == 0
    monkeypatch.setitem(TASK_CONFIGS, "doctor_task", task | {"camera_names": ["nose"]})
    assert main(["--task_name", "doctor_task", "--fast"]) == 1
    monkeypatch.setitem(TASK_CONFIGS, "doctor_task", task | {"name_filter": lambda path: "_0" in path})
    (folder / "episode_3.hdf5").write_bytes(b"no episode")
    assert main(["--task_name", "doctor_task", "--strict"]) == 0
    with pytest.raises(UserError, match="--task_name: expected one of .*, found nobody"):
        main(["--task_name", "nobody"])
    for arguments in ([], [str(folder), "--task_name", "doctor_task"], [str(folder), "--set_sim", "true"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)


def test_the_command(folder):
    done = run(["-m", "data_utils.doctor", str(folder / "episode_0.hdf5"), str(folder / "episode_2.hdf5"), "--strict"])
    assert done.returncode == 0 and "2 episodes, 120 frames, 0 errors, 0 warnings" in done.stdout
    done = run(["-m", "data_utils.doctor", str(folder / "nowhere")])
    assert done.returncode == 1 and done.stdout.startswith("error: ") and "Traceback" not in done.stdout
