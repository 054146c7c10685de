"""Which frames a training epoch sees, and in which order."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from .dataset import SamplingPlan

AT_ONCE = 65_536  # numbers of Python take 40 times the memory of a tensor's


class EpisodeSampler(Sampler[tuple[int, tuple[int, ...]]]):
    """Draws as many frames per epoch as there are, a pure function of (seed, epoch), equal on every rank.

    Yields `(frame index, (seed, epoch, position))`; the second part seeds the item's augmentation.

    Without weights and without `episode_first` it is a permutation of all frames. Otherwise it draws with replacement:
    a dataset_dir by its weight, then one of its frames; `episode_first` draws an episode before the frame, so that
    short episodes count as much as long ones.

    Args:
        plan: what `load_data` returns. seed: of the whole run.
    """

    def __init__(self, plan: SamplingPlan, *, seed: int = 0):
        self.plan = plan
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.plan.episode_lengths)

    def episode_probabilities(self) -> torch.Tensor:
        """Probability (E,) float64 of each training episode in one draw."""
        sizes = torch.tensor(self.plan.episode_lengths, dtype=torch.float64)  # (E,)
        if self.plan.episode_first:
            sizes = torch.ones_like(sizes)
        if self.plan.sample_weights is None:
            return sizes / sizes.sum()
        sources = torch.tensor(self.plan.episode_sources)  # (E,)
        weights = torch.tensor(self.plan.sample_weights, dtype=torch.float64)  # (dataset_dirs,)
        per_source = torch.zeros_like(weights).index_add_(0, sources, sizes)
        probabilities = weights[sources] * sizes / per_source[sources]
        return probabilities / probabilities.sum()

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        indices = self._indices()
        for start in range(0, len(indices), AT_ONCE):
            for position, index in enumerate(indices[start : start + AT_ONCE].tolist(), start):
                yield index, (self.seed, self.epoch, position)

    def _indices(self) -> torch.Tensor:
        """The epoch's frames, in order: (len(self),) int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self)
        if self.plan.sample_weights is None and not self.plan.episode_first:
            return torch.randperm(count, generator=generator)
        lengths = torch.tensor(self.plan.episode_lengths)  # (E,)
        starts = lengths.cumsum(0) - lengths
        cumulative = self.episode_probabilities().cumsum(0)
        uniform = torch.rand(2, count, generator=generator, dtype=torch.float64)
        episodes = torch.searchsorted(cumulative, uniform[0] * cumulative[-1], right=True).clamp(max=len(lengths) - 1)
        frames = (uniform[1] * lengths[episodes]).long()  # (count,)
        return starts[episodes] + frames
