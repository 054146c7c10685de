"""Exponential moving average of the trained weights, as a Trainer callback."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

EMA_FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Keeps a fp32 average of every trained parameter and saves it as `ema.safetensors` in each checkpoint.

    The decay warms up as `1 - (1 + step) ** -power` (Diffusion Policy, arXiv 2303.04137), up to `max_decay`.
    """

    def __init__(self, power: float = 0.75, max_decay: float = 0.9999):
        self.power = power
        self.max_decay = max_decay
        self.names: list[str] = []
        self.average: list[torch.Tensor] = []

    def decay(self, step: int) -> float:
        return min(self.max_decay, 1 - (1 + step) ** -self.power) if step > 0 else 0.0

    @staticmethod
    def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        trained = self._trained(model)
        self.names = list(trained)
        stored = {}
        if state.global_step:
            path = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", EMA_FILE)
            stored = load_file(path) if os.path.isfile(path) else {}
            if not stored:
                print(f"--using_ema True: {path} does not exist, the average starts from the current weights")
        self.average = [stored.get(name, p).to(p.device, torch.float32).clone() for name, p in trained.items()]

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        current = [p.float() for p in self._trained(model).values()]
        torch._foreach_lerp_(self.average, current, 1 - self.decay(state.global_step))

    @contextmanager
    def in_place_of_the_weights(self, model: nn.Module) -> Iterator[None]:
        """The model acts with the average meanwhile."""
        trained = self._trained(model)
        weights = [p.clone() for p in trained.values()]
        try:
            for p, average in zip(trained.values(), self.average):
                p.copy_(average)
            yield
        finally:
            for p, weight in zip(trained.values(), weights):
                p.copy_(weight)

    def save(self, args, folder: str):
        """Part of writing a checkpoint, so that none lacks it."""
        if args.should_save:
            tensors = {name: tensor.cpu() for name, tensor in zip(self.names, self.average)}
            save_file(tensors, os.path.join(folder, EMA_FILE))
