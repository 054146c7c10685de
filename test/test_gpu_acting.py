"""Acting with captured CUDA graphs: the numbers of the same functions called as they are."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from policy_heads.diffusion import ZeroLinear

from .helpers import relative_error
from .test_step import make_batch

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LIMIT = 6
CLOSE = 1e-4  # of fp32; the graphs may have been captured with other kernels


@pytest.fixture
def model(model):
    for module in model.modules():
        if isinstance(module, ZeroLinear):  # else the condition would have no effect
            torch.nn.init.normal_(module.weight, std=0.02)
    return model.to(DEVICE).eval()


def make_queries(processor) -> list[dict]:
    """Of several shapes; some have the same shape and other contents."""
    queries = []
    generator = torch.Generator().manual_seed(0)
    for indices in ((2,), (15,), (2, 15), (25, 2), (2, 15, 25)):
        batch = make_batch(processor, size=(56, 56), indices=indices)
        rows = len(indices)
        inputs = {name: batch[name].to(DEVICE) for name in ("input_ids", "attention_mask", "position_ids", "states")}
        inputs["images"] = [image.to(DEVICE) for image in batch["images"]]
        inputs["noise"] = torch.randn(rows, 8, 14, generator=generator).to(DEVICE)
        known = torch.rand(rows, 8, 14, generator=generator).to(DEVICE) * 2 - 1
        weights = torch.linspace(1, 0, 8, device=DEVICE).expand(rows, -1)
        queries += [
            inputs,
            inputs | {"drafts": [[5, 6, 7]] * rows},
            inputs | {"drafts": [list(range(8, 28))] * rows, "max_new_tokens": 40},
            inputs | {"answers": ["Pick up the cube.Next action:"] + [None] * (rows - 1)},
            inputs | {"known": known, "known_weights": weights},
        ]
    return queries


def act(model, processor, query: dict) -> tuple[Tensor, list[str]]:
    return model.predict_action(**{"max_new_tokens": LIMIT} | query, tokenizer=processor.tokenizer)


def assert_same(got: list, expected: list):
    for (actions, texts), (wanted, wanted_texts) in zip(got, expected, strict=True):
        assert relative_error(actions.cpu(), wanted.cpu()) < CLOSE
        assert texts == wanted_texts


@pytest.fixture
def queries(processor):
    return make_queries(processor)


@pytest.fixture
def expected(model, processor, queries):
    model.way_of_acting = "fast"
    results = [act(model, processor, query) for query in queries]
    model.way_of_acting = "captured"
    return results


def test_captured_in_turn_and_replayed_in_any_order(model, processor, queries, expected):
    assert_same([act(model, processor, query) for query in queries], expected)
    assert all(writer.step.captured and writer.read.captured for writer in model._kept.writers.values())
    backwards = [act(model, processor, query) for query in reversed(queries)]
    assert_same(backwards[::-1], expected)


def test_captured_in_a_thread_while_another_uses_the_device(model, processor, queries, expected):
    results = []
    with ThreadPoolExecutor(1) as thread:
        for query in queries:
            answer = thread.submit(act, model, processor, query)
            while not answer.done():
                assert torch.ones(1024, device=DEVICE).sum().item() == 1024  # waits, which a capture could forbid
            results.append(answer.result())
    assert_same(results, expected)


def test_memory_is_that_of_the_largest_query(model, processor, queries, expected):
    before = torch.cuda.memory_reserved()
    for query in queries:
        act(model, processor, query)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    after_first = torch.cuda.memory_reserved()
    assert after_first - before < 2**30  # toy widths: workspaces of the libraries, mostly
    for _ in range(2):
        for query in queries:
            act(model, processor, query)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - after_first < 2**26


def test_weights_that_move_are_captured_again(model, processor, queries, expected):
    act(model, processor, queries[0])
    copied = copy.deepcopy(model)
    model.cpu().to(DEVICE)
    held = torch.empty(1024, 1024, device=DEVICE)  # perhaps where the weights were
    assert_same([act(model, processor, query) for query in queries[:3]], expected[:3])
    assert_same([act(copied, processor, query) for query in queries[:3]], expected[:3])
    assert held.is_cuda


def test_attention_never_falls_back_to_the_slow_kernels(model, processor, queries):
    model.to(torch.bfloat16).way_of_acting = "fast"
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        actions = [act(model, processor, query)[0] for query in queries[:10]]
    assert all(chunk.isfinite().all() for chunk in actions)


def test_compiled_and_captured(model, processor, queries, expected):
    model.compile_for_acting()
    try:
        got = [act(model, processor, query) for query in queries[:10]]
        assert_same(got + [act(model, processor, query) for query in queries[:10]], 2 * expected[:10])
    finally:
        torch.compiler.reset()
