"""`python -m qwen2_vla.tiny DIR`: a Qwen2-VL of under a million parameters, laid out like the official folder.

Random weights, an own small tokenizer, the real processor. It is what the demo and the tests start from; `--size small`
has 48 million and learns a simulated task from scratch on a GPU.
"""

import argparse
import os
import string

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from .flops import PRESETS

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
VOCABULARY = 512
# Text whose words the tokenizer should know: what ALOHA tasks talk about
CORPUS = """
Transfer the red cube to the other arm. Insert the peg into the socket. Pick up the cube with the right gripper.
Move the left gripper above the red cube, lower it, close it and lift the cube. Hand the cube over to the left gripper.
Next action: You are a helpful assistant. system user assistant. Fold the shirt on the table. Open the gripper.
Put the object into the box. Pour the water into the cup. Wipe the table with the towel. Return to the home pose.
"""
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}"
    "{%- else -%}{{ '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def make_tokenizer(vocab_size: int = VOCABULARY) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen2-VL's special tokens, trained on `CORPUS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS, string.printable], trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return Qwen2Tokenizer(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def make_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: Qwen2Tokenizer, size: str = "tiny") -> Qwen2VLConfig:
    """`size`: a key of PRESETS. No layer is narrower than 64: nf4 quantisation packs 64 weights to a block."""
    sizes = PRESETS[size]
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen2VLConfig(
        text_config=sizes["text"]
        | {
            "vocab_size": VOCABULARY,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sizes["mrope_section"]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config=sizes["vision"] | {"hidden_size": sizes["text"]["hidden_size"]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        policy_head_size=sizes["head"],  # what train_vla.py builds on it unless told otherwise
    )


def write_tiny_model(folder: str | os.PathLike, seed: int = 0, size: str = "tiny"):
    """Writes configuration, weights, tokenizer and processor to `folder`; `size` is a key of PRESETS."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(make_config(tokenizer, size))
    model.save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())
    print(f"wrote a Qwen2-VL of {count:,} random parameters to {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny")
    arguments = parser.parse_args()
    write_tiny_model(arguments.folder, arguments.seed, arguments.size)
