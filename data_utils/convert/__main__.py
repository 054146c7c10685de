"""Converts episodes between formats.

    python -m data_utils.convert rlds SRC OUT         RLDS (tensorflow-datasets folder) -> HDF5, without TensorFlow
    python -m data_utils.convert lerobot SRC OUT      LeRobot v2.0, v2.1, v3.0 -> HDF5
    python -m data_utils.convert to-lerobot SRC OUT   HDF5, or LeRobot of any version -> LeRobot v3.0
    python -m data_utils.convert jpeg SRC OUT         HDF5 with raw frames -> HDF5 with JPEG frames
    python -m data_utils.convert truncate SRC OUT     HDF5 -> HDF5 with fewer frames

SRC is a file or a folder, searched with its subfolders; OUT is a folder, outside SRC, and keeps the subfolders' names.
Episodes are converted one by one, so memory does not grow with their number. What OUT holds already is skipped, so the
same command takes up where an interrupted one stopped; no file has its name before it is whole. Delete OUT to convert
again with other flags. `COMMAND --help` tells a command's flags.
"""

import argparse
from pathlib import Path

from ..errors import UserError, run_command
from . import compress_hdf5, convert_lerobot, convert_rlds, convert_to_lerobot, truncate_hdf5
from .files import Report

NAMES = {
    "rlds": "a tensorflow-datasets folder (features.json, *.tfrecord-*), or one above it",
    "lerobot": "a LeRobot folder, one above several of them, or one episode: FOLDER/episode_000012",
    "to-lerobot": "an HDF5 file, or a folder with HDF5 files or LeRobot datasets",
    "jpeg": "an HDF5 file, or a folder with some",
    "truncate": "an HDF5 file, or a folder with some",
}
CAMERA_HELP = "may be given several times; then only these are taken. Default: all, under their own names"


def _integer(lowest: int, highest: int):
    def parse(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"expected an integer from {lowest} to {highest}, found {text!r}")
        return int(text)

    return parse


