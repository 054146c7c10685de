#!/usr/bin/env bash
# Stage 3: a stage-2 checkpoint learns one hard task.
#
#   bash scripts/train_dexvla_stage3.sh MNOP=outputs/stage2 TASKNAME=my_task OUTPUT=outputs/stage3 [--any_flag value …]
#
# The settings may also be environment variables; flags at the end win over those below.
set -euo pipefail
source "$(dirname "$0")/launch.sh"
read_settings "$@"

ACTION_HEAD=${ACTION_HEAD:-scale_dp_policy}
HEAD_SIZE=${HEAD_SIZE:-}            # as in the checkpoint
TASKNAME=${TASKNAME:-example_tasks} # an entry of TASK_CONFIGS in aloha_scripts/constants.py
OUTPUT=${OUTPUT:-outputs/$TASKNAME/stage3}
require MNOP "folder of a stage-2 checkpoint"

launch \
    --model_name_or_path "$MNOP" --load_pretrain_dit False \
    --policy_head_type "$ACTION_HEAD" ${HEAD_SIZE:+--policy_head_size "$HEAD_SIZE"} \
    --task_name "$TASKNAME" --output_dir "$OUTPUT" --logging_dir "$OUTPUT/log" --report_to tensorboard \
    --use_reasoning True --using_film True --using_ema False --lora_enable False --flash_attn True \
    --action_dim 14 --state_dim 14 --chunk_size 50 --history_images_length 1 --episode_first False \
    --image_size_stable "(320,240)" --image_size_wrist "(320,240)" \
    --freeze_vision_tower False --freeze_backbone False \
    --max_steps 80000 --per_device_train_batch_size 12 --gradient_accumulation_steps 1 \
    --learning_rate 2e-5 --lr_scheduler_type cosine --warmup_ratio 0.001 --weight_decay 0. \
    --save_strategy steps --save_steps 10000 --save_total_limit 50 --logging_steps 50 \
    --gradient_checkpointing auto --dataloader_num_workers 8
