# Sourced by the train_8p_*.sh scripts: one stage on 8 devices, and three figures of it at the end.
#
#   train_8p STAGE STEPS [--flag value …] -- [PATH PATH PATH] [NAME=value …] [--any_flag value …]
#
# The training itself is scripts/train_dexvla_stage2.sh or _stage3.sh, with all of their settings.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source test/env_npu.sh

fail() {
    echo "error: $*" >&2
    exit 1
}

# Sets PATHS to the three paths, if they are there, EXTRA to train_vla.py's flags, and exports the settings between them
read_arguments() {
    PATHS=()
    while [ $# -gt 0 ]; do
        case $1 in
            --model_path=*) export MNOP=${1#*=} ;;
            --data_path=*) export DEXVLA_DATA_DIR=${1#*=} ;;
            --batch_size=*) export BATCH_SIZE=${1#*=} ;;
            --*) break ;;
            *) [[ $1 =~ ^[A-Z_]+= ]] && export "${1?}" || PATHS+=("$1") ;;
        esac
        shift
    done
    EXTRA=("$@")
}

# figure NAME: its last value in the log, where transformers prints {…, 'NAME': '1.23', …} when training ends
figure() {
    local found
    found=$(grep -aoE "'$1': '?[-+.0-9einfa]+" "$LOG" | tail -n 1) || fail "$LOG: expected $1, found none"
    found=${found##*[ \']}
    echo "$found"
}

train_8p() {
    local name stage=$1 steps=$2 flags=()
    name=$(basename "$0" .sh)
    shift 2
    while [ "$1" != -- ]; do
        flags+=("$1")
        shift
    done
    read_arguments "${@:2}"
    if [ ${#PATHS[@]} = 3 ] && [ "$stage" = 2 ]; then
        export MNOP=${PATHS[0]} DIT_PRETRAIN=${PATHS[1]} OUTPUT=${PATHS[2]}
    elif [ ${#PATHS[@]} = 3 ]; then
        echo "${PATHS[0]} has no effect: the stage-2 checkpoint has its policy head in it"
        export MNOP=${PATHS[1]} OUTPUT=${PATHS[2]}
    elif [ ${#PATHS[@]} != 0 ]; then
        fail "$name.sh: expected 3 paths or none, found ${#PATHS[@]} (${PATHS[*]}); its first lines name them"
    fi
    export NUM_DEVICES=${NUM_DEVICES:-8} OUTPUT=${OUTPUT:-test/output/$name}
    LOG=${LOG:-test/output/$name.log}
    mkdir -p "$(dirname "$LOG")"

    echo "$name: stage $stage, ${STEPS:-$steps} steps of ${BATCH_SIZE:-12} x $NUM_DEVICES; follow it with: tail -f $LOG"
    local start=$SECONDS code=0
    bash "scripts/train_dexvla_stage$stage.sh" --max_steps "${STEPS:-$steps}" \
        --per_device_train_batch_size "${BATCH_SIZE:-12}" --logging_steps 5 "${flags[@]}" "${EXTRA[@]}" \
        >"$LOG" 2>&1 || code=$?
    local seconds=$((SECONDS - start))
    if [ "$code" != 0 ]; then
        tail -n 30 "$LOG" >&2
        fail "$name: training ended with exit code $code; above are the last lines of $LOG"
    fi
    local speed loss
    speed=$(figure train_samples_per_second)
    loss=$(figure train_loss)
    {
        echo "Final Performance images/sec : $speed"
        echo "Final Train Loss : $loss"
        echo "E2E Training Duration sec : $seconds"
    } | tee -a "$LOG"
}
