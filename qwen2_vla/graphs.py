"""CUDA graphs: a function's kernels recorded once and then started with a single call."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_CALLS = 2  # libraries allocate and choose kernels in the first calls
MOST_KEPT = 16  # shapes of one function


class Graphs:
    """What the graphs of one model share: they never run at once, so they can work in the same memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)  # libraries keep a workspace for every stream
        self.pool = torch.cuda.graph_pool_handle()


class Replayed:
    """A function of tensors that is captured once per combination of shapes; without `graphs` it is just called.

    The function must ask nothing of the device, and calling it twice must do no harm: capturing takes several calls.
    """

    def __init__(self, function: Callable[..., Tensor | None], graphs: Graphs | None):
        self.function = function
        self.graphs = graphs
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor | None]] = {}

    def __call__(self, *tensors: Tensor) -> Tensor | None:
        if self.graphs is None:
            return self.function(*tensors)
        with torch.cuda.device(self.graphs.device):
            key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
            if key not in self.captured:
                if len(self.captured) == MOST_KEPT:
                    del self.captured[next(iter(self.captured))]
                self.captured[key] = self._capture(tensors)
            graph, inputs, output = self.captured[key]
            for kept, tensor in zip(inputs, tensors, strict=True):
                kept.copy_(tensor)
            graph.replay()
            return None if output is None else output.clone()

    def _capture(self, tensors: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor | None]:
        inputs = [tensor.clone() for tensor in tensors]
        stream, caller = self.graphs.stream, torch.cuda.current_stream()
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self.function(*inputs)
        caller.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, which may be rendering, are not forbidden to use the device meanwhile
        with torch.cuda.graph(graph, pool=self.graphs.pool, stream=stream, capture_error_mode="thread_local"):
            output = self.function(*inputs)
        return graph, inputs, output
