#!/usr/bin/env bash
# One training on several machines. Run the same line on each of them; HEAD is the address of the first.
#
#   NNODES=2 HEAD=10.0.0.1 bash runs/multinode.sh scripts.base_train --depth=26 --save-every=500 --resume
#
# or let Slurm start it on every machine of an allocation:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=1 --signal=TERM@120 --requeue \
#       runs/multinode.sh scripts.base_train --depth=26 --save-every=500 --resume
#
# NPROC_PER_NODE (8), PORT (29500) and JOB (a name that all machines share) by environment. Base directories may be shared
# or not: where they are not, each machine keeps what its ranks need, and the corpus and the tokenizer must be on each
# (python -m nanochat.dataset and scripts.tok_train with --resume on one, then a copy of tokenizer/ to the others).
set -euo pipefail
if [ -n "${SLURM_SUBMIT_DIR:-}" ]; then cd "$SLURM_SUBMIT_DIR"; else cd "$(dirname "${BASH_SOURCE[0]}")/.."; fi

if [ $# -eq 0 ]; then
    echo "error: which program? bash runs/multinode.sh scripts.base_train --depth=26 --resume" >&2
    exit 2
fi

if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}${NANOCHAT_INSIDE_SRUN:-}" ]; then  # the batch script itself
    HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    export HEAD NNODES="$SLURM_JOB_NUM_NODES" JOB="slurm-$SLURM_JOB_ID" NANOCHAT_INSIDE_SRUN=1
    exec srun --kill-on-bad-exit=1 bash runs/multinode.sh "$@"
fi

if [[ ! "${NNODES:-}" =~ ^[0-9]+$ ]] || [ -z "${HEAD:-}" ]; then
    echo "error: NNODES=${NNODES:-} HEAD=${HEAD:-}: set the number of machines and the address of the first one" >&2
    exit 2
fi
# shellcheck disable=SC1091
source runs/setup.sh
program="$1"
shift
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"  # seconds to finish a step and save
exec torchrun --nnodes="$NNODES" --nproc_per_node="${NPROC_PER_NODE:-8}" --rdzv-backend=c10d \
    --rdzv-endpoint="$HEAD:${PORT:-29500}" --rdzv-id="${JOB:-nanochat}" -m "$program" -- "$@"
