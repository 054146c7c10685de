"""How fast a run is, in every line of its log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def device_name(device: torch.device) -> str:
    """As its maker calls it, "NVIDIA H200" for instance; "cpu" for the CPU."""
    return device.type if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


class StepMeter:
    """Samples per second, the share of time spent waiting for data, peak memory, and how much of the device is used.

    The clock stands still while the run evaluates or saves. Nothing here waits for the device; the log does.
    """

    def __init__(self):
        self.restart()

    def restart(self):
        self.start = time.perf_counter()
        self.waited = self.paused = 0.0
        self.samples = 0
        self.flops = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def count(self, samples: int, flops: float = 0.0):
        """Adds a micro-batch of this rank: its samples, and the floating point operations they need."""
        self.samples += samples
        self.flops += flops

    def read(self, ranks: int, peak_flops: float | None) -> dict[str, float]:
        """Figures since the last call; `peak_flops` of one device."""
        seconds = max(time.perf_counter() - self.start - self.paused, 1e-9)
        figures = {"samples_per_second": self.samples * ranks / seconds, "data_wait": self.waited / seconds}
        if peak_flops and self.flops:
            figures["mfu"] = self.flops / seconds / peak_flops
        if torch.accelerator.is_available():
            figures["peak_memory_gb"] = torch.accelerator.max_memory_allocated() / 1e9
        self.restart()
        return {name: round(value, 4) for name, value in figures.items()}
