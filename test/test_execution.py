"""Executing chunks: against numbers worked out by hand, and ACT's formula."""

import subprocess
import sys

import numpy as np
import pytest

from evaluate.execution import ActionQueue, DeltaIntegrator

from .helpers import ROOT


def chunk(*values):
    """(T, 2) actions: the values, and their negatives."""
    return np.array([[value, -value] for value in values], np.float32)


def popped(queue, count):
    """The first dimension of the next `count` actions."""
    actions = [queue.pop() for _ in range(count)]
    assert all(np.allclose(action[1], -action[0]) for action in actions)
    return [float(action[0]) for action in actions]


def test_a_whole_chunk_by_default():
    queue = ActionQueue()
    assert queue.needs_chunk() and queue.remaining().shape == (0, 0)
    queue.push(chunk(1, 2, 3))
    assert not queue.needs_chunk()
    assert popped(queue, 2) == [1, 2]
    assert np.array_equal(queue.remaining(), chunk(3)) and not queue.needs_chunk()
    assert popped(queue, 1) == [3]
    assert queue.needs_chunk() and queue.remaining().shape == (0, 2)
    with pytest.raises(IndexError, match="expected a chunk to be pushed"):
        queue.pop()
    queue.push(chunk(4, 5, 6))
    assert popped(queue, 3) == [4, 5, 6]


def test_query_frequency():
    queue = ActionQueue(2)
    queue.push(chunk(1, 2, 3, 4))
    assert popped(queue, 2) == [1, 2] and queue.needs_chunk()
    assert popped(queue, 1) == [3]  # no new one yet: the running one goes on
    assert queue.needs_chunk()
    queue.push(chunk(10, 20, 30, 40))
    assert not queue.needs_chunk() and popped(queue, 2) == [10, 20] and queue.needs_chunk()
    queue.reset()
    assert queue.needs_chunk() and queue.remaining().shape == (0, 0)


def test_a_late_chunk_skips_what_is_past():
    queue = ActionQueue(3)
    queue.push(chunk(1, 2, 3, 4, 5))
    popped(queue, 3)
    # observed now; two more actions run while the policy computes
    popped(queue, 2)
    queue.push(chunk(4, 5, 6, 7, 8), late=2)
    assert np.array_equal(queue.remaining(), chunk(6, 7, 8))
    assert popped(queue, 1) == [6] and queue.needs_chunk()  # three steps after its observation


def test_an_early_chunk_takes_over_at_once():
    queue = ActionQueue()
    queue.push(chunk(1, 2, 3))
    popped(queue, 1)
    queue.push(chunk(7, 8, 9))
    assert popped(queue, 3) == [7, 8, 9]


def act_formula(chunks, step, decay):
    """ACT's own way: a table (query, step) of predictions, its column averaged."""
    length = len(chunks[0])
    table = np.full((len(chunks), len(chunks) + length), np.nan)
    for query, values in enumerate(chunks):
        table[query, query : query + length] = values
    column = table[: step + 1, step]
    column = column[~np.isnan(column)]
    weights = np.exp(-decay * np.arange(len(column)))
    return (column * weights / weights.sum()).sum()


def test_temporal_ensembling_is_acts():
    queue = ActionQueue(ensemble=True, decay=0.5)
    rng = np.random.default_rng(0)
    chunks = rng.normal(size=(9, 4))
    for step, values in enumerate(chunks):
        assert queue.needs_chunk()
        queue.push(chunk(*values))
        assert popped(queue, 1)[0] == pytest.approx(act_formula(chunks, step, 0.5), abs=1e-6)
    # by hand, two predictions for one step: the older one, 3, has weight 1, the newer one, 10, exp(-0.5)
    queue.reset()
    queue.push(chunk(1, 3))
    assert popped(queue, 1) == [1]
    queue.push(chunk(10, 20))
    assert popped(queue, 1)[0] == pytest.approx((3 + 0.6065307 * 10) / 1.6065307, rel=1e-6)


def test_ensembling_with_fewer_queries():
    queue = ActionQueue(2, ensemble=True, decay=0.0)
    queue.push(chunk(1, 2, 3))
    assert popped(queue, 2) == [1, 2]
    queue.push(chunk(5, 6, 7))
    assert popped(queue, 2) == [4, 6]  # (3 + 5) / 2, then the new one alone
    late = ActionQueue(2, ensemble=True, decay=0.0)
    late.push(chunk(1, 2, 3, 4))
    popped(late, 2)
    late.push(chunk(5, 6, 7), late=1)  # row 1 belongs to this step
    assert popped(late, 1) == [4.5]


def test_smoothing():
    queue = ActionQueue(smoothing=0.75)
    queue.push(chunk(0, 4, 4))
    assert popped(queue, 3) == [0, 1, 1.75]
    queue.push(chunk(1.75, 0, 0))  # goes on across chunks
    assert popped(queue, 2) == [1.75, 1.3125]
    queue.reset()
    queue.push(chunk(8))
    assert popped(queue, 1) == [8]


def test_blending():
    queue = ActionQueue(2, blend=3)
    queue.push(chunk(0, 0, 0, 0, 0, 0))
    assert popped(queue, 2) == [0, 0]
    queue.push(chunk(4, 4, 4, 4, 4, 4))
    assert np.array_equal(queue.remaining(), chunk(1, 2, 3, 4, 4, 4))
    assert popped(queue, 4) == [1, 2, 3, 4]
    queue.push(chunk(0, 0, 0, 0, 0, 0), late=1)  # two rows are left of the running one: a shorter fade
    assert popped(queue, 3) == pytest.approx([4 * 2 / 3, 4 / 3, 0])


def test_what_cannot_be_executed():
    for settings, expected in [
        ({"query_frequency": 0}, "query_frequency: expected at least 1, found 0"),
        ({"smoothing": 1.0}, "smoothing: expected a number in"),
        ({"smoothing": float("nan")}, "smoothing: expected a number in"),
        ({"decay": -1.0}, "decay: expected a number >= 0"),
        ({"blend": 2, "ensemble": True}, "blend: expected a number of steps"),
    ]:
        with pytest.raises(ValueError, match=expected):
            ActionQueue(**settings)
    queue = ActionQueue(3)
    with pytest.raises(ValueError, match="query_frequency: expected at most the chunk's 2 actions, found 3"):
        queue.push(chunk(1, 2))
    with pytest.raises(ValueError, match=r"chunk: expected the shape \(T, A\), found \(3,\)"):
        queue.push(np.zeros(3))
    with pytest.raises(ValueError, match="late: expected 0 .. 2"):
        queue.push(chunk(1, 2, 3), late=3)
    queue.push(chunk(1, 2, 3))
    with pytest.raises(ValueError, match=r"chunk: expected the shape \(T, 2\), found \(3, 4\)"):
        queue.push(np.zeros((3, 4)))


def test_differences_add_up_to_commands():
    commands = np.array([[0.5, 1.0], [0.7, 1.0], [0.6, 0.2], [0.6, 0.2]])
    integrate = DeltaIntegrator(commands[0])
    differences = np.diff(commands, axis=0, append=commands[-1:])  # as EpisodicDataset makes them
    got = [integrate(difference) for difference in differences]
    assert np.allclose(got, [*commands[1:], commands[-1]])


def test_a_robots_computer_needs_no_pytorch():
    code = "import sys, evaluate.execution, evaluate.simulated_robot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
