"""Sub-step reasoning labels: drafts by a model, contact sheets, the command line."""

import csv
import json
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from data_utils import UserError, open_episode
from data_utils.annotate import Describer, choose_cameras, main, propose, write_sheets
from data_utils.index import summarize_all
from data_utils.labels import EpisodeNames, apply, export

from .helpers import GOLDEN, LENGTH, ONE_CAMERA, label_file, run, write_episode


@pytest.fixture(scope="module")
def talking_base(tiny_base, tmp_path_factory):
    """The tiny Qwen2-VL, but one that answers in words, and to what it sees: by itself it writes line breaks only."""
    folder = tmp_path_factory.mktemp("talking")
    for file in Path(tiny_base).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3 if parameter.ndim > 1 else 1
    words = [token for token in range(len(tokenizer)) if tokenizer.decode([token]).strip().isalpha()]
    model.generation_config.suppress_tokens = sorted({*range(len(tokenizer))} - {*words} | {*tokenizer.all_special_ids})
    model.save_pretrained(folder)
    return str(folder)


# ---- propose ----


def test_a_draft_covers_every_episode_and_goes_on_where_it_stopped(dataset, talking_base, tmp_path):
    output = tmp_path / "draft.csv"
    options = {"every": 0.1, "fps": 50, "max_new_tokens": 6, "device": "cpu"}
    assert propose(str(dataset), talking_base, str(output), **options) == 3
    whole = output.read_text()
    rows = list(csv.DictReader(whole.splitlines()))
    assert list(dict.fromkeys(row["episode"] for row in rows)) == list(EpisodeNames(str(dataset)).paths)
    for name in EpisodeNames(str(dataset)).paths:
        bounds = [(int(row["start"]), int(row["end"])) for row in rows if row["episode"] == name]
        assert bounds[0][0] == 0 and bounds[-1][1] == LENGTH
        assert all(before[1] == after[0] for before, after in zip(bounds, bounds[1:]))
        assert {start for start, _ in bounds} <= {0, 5, 10}
        assert all(before["text"] != after["text"] for before, after in zip(rows, rows[1:]) if after["start"] != "0")
    first = whole[: whole.index("episode_1.hdf5")]
    output.write_text(first.rstrip("\n"))  # also without its last line break, as some editors save
    assert propose(str(dataset), talking_base, str(output), **options) == 2
    assert output.read_text() == whole
    assert propose(str(dataset), "no folder", str(output), **options) == 0  # nothing left, no model needed
    assert len(apply(str(output), str(dataset)).written) == 3  # a draft is a label file


def test_answers_do_not_depend_on_their_batch(dataset, talking_base):
    describer = Describer(talking_base, "cpu", max_new_tokens=8)
    episode = open_episode(dataset / "episode_0.hdf5")
    images = [[episode.frame("cam_high", 0), episode.frame("cam_high", t)] for t in (3, 7)]
    instructions = ["Fold.", "Transfer the red cube to the other arm, and then insert the peg into the socket."]
    together = describer(images, instructions)
    alone = [describer([pair], [instruction])[0] for pair, instruction in zip(images, instructions)]
    assert together == alone and together[0] != together[1]
    assert all(text and text == " ".join(text.split()) for text in together)


@pytest.mark.parametrize("model_type", ["qwen2_vla", "dex_vla"])
def test_a_dexvla_checkpoint_is_no_describer(dataset, tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=f"plain Qwen2-VL.*found {model_type}"):
        propose(str(dataset), str(tmp_path), str(tmp_path / "draft.csv"))
    assert not (tmp_path / "draft.csv").exists()


def test_models_that_are_not_there_or_not_whole(tiny_base, tmp_path):
    with pytest.raises(UserError, match="--model nowhere: expected a folder"):
        Describer("nowhere")
    for file in Path(tiny_base).iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[:-1000] if file.suffix == ".safetensors" else data)
    with pytest.raises(UserError, match="expected a whole Qwen2-VL"):
        Describer(str(tmp_path), "cpu")
    weights = load_file(Path(tiny_base) / "model.safetensors")
    weights.pop(next(name for name in weights if "layers.0.self_attn.q_proj.weight" in name))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"expected all weights, found none for .*q_proj\.weight"):
        Describer(str(tmp_path), "cpu")
    with pytest.raises(UserError, match="--device nonsense"):
        Describer(tiny_base, "nonsense")


def test_outputs_and_cameras_are_checked_first(dataset, tmp_path):
    with pytest.raises(UserError, match="ends in .csv"):
        propose(str(dataset), "nowhere", str(tmp_path / "draft.json"))
    with pytest.raises(UserError, match="expected the folder"):
        export(str(dataset), str(tmp_path / "none" / "out.csv"))
    with pytest.raises(UserError, match=r"fold\.hdf5: expected a camera top \(--camera\), found cam_high"):
        propose(str(dataset), "nowhere", str(tmp_path / "draft.csv"), camera="top")
    path = str(write_episode(tmp_path / "sim.hdf5", cameras=["left_wrist", "right_wrist", "top"]))
    assert choose_cameras(summarize_all([path]), None) == {path: "top"}


