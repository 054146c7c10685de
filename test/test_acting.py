"""The fast way of acting gives what transformers' `generate` and the plain DDIM loop give."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_utils import EpisodicDataset, Qwen2VLADataCollatorForSupervisedDataset
from policy_heads.diffusion import DiffusionPolicyHead
from qwen2_vla import Qwen2VLAConfig, Qwen2VLAProcess, Qwen2VLForConditionalGenerationForVLA, acting
from qwen2_vla.decoding import ReasoningWriter

from .helpers import CAMERAS, EPISODES, GOLDEN, relative_error
from .test_step import STATS, without_positions

LIMIT = 8


@pytest.fixture
def tokenizer(processor):
    return processor.tokenizer


@pytest.fixture
def inputs(processor):
    """Two prompts of different lengths, as a policy makes them."""
    process = Qwen2VLAProcess(processor, CAMERAS, image_size_wrist=(56, 56))
    data = EpisodicDataset(EPISODES, CAMERAS, STATS, 8, image_size_stable=(84, 56))
    items = []
    for index, text in ((2, "Fold."), (15, "Pick up the cube and hand it over, slowly.")):
        item = {key: value for key, value in data[index].items() if key in ("images", "state")}
        items.append(process(item | {"raw_lang": text}))
    return Qwen2VLADataCollatorForSupervisedDataset(processor.tokenizer.pad_token_id)(items)


@pytest.fixture
def model(model, monkeypatch):
    """Returns the condition instead of actions; for those see below."""
    model.eval()
    monkeypatch.setattr(model.policy_head, "denoise", lambda noise, condition, states: condition)
    return model


def written_tokens(model, inputs, tokenizer) -> list[list[int]]:
    """What the untrained model goes on writing, row by row."""
    prompt = inputs["input_ids"].shape[1]
    hidden, ids, _ = model._generate(
        {key: inputs[key] for key in ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids")}
        | {"pixel_values": acting.image_or_video_patches(inputs["images"])[0]},
        tokenizer,
        LIMIT,
    )
    assert hidden.shape[1] == prompt + LIMIT - 1
    return ids.tolist()


def count_steps(monkeypatch) -> list:
    steps, step = [], ReasoningWriter._step
    monkeypatch.setattr(ReasoningWriter, "_step", lambda self: steps.append(1) or step(self))
    return steps


@pytest.mark.parametrize("limit", [1, 2, LIMIT])
@pytest.mark.parametrize("end", [None, (0, 0), (0, 1), (1, 3), (0, LIMIT - 1)])
def test_writes_what_generate_writes(model, inputs, tokenizer, monkeypatch, end, limit):
    """Wherever a row ends: `end` (row, place) is the token that ends all texts."""
    if end is not None:
        token = written_tokens(model, inputs, tokenizer)[end[0]][end[1]]
        monkeypatch.setattr(type(tokenizer), "convert_tokens_to_ids", lambda self, name: token)
    plain = model.predict_action(**without_positions(inputs), tokenizer=tokenizer, max_new_tokens=limit)
    fast = model.predict_action(**inputs, tokenizer=tokenizer, max_new_tokens=limit)
    assert relative_error(fast[0], plain[0]) < 1e-5
    assert [text.strip() for text in fast[1]] == [text.strip() for text in plain[1]]


@pytest.mark.parametrize("wrong_from", [0, 1, 3, LIMIT - 1, None])
def test_a_draft_changes_nothing_but_the_number_of_steps(model, inputs, tokenizer, monkeypatch, wrong_from):
    expected = model.predict_action(**inputs, tokenizer=tokenizer, max_new_tokens=LIMIT)
    steps = count_steps(monkeypatch)
    drafts = []
    for tokens in written_tokens(model, inputs, tokenizer):
        tokens = tokens[: LIMIT - 1]
        if wrong_from is not None and wrong_from < len(tokens):
            tokens[wrong_from] += 1
        drafts.append(tokens)
    model._kept.writers.clear()  # the writer has kept the step
    # by token: a draft that is decoded and tokenised again may be cut into other tokens
    got = model.predict_action(**inputs, tokenizer=tokenizer, max_new_tokens=LIMIT, drafts=drafts)
    assert relative_error(got[0], expected[0]) < 1e-5
    assert got[1] == expected[1]
    right = LIMIT - 1 if wrong_from is None else min(wrong_from, LIMIT - 1)
    made_now = 1  # a writer steps once when it is made
    assert len(steps) - made_now in (LIMIT - 1 - right, LIMIT - right)


def test_given_answers_are_conditioned_as_in_training(model, inputs, tokenizer, monkeypatch):
    """One row's text is given, the other's written: the first is what training computes, the second as ever."""
    answer = "Pick up the cube.Next action:"
    alone = model.predict_action(**inputs, tokenizer=tokenizer, max_new_tokens=LIMIT)
    conditions, texts = model.predict_action(
        **inputs, tokenizer=tokenizer, max_new_tokens=LIMIT, answers=[answer, None]
    )
    assert texts == [answer, alone[1][1]]
    assert relative_error(conditions[1], alone[0][1]) < 1e-5

    row = {key: value[:1] for key, value in inputs.items() if key not in ("images", "image_grid_thw", "position_ids")}
    present = row["attention_mask"][0].bool()
    ids = torch.tensor([tokenizer(answer).input_ids])
    out = model(
        input_ids=torch.cat([row["input_ids"][:, present], ids], dim=1),
        attention_mask=torch.ones(1, int(present.sum()) + ids.shape[1], dtype=torch.long),
        labels=torch.cat([torch.full((1, int(present.sum())), -100), ids], dim=1),
        images=[image[:1] for image in inputs["images"]],
        image_grid_thw=inputs["image_grid_thw"][:3],
        states=row["states"],
        actions=torch.zeros(1, 8, 14),
        is_pad=torch.zeros(1, 8, dtype=torch.bool),
    )
    assert relative_error(conditions[:1], out.condition.detach()) < 1e-5


def test_buffers_hold_nothing_of_the_query_before(model, inputs, tokenizer):
    expected = model.predict_action(**inputs, tokenizer=tokenizer, max_new_tokens=LIMIT)
    broken = inputs | {"images": [torch.zeros_like(image) for image in inputs["images"]]}
    weight = model.model.visual.merger.ln_q.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(float("nan"))
        assert model.predict_action(**broken, tokenizer=tokenizer, max_new_tokens=LIMIT)[0].isnan().any()
        weight.copy_(kept)
    again = model.predict_action(**inputs, tokenizer=tokenizer, max_new_tokens=LIMIT)
    assert torch.equal(again[0], expected[0]) and again[1] == expected[1]


class LikeACapture(TorchDispatchMode):
    """Fails where capturing a CUDA graph would: the host's memory goes into no kernel, but for single numbers.

    Under FakeTensorMode, which itself fails where the host asks for a number of the device.
    """

    COPIES = ("aten._to_copy", "aten.copy_", "aten._local_scalar_dense")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if any(x.is_cuda for x in tensors):
            self.calls += 1
            of_host = [x for x in tensors if not x.is_cuda]
            assert all(x.dim() == 0 for x in of_host), func
            assert not (of_host and str(func).startswith(self.COPIES)), func
        return out


def pretend_cuda(module: torch.nn.Module):
    """Replaces its tensors by ones without contents that say that they are on a GPU."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(torch.empty_like(weight, device="cuda"), requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(buffer, device="cuda"))


