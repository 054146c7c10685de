"""What keeps a long run from losing work: whole checkpoints, signals, and steps whose numbers are not finite."""

import errno
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from data_utils import UserError

PARTIAL = ".partial"  # folder in output_dir that a checkpoint is written in


@contextmanager
def written_beside(output_dir: str, step: int, accelerator) -> Iterator[str]:
    """Yields the folder in which to write `checkpoint-<step>`, on every rank; then it gets its place and name at once.

    Raises:
        UserError: when it cannot be written, for want of space for instance. What was there before stays.
    """
    partial = Path(output_dir) / PARTIAL
    if accelerator.is_local_main_process:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it wrote
    accelerator.wait_for_everyone()
    name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
    try:
        yield str(partial)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{Path(output_dir) / name}: expected to write a checkpoint, found {type(error).__name__}: {error}; "
            "the checkpoints before it are whole"
        ) from error
    accelerator.wait_for_everyone()
    # On a disk that machines share the first of them does it; where each has its own, the others after it
    if accelerator.is_main_process:
        _put_in_place(partial / name)
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process and not accelerator.is_main_process:
        try:
            _put_in_place(partial / name)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # what the first machine took; NFS may still list it
                raise
    accelerator.wait_for_everyone()


def _put_in_place(written: Path):
    """Moves `.partial/checkpoint-N` up. Nothing is touched before `written` is taken."""
    partial, final = written.parent, written.parent.parent / written.name
    taken = partial / "taken"
    os.replace(written, taken)
    if final.exists():
        os.replace(final, partial / "replaced")
    os.replace(taken, final)
    shutil.rmtree(partial, ignore_errors=True)


class StopOnSignal(TrainerCallback):
    """SIGTERM, with which clusters announce that they take the machine: saves and stops after the step, on all ranks.

    Ranks hear of it at different times, so the first one says in the store that all ranks share where to stop.
    """

    KEY = "dexvla_stop_after_step"

    def __init__(self):
        self.received = False
        self.stopped_at: int | None = None
        self.previous = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_):
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._last_step(state.global_step) <= state.global_step:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step
            if state.is_world_process_zero:
                print(f"SIGTERM: saving and stopping after step {state.global_step}", flush=True)

    def _last_step(self, step: int) -> float:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return step if self.received else float("inf")
        store = dist.distributed_c10d._get_default_store()
        if self.received:
            # ranks are at most a step apart
            store.compare_set(self.KEY, "", str(step + 2))
            self.received = False
        return int(store.get(self.KEY)) if store.check([self.KEY]) else float("inf")

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.previous or signal.SIG_DFL)


class FiniteSteps:
    """Skips optimizer steps whose gradient is not finite, without waiting for the device, and tells whose they were.

    Args:
        limit: more skipped steps than this stop the training.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.skipped: list[str] = []  # a line for each
        self.pending: list[tuple[int, list | None, torch.Tensor]] = []  # step, sources, whether it is not finite

    def watch(self, step: int, value: torch.Tensor, sources: list[tuple[str, int]] | None = None):
        """Notes a loss (with its `sources`) or gradient norm of `step`, to be looked at when something is logged."""
        self.pending.append((step, sources, ~_whole(value.detach()).isfinite().all()))

    @staticmethod
    def guard(optimizer: torch.optim.Optimizer, norm: torch.Tensor):
        """Makes the next `optimizer.step()` do nothing if the gradient's norm is not finite."""
        norm = _whole(norm)
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = (~norm.isfinite()).float()  # the fused kernels look at it on the device
        elif not norm.isfinite():  # others must be asked; a parameter without gradient is not stepped
            optimizer.zero_grad(set_to_none=True)

    def report(self, accelerator):
        """To be called on every rank at once.

        Raises:
            UserError: with the list, once more than `limit` steps were skipped.
        """
        pending, self.pending = self.pending, []
        if not pending:
            return
        own = torch.stack([bad for *_, bad in pending]).float()
        steps = sorted({step for step, *_ in pending})
        places = torch.tensor([steps.index(step) for step, *_ in pending], device=own.device)
        over_all_ranks = accelerator.reduce(own.new_zeros(len(steps)).index_add_(0, places, own))
        losses = {s: sources for (s, sources, _), bad in zip(pending, own.tolist()) if bad and sources}
        for step, count in zip(steps, over_all_ranks.tolist()):
            if not count:
                continue
            what = "the gradient is not finite"
            if step in losses:
                what = f"the loss is not finite; the batch was {_listed(losses[step])}"
            self.skipped.append(f"step {step}, rank {accelerator.process_index}: {what}")
            if step in losses or accelerator.is_main_process:
                print(f"{self.skipped[-1]}; skipped", flush=True)
        if len(self.skipped) > self.limit:
            listed = "\n".join(self.skipped[-20:])
            raise UserError(
                f"--max_skipped_steps {self.limit}: expected losses and gradients to be finite, found "
                f"{len(self.skipped)} steps where they are not:\n{listed}"
            )


def _whole(value: torch.Tensor) -> torch.Tensor:
    """Under FSDP a norm is spread over the ranks."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _listed(sources: list[tuple[str, int]]) -> str:
    """(path, frame) pairs -> `path frames 3, 7; …`."""
    frames: dict[str, list[int]] = {}
    for path, frame in sources:
        frames.setdefault(path, []).append(frame)
    return "; ".join(f"{path} frames {', '.join(map(str, sorted(numbers)))}" for path, numbers in frames.items())
