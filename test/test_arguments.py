"""The reference's scripts parse as they are, and every flag acts or says why not."""

from dataclasses import fields

import pytest

from data_utils import UserError
from qwen2_vla.arguments import LEGACY_REASONS, LegacyArguments, legacy_notes, parse_arguments, parse_image_size

STAGE2 = """
--deepspeed scripts/zero2.json --use_reasoning True --lora_enable False --action_dim 14 --state_dim 14 --flash_attn True
--chunk_size 50 --load_pretrain_dit True --pretrain_dit_path DIT --policy_head_type scale_dp_policy
--policy_head_size ScaleDP_H --image_size_stable (320,240) --image_size_wrist (320,240) --task_name example_tasks
--model_name_or_path MNOP --version v0 --tune_mm_mlp_adapter True --freeze_vision_tower False --freeze_backbone False
--mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad --bf16 True --output_dir OUT
--max_steps 100000 --per_device_train_batch_size 12 --gradient_accumulation_steps 1 --save_strategy steps
--save_steps 10000 --save_total_limit 50 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.01
--lr_scheduler_type constant --logging_steps 50 --tf32 True --model_max_length 2048 --gradient_checkpointing True
--dataloader_num_workers 8 --lazy_preprocess True --policy_class scale_dp_policy --concat token_cat
--report_to tensorboard --logging_dir OUT/log
"""
STAGE3 = (
    STAGE2
    + """
--lora_module vit|llm --history_images_length 1 --load_pretrain False --model_pretrain PRE --using_film True
--using_ema False --lora_r 64 --lora_alpha 256 --episode_first False --group_by_modality_length False
--lr_scheduler_type cosine --warmup_ratio 0.001 --max_steps 80000 --load_pretrain_dit False
"""
)
OTHERS = """
--is_multimodal True --select_seg_token_mask True --skip_mirrored_data True --delta_control True --is_tinyvla False
--llm_loss_weight 0.5 --adam_beta1 0.9 --adam_beta2 0.98 --adam_epsilon 1e-7 --remove_unused_columns False
--optim adamw_torch --seed 3 --evaluation_strategy steps --eval_steps 200 --per_device_eval_batch_size 4
--dataloader_pin_memory False --lora_task_type CAUSAL_LM --lora_dropout 0.1 --lora_weight_path W --lora_bias none
--non_lora_lr 1e-4 --double_quant True --quant_type nf4 --bits 16 --cache_dir C --resume_from_checkpoint False
--do_eval True --logging_strategy steps --num_train_epochs 3
"""


def parse(text: str, tmp_path):
    argv = [token.replace("|", " ").replace("OUT", str(tmp_path)) for token in text.split()]
    return parse_arguments(argv)


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(name, "unset")  # restored afterwards
        monkeypatch.delenv(name)


@pytest.mark.parametrize("script", [STAGE2, STAGE3, STAGE3 + OTHERS])
def test_every_flag_of_the_reference_parses(script, tmp_path):
    script = script.replace("--deepspeed scripts/zero2.json", "")  # needs a launcher; test_scripts.py uses it
    model_args, data_args, training_args, head_args = parse(script, tmp_path)
    assert (data_args.chunk_size, head_args.action_dim, head_args.policy_head_size) == (50, 14, "ScaleDP_H")
    assert data_args.image_size_stable == (320, 240)
    assert training_args.max_steps == (100000 if script is STAGE2 else training_args.max_steps)
    assert training_args.warmup_steps == (0.01 if "0.001" not in script else 0.001)
    assert training_args.activation_checkpointing and training_args.adam_beta2 == 0.98
    notes = "\n".join(legacy_notes(model_args))
    for flag in ("tune_mm_mlp_adapter", "concat", "lazy_preprocess", "policy_class", "image_aspect_ratio"):
        assert f"--{flag} " in notes and "has no effect: " in notes
    assert "--version" not in notes  # given as it is by default


def test_old_and_new_values_act(tmp_path):
    _, data_args, training_args, _ = (
        parse(STAGE3 + OTHERS, tmp_path)
        if False
        else parse((STAGE3 + OTHERS).replace("--deepspeed scripts/zero2.json", ""), tmp_path)
    )
    assert training_args.eval_strategy == "steps" and training_args.lora_modules == ["vit", "llm"]
    assert training_args.resume_from_checkpoint is None and data_args.delta_control
    assert training_args.non_lora_lr == 1e-4 and training_args.llm_loss_weight == 0.5


def test_every_legacy_flag_has_its_reason():
    assert set(LEGACY_REASONS) == {f.name for f in fields(LegacyArguments)}


@pytest.mark.parametrize(
    "text, size",
    [
        ("(320,240)", (320, 240)),
        ("320, 240", (320, 240)),
        ("320x240", (320, 240)),
        ("( 56 )", (56, 56)),
        ("480", (480, 480)),
    ],
)
def test_image_sizes(text, size):
    assert parse_image_size(text, "image_size_stable") == size


@pytest.mark.parametrize("text", ["320,", "(320;240)", "big", "", "(10,240)", "__import__('os')", "(-320,240)"])
def test_malformed_image_sizes(text):
    with pytest.raises(UserError, match="--image_size_wrist: expected"):
        parse_image_size(text, "image_size_wrist")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--bits 4", "--bits 4: quantised weights cannot be trained"),
        ("--bits 5 --lora_enable True", "--bits: expected 4, 8 or 16, found 5"),
        ("--lora_module dit", 'expected any of "vit llm di_head"'),
        ("--quant_type int4", "--quant_type: expected nf4 or fp4"),
        ("--history_images_length 0", "--history_images_length: expected a number of frames, at least 1, found 0"),
        ("--chunk_size 0", "--chunk_size: expected a positive number"),
        ("--image_size_stable wide", "--image_size_stable: expected"),
    ],
)
def test_impossible_flags(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        parse(f"--output_dir OUT {flags}", tmp_path)
