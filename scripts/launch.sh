# Sourced by the training scripts: settings given as arguments, devices, precision, launcher.
#
#   read_settings "$@"          leading NAME=value arguments become variables, the rest goes to train_vla.py
#   launch --flag value …       runs train_vla.py on all devices and keeps its output in $OUTPUT/log.log
cd "$(dirname "${BASH_SOURCE[0]}")/.."

read_settings() {
    while [[ "${1:-}" =~ ^[A-Z_]+= ]]; do
        export "${1?}"
        shift
    done
    EXTRA_FLAGS=("$@")
}

require() { # require NAME "what it is"
    if [ -z "${!1:-}" ]; then
        echo "error: expected $1 ($2), found nothing: give $1=… as an argument or in the environment" >&2
        exit 1
    fi
}

launch() {
    local python=${PYTHON:-}
    if [ -z "$python" ]; then
        python=python
        [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ] && python=$PWD/.venv/bin/python
    fi
    local device count precision
    read -r device count precision < <("$python" - <<'PY'
import torch
kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
count = torch.accelerator.device_count() if kind != "cpu" else 1
ampere = kind == "cuda" and torch.cuda.get_device_capability()[0] >= 8
print(kind, count, {"cuda": "bf16+tf32" if ampere else "fp16", "cpu": "fp32"}.get(kind, "bf16"))
PY
    )
    count=${NUM_DEVICES:-$count}
    local flags=()
    case $precision in
        bf16+tf32) flags+=(--bf16 True --tf32 True) ;;
        bf16) flags+=(--bf16 True) ;;
        fp16) flags+=(--fp16 True) ;;
        fp32)
            flags+=(--use_cpu True)
            [ "$count" -gt 1 ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
            ;;
    esac
    local command=("$python" train_vla.py)
    local zero=${ZERO:-}
    if [[ "$zero" = ddp || "$zero" = fsdp ]]; then # PyTorch's own engines, started by torchrun on every machine
        command=("$python" -m torch.distributed.run --nproc_per_node "$count" --nnodes "${NUM_NODES:-1}"
            --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29604}"
            train_vla.py)
        [ "$zero" = fsdp ] && flags+=(--fsdp --fsdp_config scripts/fsdp2.json)
        zero=
    elif [ "$count" -gt 1 ] || [ "${NUM_NODES:-1}" -gt 1 ]; then
        zero=${zero:-scripts/zero2.json}
        command=("$python" -m deepspeed.launcher.runner --master_port "${MASTER_PORT:-29604}" --num_nodes "${NUM_NODES:-1}")
        [ -n "${HOSTFILE:-}" ] && command+=(--hostfile "$HOSTFILE")
        [ "$device" = cpu ] && command+=(--num_accelerators "$count") || command+=(--num_gpus "$count")
        command+=(train_vla.py)
    fi
    [ -n "$zero" ] && flags+=(--deepspeed "$zero")
    mkdir -p "$OUTPUT"
    echo "training on $count x $device ($precision), output in $OUTPUT"
    # SIGTERM (the machine is wanted elsewhere) and Ctrl-C go to training, which saves and stops; the log outlives it
    exec {log}> >(trap '' TERM INT; exec tee -a "$OUTPUT/log.log")
    local tee=$! status=0
    PATH=$(dirname "$python"):$PATH "${command[@]}" "${flags[@]}" "$@" "${EXTRA_FLAGS[@]}" >&"$log" 2>&1 &
    local training=$!
    trap 'kill -TERM "$training" 2>/dev/null || true' TERM INT
    wait "$training" || status=$?
    while kill -0 "$training" 2>/dev/null; do # a signal ends the first wait, not the training
        wait "$training" || status=$?
    done
    exec {log}>&-
    wait "$tee" || true
    return "$status"
}
