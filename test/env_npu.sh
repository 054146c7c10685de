# Sourced by train_8p.sh: CANN, if it is installed, and the variables that training on NPUs wants (docs/ascend.md says
# what they do). What is set already stays as it is. On a machine without NPUs nothing reads them but the last two.

if [ -z "${ASCEND_HOME_PATH:-}" ]; then # no set_env.sh has been sourced yet
    for script in "${CANN_ROOT:=/usr/local/Ascend}"/{ascend-toolkit,cann,nnae}/set_env.sh; do
        if [ -f "$script" ]; then
            options=$-
            set +eu # it reads variables that nobody has set
            source "$script"
            [[ $options == *e* ]] && set -e
            [[ $options == *u* ]] && set -u
            break
        fi
    done
fi

export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}
export ASCEND_GLOBAL_EVENT_ENABLE=${ASCEND_GLOBAL_EVENT_ENABLE:-0}
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
export COMBINED_ENABLE=${COMBINED_ENABLE:-1}
export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
