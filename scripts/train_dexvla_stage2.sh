#!/usr/bin/env bash
# Stage 2: an official Qwen2-VL and a stage-1 policy head learn from all robots' data together.
#
#   bash scripts/train_dexvla_stage2.sh MNOP=weights/Qwen2-VL-2B-Instruct DIT_PRETRAIN=weights/open_scale_dp_h_backbone.ckpt \
#       TASKNAME=my_task OUTPUT=outputs/stage2 [--any_flag value …]
#
# The settings may also be environment variables; flags at the end win over those below.
set -euo pipefail
source "$(dirname "$0")/launch.sh"
read_settings "$@"

ACTION_HEAD=${ACTION_HEAD:-scale_dp_policy} # or unet_diffusion_policy
HEAD_SIZE=${HEAD_SIZE:-}                    # ScaleDP_H unless the model folder says otherwise
DIT_PRETRAIN=${DIT_PRETRAIN:-}              # stage-1 weights; without them the head starts from scratch
TASKNAME=${TASKNAME:-example_tasks}         # an entry of TASK_CONFIGS in aloha_scripts/constants.py
OUTPUT=${OUTPUT:-outputs/$TASKNAME/stage2}
require MNOP "folder of the official Qwen2-VL"

launch \
    --model_name_or_path "$MNOP" \
    --load_pretrain_dit "$([ -n "$DIT_PRETRAIN" ] && echo True || echo False)" --pretrain_dit_path "$DIT_PRETRAIN" \
    --policy_head_type "$ACTION_HEAD" ${HEAD_SIZE:+--policy_head_size "$HEAD_SIZE"} \
    --task_name "$TASKNAME" --output_dir "$OUTPUT" --logging_dir "$OUTPUT/log" --report_to tensorboard \
    --use_reasoning True --using_film True --lora_enable False --flash_attn True \
    --action_dim 14 --state_dim 14 --chunk_size 50 \
    --image_size_stable "(320,240)" --image_size_wrist "(320,240)" \
    --freeze_vision_tower False --freeze_backbone False \
    --max_steps 100000 --per_device_train_batch_size 12 --gradient_accumulation_steps 1 \
    --learning_rate 2e-5 --lr_scheduler_type constant --warmup_ratio 0.01 --weight_decay 0. \
    --save_strategy steps --save_steps 10000 --save_total_limit 50 --logging_steps 50 \
    --gradient_checkpointing auto --dataloader_num_workers 8
