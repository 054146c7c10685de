#!/usr/bin/env bash
# DiffusionVLA: Qwen2-VL with LoRA adapters and the UNet head, trained in one stage.
#
#   bash scripts/train_divla.sh MNOP=weights/Qwen2-VL-2B-Instruct TASKNAME=my_task OUTPUT=outputs/divla [--any_flag value …]
#
# The settings may also be environment variables; flags at the end win over those below.
set -euo pipefail
source "$(dirname "$0")/launch.sh"
read_settings "$@"

ACTION_HEAD=${ACTION_HEAD:-unet_diffusion_policy} # or scale_dp_policy
HEAD_SIZE=${HEAD_SIZE:-}                          # of a ScaleDP head
TASKNAME=${TASKNAME:-example_tasks}               # an entry of TASK_CONFIGS in aloha_scripts/constants.py
OUTPUT=${OUTPUT:-outputs/$TASKNAME/divla}
require MNOP "folder of the official Qwen2-VL"

launch \
    --model_name_or_path "$MNOP" --load_pretrain_dit False \
    --policy_head_type "$ACTION_HEAD" ${HEAD_SIZE:+--policy_head_size "$HEAD_SIZE"} \
    --task_name "$TASKNAME" --output_dir "$OUTPUT" --logging_dir "$OUTPUT/log" --report_to tensorboard \
    --use_reasoning True --using_film True --using_ema False --flash_attn True \
    --lora_enable True --lora_module "vit llm" --lora_r 64 --lora_alpha 256 \
    --action_dim 14 --state_dim 14 --chunk_size 48 --episode_first False \
    --image_size_stable "(320,240)" --image_size_wrist "(320,240)" \
    --freeze_vision_tower True --freeze_backbone True \
    --max_steps 80000 --per_device_train_batch_size 12 --gradient_accumulation_steps 1 \
    --learning_rate 2e-5 --lr_scheduler_type cosine --warmup_ratio 0.001 --weight_decay 0. \
    --save_strategy steps --save_steps 10000 --save_total_limit 50 --logging_steps 50 \
    --gradient_checkpointing auto --dataloader_num_workers 8