def _camera(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not name or not source or "/" in name:
        raise argparse.ArgumentTypeError(f"expected NAME=SOURCE, as in cam_high=image, found {text!r}")
    return name, source


def _cameras(pairs: list[tuple[str, str]] | None) -> dict[str, str] | None:
    names = [name for name, _ in pairs or ()]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--camera: expected each name once, found {name} {names.count(name)} times")
    return dict(pairs) if pairs else None


def _add_jpeg(parser: argparse.ArgumentParser):
    text = "store frames as JPEG of this quality, 1..100 (90 is hardly visible). Default: raw frames"
    parser.add_argument("--jpeg", type=_integer(1, 100), metavar="QUALITY", help=text)


def _rlds(args: argparse.Namespace) -> Report:
    return convert_rlds(
        args.source,
        args.out,
        split=args.split,
        sim=args.sim,
        jpeg_quality=args.jpeg,
        qpos=args.qpos,
        action=args.action,
        cameras=_cameras(args.camera),
        language=args.language,
        reasoning=args.reasoning,
    )


def _add_rlds(parser: argparse.ArgumentParser):
    add = parser.add_argument
    parser.description = (
        "RLDS -> ACT HDF5 episodes OUT/SPLIT/episode_000000.hdf5. FEATURE is a path of features.json, such as "
        "steps/observation/state, or its end, state, where that is not ambiguous. What is not named is guessed; the "
        "mapping is printed, and so is what is left out."
    )
    add(
        "--qpos",
        action="append",
        metavar="FEATURE",
        help="proprioception; given several times, features are put side by side",
    )
    add("--action", action="append", metavar="FEATURE", help="actions; likewise")
    add("--camera", action="append", type=_camera, metavar="NAME=FEATURE", help=f"an image; {CAMERA_HELP}")
    add("--language", metavar="FEATURE", help="the instruction: a text of the episode, or of every step and constant")
    add("--reasoning", metavar="FEATURE", help="sub-step reasoning: a text of every step. Default: none")
    add("--split", metavar="NAME", help="train, test, … Default: all")
    _add_jpeg(parser)
    sim = parser.add_mutually_exclusive_group()
    add = sim.add_argument
    text = "action[t] answers observation t, which is how RLDS pairs them (attribute sim=True; the default)"
    add("--sim", dest="sim", action="store_true", default=True, help=text)
    text = "action[t] was recorded one step late, and row t-1 belongs to observation t (attribute sim=False)"
    add("--real", dest="sim", action="store_false", help=text)


def _lerobot(args: argparse.Namespace) -> Report:
    return convert_lerobot(args.source, args.out, _cameras(args.camera), args.jpeg)


def _add_lerobot(parser: argparse.ArgumentParser):
    parser.description = (
        "LeRobot datasets -> ACT HDF5 episodes OUT/episode_000012.hdf5. A feature `reasoning` becomes "
        "substep_reasonings, the task language_raw; it must not change within an episode. qvel is zero."
    )
    text = f"NAME in the HDF5 file, SOURCE in the dataset (without observation.images.); {CAMERA_HELP}"
    parser.add_argument("--camera", action="append", type=_camera, metavar="NAME=SOURCE", help=text)
    _add_jpeg(parser)


def _to_lerobot(args: argparse.Namespace) -> Report:
    return convert_to_lerobot(
        args.source,
        args.out,
        args.codec,
        cameras=_cameras(args.camera),
        fps=args.fps,
        robot_type=args.robot_type,
        data_megabytes=args.data_files_size_in_mb,
        video_megabytes=args.video_files_size_in_mb,
    )


def _add_to_lerobot(parser: argparse.ArgumentParser):
    add = parser.add_argument
    parser.description = (
        "Episodes -> one LeRobot v3.0 dataset, as lerobot 0.4.4 writes it: videos with a key frame every second frame, "
        "crf 30, yuv420p (lossy). Action rows are stored as they are; if they lag one step (sim False), info.json says "
        'so: "dexvla": {"sim": false}. Episodes of one dataset share dimensions, cameras and sizes. A second run '
        "appends episodes that are new in SRC."
    )
    add("--fps", type=_integer(1, 1000), help="frames per second. Default: a LeRobot source's own, else 50")
    add("--robot_type", metavar="NAME", help="for info.json. Default: a LeRobot source's own, else aloha")
    text = "of the videos. Default: av1; where PyAV has no encoder for it, h264 (what is used is printed)"
    add("--codec", choices=("av1", "h264", "hevc"), default="av1", help=text)
    text = f"NAME in the new dataset, SOURCE in the episodes; {CAMERA_HELP}"
    add("--camera", action="append", type=_camera, metavar="NAME=SOURCE", help=text)
    for kind, default in (("data", 100), ("video", 200)):
        text = f"several episodes share a {kind} file up to this size. Default: {default}"
        add(f"--{kind}_files_size_in_mb", type=_integer(1, 10**6), default=default, metavar="MB", help=text)


def _jpeg(args: argparse.Namespace) -> Report:
    return compress_hdf5(args.source, args.out, args.quality)


def _add_jpeg_command(parser: argparse.ArgumentParser):
    parser.description = "Encodes raw frames as JPEG; all other data and attributes are copied unchanged."
    parser.add_argument("--quality", type=_integer(1, 100), default=90, help="1..100. Default: 90")


def _truncate(args: argparse.Namespace) -> Report:
    if args.length is None and args.start is None and args.stop is None:
        raise UserError("truncate: expected --length N, or --start S and/or --stop E, found neither")
    if args.length is not None and (args.start is not None or args.stop is not None):
        raise UserError("truncate: expected either --length or --start/--stop, found both")
    return truncate_hdf5(args.source, args.out, args.start or 0, args.length if args.stop is None else args.stop)


def _add_truncate(parser: argparse.ArgumentParser):
    add = parser.add_argument
    parser.description = (
        "Cuts every dataset whose first dimension is the number of frames (and compress_len along its second). "
        "An episode that ends before E keeps its end; one without frame S is an error."
    )
    add("--length", type=_integer(1, 10**9), metavar="N", help="keep the first N frames")
    add("--start", type=_integer(0, 10**9), metavar="S", help="first frame to keep. Default: 0")
    add("--stop", type=_integer(1, 10**9), metavar="E", help="first frame after those to keep. Default: the end")


COMMANDS = {
    "rlds": (_add_rlds, _rlds, "RLDS (tensorflow-datasets) -> HDF5"),
    "lerobot": (_add_lerobot, _lerobot, "LeRobot v2.0, v2.1, v3.0 -> HDF5"),
    "to-lerobot": (_add_to_lerobot, _to_lerobot, "HDF5 or LeRobot -> LeRobot v3.0"),
    "jpeg": (_add_jpeg_command, _jpeg, "raw HDF5 -> JPEG HDF5"),
    "truncate": (_add_truncate, _truncate, "HDF5 -> fewer frames"),
}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_flags, _, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary)
        subparser.add_argument("source", type=Path, metavar="SRC", help=NAMES[name])
        subparser.add_argument("out", type=Path, metavar="OUT", help="folder to write; outside SRC")
        add_flags(subparser)
    args = parser.parse_args(argv)
    try:
        print(COMMANDS[args.command][1](args))
    except (UserError, OSError) as error:  # a full disk or a missing right is the user's to mend, too
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    run_command(main)
