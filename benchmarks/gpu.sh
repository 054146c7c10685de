#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine, in one go: `bash benchmarks/gpu.sh`, at most 9 minutes.
#
# Prints what it runs and, in the end, two markdown tables for docs/benchmarks.md. The most important comes first; what
# fails or runs out of time is noted and does not stop the rest. Wheels in a folder wheels/, in the clone or beside it,
# are installed first. `PRESET=tiny DEVICE=cpu bash benchmarks/gpu.sh` goes the same way without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PRESET=${PRESET:-2b}
DEVICE=${DEVICE:-cuda}
BUDGET=${BUDGET:-530} # seconds for all of it
STEPS=${STEPS:-8}
OUT=${OUT:-outputs/gpu} # the table, profiles and test report are kept here
mkdir -p "$OUT"
rows=$OUT/rows.md queries=$OUT/queries.md notes=$OUT/notes.txt
rm -f "$rows" "$queries" "$notes" "$OUT/profile.txt"
touch "$rows" "$queries" "$notes"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1

part() { # part SECONDS TITLE COMMAND…: at most SECONDS of what is left
    local limit=$1 title=$2 left=$((BUDGET - SECONDS))
    shift 2
    if ((left < 10)); then
        echo "- $title: left out, no time left" >>"$notes"
        return
    fi
    printf '\n==> %s (%d s left)\n' "$title" "$left"
    timeout --kill-after=10 "$((limit < left ? limit : left))" "$@"
    local status=$?
    if ((status == 124 || status == 137)); then
        echo "- $title: stopped after $limit s or at the end of the time; the rows so far are in the table" >>"$notes"
    elif ((status != 0)); then
        echo "- $title: failed with status $status" >>"$notes"
    fi
}

train_step() {
    part "$1" "training step: ${*:2}" "$PYTHON" benchmarks/train_step.py --preset "$PRESET" --device "$DEVICE" \
        --steps "$STEPS" --output "$rows" "${@:2}"
}

inference() {
    part "$1" "inference: ${*:2}" "$PYTHON" benchmarks/inference.py --preset "$PRESET" --device "$DEVICE" \
        --output "$queries" "${@:2}"
}

for wheels in wheels ../wheels; do
    if compgen -G "$wheels/*.whl" >/dev/null; then
        part 120 "installing wheels" "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$wheels" "$wheels"/*.whl
        break
    fi
done

if [ "$DEVICE" = cpu ]; then
    STEPS=2 batches=(2) more=(4) asked=(--queries 2)
else
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
    batches=(12) more=(16 24) asked=()
fi

train_step 110 --batch "${batches[@]}" --settings base checkpointing bf16_weights --profile "$OUT/profile.txt"
inference 120 --batch 1 "${asked[@]}"
part 100 "tests that need a GPU" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider test
train_step 100 --batch "${batches[@]}" --settings compile bf16_weights+compile
inference 120 --batch 1 --compile --settings write draft none "${asked[@]}"
inference 60 --batch 8 --settings write draft none "${asked[@]}"
train_step 80 --batch "${batches[@]}" --settings lora checkpointing+lora adam8bit freeze_vision
train_step 60 --batch "${more[@]}" --settings base bf16_weights
part 30 "estimated memory" "$PYTHON" -m qwen2_vla.memory --batch "${batches[0]}"
part 30 "estimated memory with checkpointing" "$PYTHON" -m qwen2_vla.memory --batch "${batches[0]}" --checkpointing

if [ -s "$notes" ]; then
    printf '\nnot complete:\n'
    cat "$notes"
fi
printf '\n'
{
    "$PYTHON" benchmarks/train_step.py --header
    cat "$rows"
    printf '\n'
    "$PYTHON" benchmarks/inference.py --header
    cat "$queries"
} | tee "$OUT/table.md"
