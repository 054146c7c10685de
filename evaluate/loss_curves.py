"""`python -m evaluate.loss_curves outputs/stage2 [outputs/stage3 …] --output losses.png`: what a run's losses did."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from data_utils import UserError, run_command

LOSSES = ("loss", "llm_loss", "action_loss")


def read_history(folder: str) -> list[dict]:
    """The log of a finished run, or of its newest checkpoint: one dict per logged step."""
    states = sorted(Path(folder).glob("**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        raise UserError(f"{folder}: expected trainer_state.json, written by training, found none")
    return json.loads(states[-1].read_text())["log_history"]


def plot_losses(folders: list[str], output: str):
    """One row per run; training losses as lines, validation losses as dots; logarithmic scale."""
    fig, axes = plt.subplots(
        len(folders), len(LOSSES), figsize=(4 * len(LOSSES), 2.8 * len(folders)), squeeze=False, layout="constrained"
    )
    for folder, row in zip(folders, axes):
        history = read_history(folder)
        for name, axis in zip(LOSSES, row):
            for key, style, label in ((name, "-", "training"), (f"eval_{name}", "o--", "validation")):
                points = [(entry["step"], entry[key]) for entry in history if key in entry]
                if points:
                    axis.plot(*zip(*points), style, label=label, markersize=4)
            axis.set(title=f"{Path(folder).name}: {name}", xlabel="step", yscale="log")
            axis.grid(alpha=0.3, which="both")
            axis.legend()
    fig.savefig(output, dpi=110)
    plt.close(fig)
    print(f"wrote {output}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", help="output folders of training runs")
    parser.add_argument("--output", default="losses.png")
    arguments = parser.parse_args()
    plot_losses(arguments.folders, arguments.output)


if __name__ == "__main__":
    run_command(main)