# ---- sheet ----


def test_a_draft_in_another_encoding_is_left_alone(dataset, tiny_base, tmp_path):
    draft = tmp_path / "draft.csv"
    draft.write_bytes("episode,start,end,text\n0,0,12,Schürze falten.\n".encode("latin-1"))
    before = draft.read_bytes()
    with pytest.raises(UserError, match="draft.csv: expected a CSV or JSON file in UTF-8"):
        propose(str(dataset), tiny_base, str(draft))
    assert draft.read_bytes() == before


def test_sheets_show_the_frames_in_their_colours_with_numbers(tmp_path):
    path = write_episode(tmp_path / "dataset" / "day" / "episode_3.hdf5", 25, cameras=ONE_CAMERA)
    with h5py.File(path, "r+") as file:
        images = file["observations/images/cam_high"]
        images[...] = 0
        images[10:20, ..., 0] = 200  # red; at 10 frames per second, the second of 0, 10, 20 and 24
    (sheet,) = write_sheets(str(tmp_path / "dataset"), str(tmp_path / "sheets"), every=1, fps=10)
    assert sheet == tmp_path / "sheets" / "day" / "episode_3.jpg"
    image = cv2.cvtColor(cv2.imread(str(sheet)), cv2.COLOR_BGR2RGB)
    assert image.shape == (40 + 240, 6 * 320, 3)
    cells = [image[40:, i * 320 : (i + 1) * 320] for i in range(6)]
    below = [cell[60:].mean((0, 1)) for cell in cells]
    assert np.allclose(below[1], [200, 0, 0], atol=4) and np.allclose([below[0], *below[2:]], 0, atol=4)
    written = [cell[:40].min(axis=2).max() > 200 for cell in cells]  # something white
    assert written == [True] * 4 + [False] * 2
    assert image[:40].max() > 200  # the title


def test_seconds_are_those_of_the_dataset(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        "data_utils.annotate.contact_sheet", lambda *args: drawn.append(args[2:4]) or np.zeros((8, 8, 3), np.uint8)
    )
    dataset = GOLDEN / "lerobot" / "lerobot_v30"
    fps = json.loads((dataset / "meta/info.json").read_text())["fps"]
    assert fps == 30
    write_sheets(str(dataset), str(tmp_path), every=0.5)
    assert drawn[1] == ([*range(0, 31, fps // 2)], fps)
    write_sheets(str(dataset), str(tmp_path), every=0.5, fps=10)
    assert drawn[4] == ([*range(0, 31, 5)], 10)


def test_a_sheet_is_not_endless(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("data_utils.annotate.MAX_THUMBNAILS", 11)
    with pytest.raises(UserError, match=r"--every 0.02: expected at most 11 frames.*found 12.*larger --every"):
        write_sheets(str(dataset), str(tmp_path / "sheets"), every=0.02)
    assert not (tmp_path / "sheets").exists()


# ---- command line ----


def test_command_line(dataset, tiny_base, tmp_path, capsys):
    labels = label_file(dataset, "0,0,6,Pick up.", "0,9,,Hand over.")
    main(["apply", labels, str(dataset), "--fill", "previous"])
    main(["export", str(dataset), "--output", str(tmp_path / "out.csv")])
    main(["sheet", str(dataset), "--output", str(tmp_path / "sheets"), "--every", "0.1"])
    main(["propose", str(dataset), "--model", tiny_base, "--output", str(tmp_path / "d.csv"), "--max_new_tokens", "2"])
    printed = capsys.readouterr().out
    assert "wrote the labels of 1 episodes; 0 held them already" in printed
    assert "3 frames had no text of their own" in printed
    assert "does not name 2 episodes" in printed and "episode_1.hdf5, more/fold.hdf5" in printed
    assert "2 episodes have no labels: episode_1.hdf5, more/fold.hdf5" in printed
    assert "wrote 3 sheets" in printed and "wrote labels of 3 episodes" in printed
    with pytest.raises(SystemExit, match="2"):
        main(["sheet", str(dataset), "--output", str(tmp_path), "--every", "0"])
    assert "invalid positive float value: '0'" in capsys.readouterr().err


def test_errors_are_one_message_and_status_1(dataset):
    done = run(["-m", "data_utils.annotate", "apply", label_file(dataset, "nowhere,0,,Wait."), str(dataset)])
    assert done.returncode == 1 and "line 2: expected an episode of" in done.stdout
    assert done.stdout.startswith("error: ") and "Traceback" not in done.stdout
