"""What acting asks of the device, what torch.compile makes of it, and the benchmark of its latency."""

import copy
import re

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks import inference
from data_utils import UserError
from policy_heads.diffusion import ZeroLinear

from .helpers import relative_error
from .test_step import HostWork, deep_model, make_batch

TINY = ["--preset", "tiny", "--device", "cpu", "--chunk_size", "4", "--queries", "1", "--tokens", "3"]


def make_inputs(processor, rows: int) -> dict:
    batch = make_batch(processor, size=(56, 56), indices=range(rows))
    names = ("input_ids", "attention_mask", "position_ids", "images", "states")
    return {name: batch[name] for name in names} | {"noise": torch.ones(rows, 8, 14)}


@pytest.fixture
def model(model):
    for module in model.modules():
        if isinstance(module, ZeroLinear):  # else the condition would have no effect
            torch.nn.init.normal_(module.weight, std=0.02)
    return model.eval()


@pytest.mark.parametrize("rows, most", [(1, (2500, 1400, 13_000)), (2, (2500, 1400, 11_000))])
def test_acting_asks_little_of_the_device(processor, rows, most):
    """On a GPU every call but those that only look at a tensor otherwise takes a kernel, about 2 us."""
    inputs, deep = make_inputs(processor, rows), deep_model().eval()
    deep.predict_action(**inputs, tokenizer=processor.tokenizer, max_new_tokens=2)
    (writer,) = deep._kept.writers.values()
    prompts = [inputs[name] for name in ("input_ids", "attention_mask", "position_ids")]
    drafts, lengths = torch.zeros(rows, 16, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    parts = (
        lambda: writer._read(*prompts, drafts, lengths, lengths.bool(), *inputs["images"]),
        writer._step,
        lambda: deep.policy_head.denoise(inputs["noise"], torch.zeros(rows, 1, 64), inputs["states"]),
    )
    for part, limit in zip(parts, most):
        with torch.no_grad(), HostWork() as work:
            part()
        assert limit * 0.8 < work.calls <= limit


def test_compiled_blocks_act_the_same(processor, model):
    """All of the compiler but its code generation, which takes a minute. No layer is compiled for itself."""
    queries = [(rows, [list(range(5, 5 + n))] * rows) for rows in (1, 2, 3) for n in (0, 4)]

    def act(rows: int, drafts: list) -> torch.Tensor:
        inputs = make_inputs(processor, rows)
        return model.predict_action(**inputs, tokenizer=processor.tokenizer, max_new_tokens=6, drafts=drafts)[0]

    expected = [act(*query) for query in queries]
    torch.compiler.reset()
    counters.clear()
    model.compile_for_acting(backend="aot_eager")
    assert all(relative_error(act(*query), want) < 1e-5 for query, want in zip(queries, expected))
    assert not counters["graph_break"] and not counters["recompile_limit"]
    assert 4 <= counters["stats"]["unique_graphs"] <= 16  # vision, prompt, token and diffusion, by kind of batch
    torch.compiler.reset()


def test_a_model_that_has_acted_can_be_copied(processor, model):
    inputs = make_inputs(processor, 1)
    expected = model.predict_action(**inputs, tokenizer=processor.tokenizer, max_new_tokens=3)
    other = copy.deepcopy(model)
    assert other._kept.denoise is None  # what belongs to the model it was made from
    got = other.predict_action(**inputs, tokenizer=processor.tokenizer, max_new_tokens=3)
    assert relative_error(got[0], expected[0]) < 1e-5


def test_benchmark_has_a_row_for_every_setting(tmp_path, capsys, monkeypatch):
    output = tmp_path / "rows.md"
    monkeypatch.setattr(inference, "WARM_UP_QUERIES", 1)
    inference.main([*TINY, "--batch", "2", "--output", str(output)])
    names = inference.COLUMNS.split(" | ")
    rows = [dict(zip(names, line.strip("| \n").split(" | "))) for line in output.read_text().splitlines()]
    assert [(row["batch"], row["setting"]) for row in rows] == [("2", setting) for setting in inference.SETTINGS]
    for row in rows:
        assert all(float(row[name]) > 0 for name in ("p50", "p99", "chunks/s", "image", "vision", "diffusion"))
        writes = row["setting"] in ("plain", "write")
        assert row["steps"] == ("2" if writes else "0") and (row["decode"] == "–") == (not writes)
    printed = capsys.readouterr().out
    (line,) = re.findall(r"^fp32: (.*)", printed, re.MULTILINE)
    parts = line.split("; ")
    assert len(parts) == len(inference.SETTINGS) - 1
    for part in parts:  # all ways give the same
        assert float(re.search(r": ([\d.e+-]+),", part)[1]) < 1e-5 and part.endswith("2 of 2 texts the same")
    assert all(line in printed for line in output.read_text().splitlines())


def test_benchmark_leaves_the_plain_way_out_when_compiling(capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    inference.main([*TINY, "--batch", "1", "--settings", "plain", "none", "--compile"])
    printed = capsys.readouterr().out
    assert {"Qwen2VLDecoderLayer", "Qwen2VLVisionBlock", "ScaleDPBlock"} == set(compiled)
    rows = [line for line in printed.splitlines() if line.startswith("| CPU")]
    assert len(rows) == 1 and "| tiny compiled | 1 | none |" in rows[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tokens", "1"], "--tokens: expected at least 2, found 1"),
        (["--queries", "0"], "--queries: expected at least 1, found 0"),
        (["--batch", "4", "0"], "--batch: expected at least 1, found [4, 0]"),
        (["--device", "abacus"], "--device: expected cpu"),
    ],
)
def test_benchmark_refuses(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        inference.parse(flags)
