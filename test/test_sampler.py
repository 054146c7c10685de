"""What is drawn, and how often."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches

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
    """Items that say which frame they are and what they were drawn with."""

    def __init__(self, count: int = 64):
        self.count = count

    def __getitem__(self, index):
        return torch.tensor([index[0], *index[1]])

    def __len__(self):
        return self.count


def loader(rank: int, ranks: int, batch_size: int, plan: SamplingPlan):
    """As the Trainer makes it."""
    sampler = EpisodeSampler(plan, seed=3)
    data = torch.utils.data.DataLoader(Frames(len(sampler)), batch_size=batch_size, sampler=sampler)
    return prepare_data_loader(data, num_processes=ranks, process_index=rank, put_on_device=False)


def steps_of(epoch: int, ranks: int, batch_size: int, plan: SamplingPlan, skip: int = 0) -> list[list]:
    """What all ranks together see in every step."""
    seen = []
    for rank in range(ranks):
        data = loader(rank, ranks, batch_size, plan)
        data.set_epoch(epoch)
        seen.append(list(skip_first_batches(data, skip) if skip else data))
    return [torch.cat(step).tolist() for step in zip(*seen, strict=True)]


@pytest.mark.parametrize("plan", [SamplingPlan([64], [0], None), SamplingPlan([40, 24], [0, 1], [1, 3], True)])
def test_the_order_is_the_same_on_one_rank_and_on_eight(plan):
    """accelerate wraps the sampler and deals its batches out; a new epoch must still give a new order."""
    epochs = []
    for epoch in range(2):
        alone, together = steps_of(epoch, 1, 16, plan), steps_of(epoch, 8, 2, plan)
        assert alone == together and len(alone) == 4
        assert [tuple(entry[1:]) for step in alone for entry in step] == [(3, epoch, p) for p in range(64)]
        epochs.append([entry[0] for step in alone for entry in step])
        if plan.sample_weights is None:
            assert sorted(epochs[-1]) == list(range(64))
    assert epochs[0] != epochs[1]


def test_a_resumed_epoch_goes_on_where_it_stopped():
    plan = SamplingPlan([40, 24], [0, 1], [1, 3])
    assert steps_of(1, 8, 2, plan, skip=3) == steps_of(1, 8, 2, plan)[3:]
