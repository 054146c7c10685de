"""`python -m data_utils.annotate`: writes the sub-step reasoning labels that DexVLA learns to think with.

    python -m data_utils.annotate sheet DATASET --output sheets          pictures of each episode, with frame numbers
    python -m data_utils.annotate propose DATASET --model weights/Qwen2-VL-2B-Instruct --output labels.csv
                                                                         a first draft, for a person to edit
    python -m data_utils.annotate apply labels.csv DATASET               the labels, into the episodes' HDF5 files
    python -m data_utils.annotate export DATASET --output labels.csv     labels that are there already

`labels.csv` has the header `episode,start,end,text`. An episode is named by its file (`.hdf5` may be left out), by its
path within DATASET, or by a number n: episode_n. A text holds for the frames from `start` up to, without, `end` (it is
exclusive); an empty `end` is the episode's. A `.json` file holds a list of objects with the same four keys.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from .episodes import Episode, open_episode, stored_camera
from .errors import DatasetError, Finding, UserError, run_command
from .labels import COLUMNS, EpisodeNames, apply, check_output, csv_text, export, read_labels, readable, segments_of
from .lerobot import fps_of
from .summary import EpisodeSummary

PROMPT = (
    "The two images show a robot a moment ago and now. Its task: {instruction} "
    "What is it doing now? Answer with one short sentence, such as: Move the gripper above the cube."
)
BATCH_SIZE = 8  # pairs of images that the model describes at once
THUMBNAIL_WIDTH, MAX_THUMBNAILS = 320, 1000  # pixels; per sheet
FONT, FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.7


def sampled_frames(length: int, every: float, fps: float) -> range:
    """The frames of an episode that lie `every` seconds apart."""
    return range(0, length, max(1, round(every * fps)))


def choose_cameras(summaries: dict[str, EpisodeSummary], camera: str | None) -> dict[str, str]:
    """Episode path -> name of its camera `camera`; of its first one that is not on a wrist by default.

    Raises:
        DatasetError: with one line for each episode that has no such camera, or a broken one.
    """
    chosen, findings = {}, []
    for path, summary in summaries.items():
        overview = sorted(summary.cameras, key=lambda name: "wrist" in name)
        name = stored_camera(camera, summary.cameras) if camera else next(iter(overview), None)
        if name is None:
            expected = f"a camera {camera} (--camera)" if camera else "a camera"
            findings.append(Finding(path, "", expected, ", ".join(summary.cameras) or "none"))
        findings += summary.camera_findings.get(name, [])
        chosen[path] = name
    if findings:
        raise DatasetError("\n".join(map(str, findings)))
    return chosen


class Describer:
    """A Qwen2-VL that says what a robot is doing.

    Args:
        folder: a plain Qwen2-VL checkpoint. device: default is the accelerator, else the CPU.
        prompt: the question; `{instruction}` in it stands for the episode's task.

    Raises:
        UserError: when the folder holds something else, or the device is not there.
    """

    def __init__(self, folder: str, device: str | None = None, prompt: str = PROMPT, max_new_tokens: int = 40):
        from transformers import AutoModelForImageTextToText, AutoProcessor  # seconds, which other commands are spared

        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        _check_plain(folder)
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        try:
            self.device = torch.empty(0, device=device or accelerator).device
        except (RuntimeError, AssertionError) as error:  # the latter of a PyTorch without CUDA
            raise UserError(f"--device {device}: expected a device of this machine, found {error}") from error
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model, report = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"--model {folder}: expected a whole Qwen2-VL, found {error}") from error
        if report["missing_keys"]:
            raise UserError(
                f"--model {folder}: expected all weights, found none for {sorted(report['missing_keys'])[0]}"
            )
        if not getattr(self.processor, "chat_template", None):
            raise UserError(f"--model {folder}: expected a processor with a chat template, found none")
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, images: list[list[np.ndarray]], instructions: list[str]) -> list[str]:
        """B lists of frames (H, W, 3) uint8 RGB, B tasks -> B answers, each in one line; it may be empty."""
        prompts = []
        for frames, instruction in zip(images, instructions):
            question = {"type": "text", "text": self.prompt.replace("{instruction}", instruction)}
            turn = {"role": "user", "content": [{"type": "image"}] * len(frames) + [question]}
            prompts.append(self.processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True))
        flat = [frame for frames in images for frame in frames]
        inputs = self.processor(text=prompts, images=flat, padding=True, padding_side="left", return_tensors="pt")
        tokens = self.model.generate(  # (B, prompt and answer); the most likely answer, whatever the folder's defaults
            **inputs.to(self.device), max_new_tokens=self.max_new_tokens,
            do_sample=False, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        answers = self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [" ".join("".join(c if c.isprintable() else " " for c in text).split()) for text in answers]


def _check_plain(folder: str):
    config = Path(folder) / "config.json"
    try:
        model_type = json.loads(config.read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: expected a folder with a Qwen2-VL, found {error}") from error
    if model_type != "qwen2_vl":
        raise UserError(
            f"--model {folder}: expected a plain Qwen2-VL folder (model_type qwen2_vl in config.json), found "
            f"{model_type}; a DexVLA checkpoint does not answer questions: name the folder it was trained from, such "
            "as Qwen2-VL-2B-Instruct"
        )


def describe(episode: Episode, camera: str, starts: range, describer: Describer, advance: Callable) -> list[str]:
    """What the robot does at each frame of `starts`, of which the model sees the one before it, too."""
    texts = []
    for at in range(0, len(starts), BATCH_SIZE):
        batch = starts[at : at + BATCH_SIZE]
        images = [[episode.frame(camera, time) for time in (max(t - starts.step, 0), t)] for t in batch]
        texts += describer(images, [episode.instruction(t) for t in batch])
        advance(len(batch))
    return texts


def propose(
    dataset: str,
    model: str,
    output: str,
    *,
    every: float = 2.0,
    fps: float | None = None,
    camera: str | None = None,
    **options,
) -> int:
    """Adds the model's labels to the label file `output`, episode after episode; those in it already are skipped.

    Args:
        model: a plain Qwen2-VL folder; `options` are `Describer`'s.
        every: seconds between the frames it is asked about; fps: see `fps_of`.

    Returns:
        the number of episodes added.

    Raises:
        UserError: before anything is written, but for a frame that cannot be decoded.
    """
    check_output(output)
    names = EpisodeNames(dataset)
    begun = Path(output).exists() and Path(output).stat().st_size > 0
    segments = read_labels(output)[0] if begun else []
    old = Path(output).read_text(encoding="utf-8-sig") if begun else ""
    done = {path for segment in segments for path in names.find(segment.episode)}
    missing = {name: path for name, path in names.paths.items() if path not in done}
    if done:
        print(f"{output}: {len(done)} episodes are there already, {len(missing)} are missing")
    summaries = readable(missing.values(), dataset)
    cameras = choose_cameras(summaries, camera)
    if not missing:
        return 0
    describer = Describer(model, **options)
    frames = {name: sampled_frames(summaries[path].length, every, fps_of(path, fps)) for name, path in missing.items()}
    total = sum(map(len, frames.values()))
    with (
        open(output, "a", encoding="utf-8", newline="") as file,
        tqdm(total=total, desc="describing", unit="frame") as bar,
    ):
        file.write("" if old.endswith("\n") else "\n" if old else csv_text([COLUMNS]))
        for name, path in missing.items():
            episode = open_episode(path)
            texts = describe(episode, cameras[path], frames[name], describer, bar.update)
            file.write(csv_text((name, *segment) for segment in segments_of(frames[name], texts, len(episode))))
            file.flush()  # an interrupted run goes on with the next episode
            episode.close()
    return len(missing)


def contact_sheet(episode: Episode, camera: str, times: list[int], fps: float, title: str) -> np.ndarray:
    """Small frames in rows, with their numbers and seconds: (H, W, 3) uint8, RGB."""
    columns = max(6, math.isqrt(len(times)))
    thumbnails = []
    for t in times:
        frame = episode.frame(camera, t, (THUMBNAIL_WIDTH, 1))
        height = round(frame.shape[0] * THUMBNAIL_WIDTH / frame.shape[1])
        frame = cv2.resize(frame, (THUMBNAIL_WIDTH, height), interpolation=cv2.INTER_AREA)
        thumbnails.append(_with_text(frame, f"{t}  {t / fps:.1f} s"))
    thumbnails += [np.zeros_like(thumbnails[0])] * (-len(times) % columns)
    rows = [np.hstack(thumbnails[i : i + columns]) for i in range(0, len(thumbnails), columns)]
    header = _with_text(np.zeros((40, rows[0].shape[1], 3), np.uint8), title)
    return np.vstack([header, *rows])


def _with_text(image: np.ndarray, text: str) -> np.ndarray:
    (width, height), below = cv2.getTextSize(text, FONT, FONT_SCALE, 1)
    image = cv2.rectangle(image, (0, 0), (width + 12, height + below + 12), (0, 0, 0), cv2.FILLED)
    return cv2.putText(image, text, (6, height + 6), FONT, FONT_SCALE, (255, 255, 255), 1, cv2.LINE_AA)


def write_sheets(
    dataset: str, output: str, *, every: float = 1.0, fps: float | None = None, camera: str | None = None
) -> list[Path]:
    """Writes a contact sheet (JPEG) of every episode into the folder `output`: a frame every `every` seconds, and the
    last one. Sheets already there are replaced.

    Raises:
        UserError: naming each episode that cannot be read, or has too many frames for a sheet.
    """
    names = EpisodeNames(dataset).paths
    summaries = readable(names.values(), dataset)
    cameras = choose_cameras(summaries, camera)
    times = {}
    for name, path in names.items():
        length = summaries[path].length
        times[name] = sorted({*sampled_frames(length, every, fps_of(path, fps)), length - 1})
        if len(times[name]) > MAX_THUMBNAILS:
            found = f"{len(times[name])}; choose a larger --every"
            raise UserError(
                f"{path}: --every {every:g}: expected at most {MAX_THUMBNAILS} frames on a sheet, found {found}"
            )
    written = []
    for name, path in tqdm(names.items(), desc="drawing sheets", unit="episode"):
        episode = open_episode(path)
        title = f"{name}   {cameras[path]}   frames 0 to {len(episode) - 1}"
        sheet = contact_sheet(episode, cameras[path], times[name], fps_of(path, fps), title)
        episode.close()
        written.append(Path(output) / f"{name.removesuffix('.hdf5')}.jpg")
        try:
            written[-1].parent.mkdir(parents=True, exist_ok=True)
            written[-1].write_bytes(cv2.imencode(".jpg", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1].tobytes())
        except OSError as error:
            raise UserError(f"--output {output}: expected a folder to write sheets to, found {error}") from error
    return written


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = kind(text)
        if not 0 < number < math.inf:
            raise ValueError
        return number

    parse.__name__ = f"positive {kind.__name__}"  # argparse: "invalid positive float value: '0'"
    return parse


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def run_apply(labels: str, dataset: str, fill: str, overwrite: bool):
    done = apply(labels, dataset, fill, overwrite)
    print(f"wrote the labels of {len(done.written)} episodes; {len(done.unchanged)} held them already")
    if done.filled_frames:
        print(f"{done.filled_frames} frames had no text of their own and got the one before")
    if done.unnamed:
        print(f"{labels} does not name {len(done.unnamed)} episodes of {dataset}: {_some(done.unnamed)}")


def run_propose(output: str, **options):
    added = propose(output=output, **options)
    print(f"wrote labels of {added} episodes to {output}: read and edit them before you apply them")


def run_export(dataset: str, output: str):
    count, without = export(dataset, output)
    print(f"wrote the labels of {count} episodes to {output}")
    if without:
        print(f"{len(without)} episodes have no labels: {_some(without)}")


def run_sheet(**options):
    written = write_sheets(**options)
    print(f"wrote {len(written)} sheets to {options['output']}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m data_utils.annotate", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, help: str) -> Callable:
        added = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        added.set_defaults(run=run)
        return added.add_argument

    def add_sampling(add: Callable, every: float):
        add("--every", type=_positive(float), default=every, help="seconds between the frames (default: %(default)s)")
        add("--fps", type=_positive(float), help="frames per second (default: what a LeRobot dataset says, else 50)")
        add("--camera", help="default: an episode's first camera that is not on a wrist")

    dataset = "folder with episodes, searched recursively"
    add = command("apply", run_apply, "write the labels of a file into HDF5 episodes")
    add("labels", metavar="LABELS", help=".csv or .json; `end` is exclusive, an empty one is the episode's")
    add("dataset", metavar="DATASET", help=dataset)
    add("--fill", choices=("error", "previous"), default="error", help="frames without a text: the one before goes on")
    add("--overwrite", action="store_true", help="replace labels that are there")

    add = command("propose", run_propose, "let a Qwen2-VL write a first draft of the labels")
    add("dataset", metavar="DATASET", help=dataset)
    add("--model", required=True, metavar="FOLDER", help="a plain Qwen2-VL, not a DexVLA checkpoint")
    add("--output", required=True, metavar="CSV", help="label file; episodes that it names already are skipped")
    add_sampling(add, every=2.0)
    add("--max_new_tokens", type=_positive(int), default=40, help="longest answer (default: 40)")
    add("--prompt", default=PROMPT, help="question; {instruction} in it stands for the task (default: %(default)s)")
    add("--device", help="default: the accelerator, else the CPU")

    add = command("export", run_export, "write the labels that episodes hold into a file")
    add("dataset", metavar="DATASET", help=dataset)
    add("--output", required=True, metavar="CSV", help="label file to write")

    add = command("sheet", run_sheet, "draw the frames of each episode, with their numbers, as one picture")
    add("dataset", metavar="DATASET", help=dataset)
    add("--output", required=True, metavar="DIR", help="folder for the pictures; old ones there are replaced")
    add_sampling(add, every=1.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    options = vars(parse_arguments(argv))
    options.pop("run")(**options)


if __name__ == "__main__":
    run_command(main)
