"""What is drawn, and how often."""

from collections import Counter

import pytest
import torch

from data_utils import EpisodeSampler, SamplingPlan

LENGTHS, SOURCES = [100, 300, 100], [0, 0, 1]


def draws(sampler: EpisodeSampler, epochs: int) -> list[int]:
    indices = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        indices += [index for index, _ in sampler]
    return indices


def episode_of(index: int) -> int:
    return 0 if index < 100 else 1 if index < 400 else 2


def test_every_frame_once_without_weights():
    sampler = EpisodeSampler(SamplingPlan(LENGTHS, SOURCES, None))
    indices = [index for index, _ in sampler]
    assert sorted(indices) == list(range(500)) != indices


@pytest.mark.parametrize(
    "weights, episode_first, expected",
    [
        (None, True, [1 / 3, 1 / 3, 1 / 3]),
        ([1, 3], False, [1 / 16, 3 / 16, 3 / 4]),
        ([1, 3], True, [1 / 8, 1 / 8, 3 / 4]),
        ([0, 1], False, [0, 0, 1]),
    ],
)
def test_draws_follow_their_distribution(weights, episode_first, expected):
    sampler = EpisodeSampler(SamplingPlan(LENGTHS, SOURCES, weights, episode_first))
    assert torch.allclose(sampler.episode_probabilities(), torch.tensor(expected, dtype=torch.float64))
    indices = draws(sampler, 40)  # 20,000 draws
    counts = Counter(episode_of(i) for i in indices)
    for episode, probability in enumerate(expected):
        deviation = (len(indices) * probability * (1 - probability)) ** 0.5
        assert abs(counts[episode] - len(indices) * probability) <= 4 * deviation
    third = [i - 400 for i in indices if i >= 400]  # frames within an episode are equally likely
    assert abs(sum(third) / len(third) - 49.5) < 4 * 28.9 / len(third) ** 0.5
    assert min(third) >= 0 and max(third) < 100


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = EpisodeSampler(SamplingPlan(LENGTHS, SOURCES, [1, 1]), seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(3)  # the global random state plays no part
        return [index for index, _ in sampler]

    assert order(0, 1) == order(0, 1) != order(0, 2) != order(1, 1)


class Frames(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return index[0]

    def __len__(self):
        return 16


def test_the_trainers_loader_reaches_the_sampler():
    """accelerate wraps the sampler; a new epoch must still give a new order, and ranks must share it."""
    from accelerate.data_loader import prepare_data_loader

    loaders = []
    for rank in range(2):
        sampler = EpisodeSampler(SamplingPlan([16], [0], None))
        loader = torch.utils.data.DataLoader(Frames(), batch_size=2, sampler=sampler)
        loaders.append(prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False))
    epochs = []
    for epoch in range(2):
        seen = []
        for loader in loaders:
            loader.set_epoch(epoch)
            seen += [int(i) for batch in loader for i in batch]
        assert sorted(seen) == list(range(16))
        epochs.append(seen)
    assert epochs[0] != epochs[1]
