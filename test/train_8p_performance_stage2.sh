#!/usr/bin/env bash
# How fast stage 2 is on 8 NPUs: 50 steps, without checkpoints, which would count as time of training.
#
#   bash test/train_8p_performance_stage2.sh QWEN2_VL STAGE1_HEAD STAGE2_OUTPUT
#   bash test/train_8p_performance_stage2.sh \
#       MNOP=QWEN2_VL DIT_PRETRAIN=STAGE1_HEAD OUTPUT=STAGE2_OUTPUT TASKNAME=my_task [--any_flag value …]
#
# Other settings: NUM_DEVICES (8), STEPS (50), BATCH_SIZE of a device (12), LOG, and those of
# scripts/train_dexvla_stage2.sh. They may also be environment variables.
set -euo pipefail
source "$(dirname "$0")/train_8p.sh"
train_8p 2 50 --save_strategy no -- "$@"