def test_what_is_captured_could_be(processor, inputs):
    model = Qwen2VLForConditionalGenerationForVLA(Qwen2VLAConfig.from_pretrained(GOLDEN / "checkpoint")).eval()
    head = model.policy_head
    head.scheduler.set_timesteps(10)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        # numbers of the host, which in this mode have no values either
        head.scheduler.timesteps = SimpleNamespace(tolist=lambda: list(range(90, -1, -10)))
        head.scheduler.set_timesteps = lambda steps: None
        pretend_cuda(model)
        prompt = [
            torch.empty_like(inputs[key], device="cuda") for key in ("input_ids", "attention_mask", "position_ids")
        ]
        images = [torch.empty_like(image, device="cuda") for image in inputs["images"]]
        drafts, lengths, given, noise, states = (
            torch.empty(2, *shape, dtype=dtype, device="cuda")
            for shape, dtype in (
                ((16,), torch.long),
                ((), torch.long),
                ((), torch.bool),
                ((8, 14), None),
                ((14,), None),
            )
        )
        writer = ReasoningWriter(model, 2, 256, 128, end=7)
        for part in (
            lambda: writer._read(*prompt, drafts, lengths, given, *images),
            writer._step,
            writer._condition,
            lambda: head.denoise(noise, writer.hidden[:, :1], states),
            lambda: head.denoise(noise, writer.hidden[:, :1], states, noise, noise[..., 0]),
        ):
            with LikeACapture() as capture:
                part()
            assert capture.calls > 30
        with pytest.raises(AssertionError, match="aten._to_copy"), LikeACapture():
            torch.zeros(3).to("cuda")
        with pytest.raises(DataDependentOutputException), LikeACapture():
            states.sum().item()


def test_modulations_for_all_steps_at_once_change_nothing(processor):
    """ScaleDP reads a third of its weights once for all diffusion steps; the base class asks step by step."""
    head = Qwen2VLForConditionalGenerationForVLA.from_pretrained(GOLDEN / "checkpoint", dtype=torch.float32).policy_head
    torch.manual_seed(0)
    noise, condition, states = torch.randn(3, 8, 14), torch.randn(3, 1, 64), torch.randn(3, 14)
    at_once = head.denoise(noise, condition, states)
    head.noise_predictor = DiffusionPolicyHead.noise_predictor.__get__(head)
    assert relative_error(at_once, head.denoise(noise, condition, states)) < 1e-5
    # inpainting: exact where the weight is 1, unchanged where all weights are 0
    known, weights = torch.randn(3, 8, 14).clamp(-1, 1), torch.zeros(3, 8)
    assert torch.equal(head.denoise(noise, condition, states, known, weights), head.denoise(noise, condition, states))
    weights[0, :3] = 1
    inpainted = head.denoise(noise, condition, states, known, weights)
    assert torch.equal(inpainted[0, :3], known[0, :3])
    assert not torch.allclose(inpainted[0, 3:], at_once[0, 3:], atol=1e-3)  # what follows is drawn to fit
    assert relative_error(inpainted[1:], at_once[1:]) < 1e-5
