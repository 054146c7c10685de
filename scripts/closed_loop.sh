#!/usr/bin/env bash
# From nothing to a policy that succeeds in closed loop: records demonstrations in the ALOHA simulator, trains a small
# DexVLA from scratch, lets it act from starts it has not seen, and reports the success rate with its confidence interval.
#
#   bash scripts/closed_loop.sh                 on a GPU the cube is anywhere, on a CPU within 2 x 2 cm
#   PRESET=cpu SPREAD=0.3 EPISODES=100 STEPS=12000 OUTPUT=outputs/closed_loop/wider bash scripts/closed_loop.sh
#
# A second run reuses what is there; `rm -rf outputs/closed_loop` starts over.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n==> %s\n' "$*"; }

step "1/4 environment (.venv)"
bash scripts/setup.sh
python=$PWD/.venv/bin/python
PRESET=${PRESET:-$("$python" -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')}
OUT=${OUTPUT:-outputs/closed_loop/$PRESET}
TASK=sim_transfer_cube_scripted
export DEXVLA_DATA_DIR=$OUT/data

case $PRESET in
    gpu) # 48 M Qwen2-VL, 35 M head; cube anywhere
        SIZE=small EPISODES=${EPISODES:-200} SPREAD=${SPREAD:-1} STEPS=${STEPS:-60000} WORKERS=12 ENVS=10
        flags=(--policy_head_size ScaleDP_S --per_device_train_batch_size 64 --learning_rate 3e-4 --noise_samples 4
            --chunk_size 50 --image_size_stable "(252,196)" --image_size_wrist "(168,126)")
        ;;
    cpu) # 0.6 M Qwen2-VL, 4 M head; cube within 2 x 2 cm
        SIZE=tiny EPISODES=${EPISODES:-20} SPREAD=${SPREAD:-0.1} STEPS=${STEPS:-3000} WORKERS=1 ENVS=2
        flags=(--policy_head_size ScaleDP_XS --per_device_train_batch_size 16 --learning_rate 2e-3 --noise_samples 4
            --chunk_size 25 --image_size_stable "(112,84)" --image_size_wrist "(56,56)")
        ;;
    *)
        echo "error: PRESET: expected gpu or cpu, found $PRESET" >&2
        exit 1
        ;;
esac

step "2/4 $EPISODES demonstrations ($DEXVLA_DATA_DIR/$TASK)"
"$python" aloha_scripts/record_sim_episodes.py --task_name "$TASK" --dataset_dir "$DEXVLA_DATA_DIR/$TASK" \
    --num_episodes "$EPISODES" --spread "$SPREAD" --image_size "(320,240)"

step "3/4 training from scratch ($OUT/policy)"
[ -f "$OUT/base/model.safetensors" ] || "$python" -m qwen2_vla.tiny "$OUT/base" --size "$SIZE"
if [ -f "$OUT/policy/train_results.json" ]; then
    echo "$OUT/policy is there already"
else
    # no augmentation: a simulated camera neither moves nor changes its colours, and a crop shifts the cube
    bash scripts/train_dexvla_stage2.sh MNOP="$OUT/base" TASKNAME="$TASK" OUTPUT="$OUT/policy" NUM_DEVICES=1 "${flags[@]}" \
        --augment False --using_ema True --max_steps "$STEPS" --lr_scheduler_type cosine --warmup_ratio 0.03 \
        --gradient_checkpointing False --flash_attn False --dataloader_num_workers "$WORKERS" \
        --logging_steps 100 --save_steps "$((STEPS / 4))" --save_total_limit 2 --resume_from_checkpoint True
fi

step "4/4 rollouts from starts that no demonstration has ($OUT/rollouts)"
"$python" -m evaluate.rollout_sim --checkpoint "$OUT/policy" --ema --task_name "$TASK" --spread "$SPREAD" \
    --num_rollouts "${ROLLOUTS:-50}" --num_envs "$ENVS" --seed 1000 --max_new_tokens 40 --output "$OUT/rollouts"
