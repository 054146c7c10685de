"""CUDA graphs: a function's kernels recorded once and then started with a single call."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_CALLS = 2  # libraries allocate and choose kernels in the first calls
MOST_KEPT = 16  # shapes of one function


class Replayed:
    """A function of tensors that on CUDA is captured once per combination of shapes; elsewhere it is just called.

    The function must ask nothing of the device, and calling it twice must do no harm: capturing takes several calls.
    """

    def __init__(self, function: Callable[..., Tensor | None], enabled: bool):
        self.function = function
        self.enabled = enabled
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor | None]] = {}

    def __call__(self, *tensors: Tensor) -> Tensor | None:
        if not self.enabled:
            return self.function(*tensors)
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
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.function(*inputs)
        return graph, inputs, output
