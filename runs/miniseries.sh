#!/usr/bin/env bash
# A miniseries: models of several depths, each trained as long as its size asks for; then one csv of all runs.
#
#   bash runs/miniseries.sh
#   DEPTHS="4 6 8" bash runs/miniseries.sh --target-param-data-ratio=8
#
# Run it again after any interruption: finished runs are skipped, an interrupted one goes on.
#   DEPTHS              list (12 14 16 18 20 22 24 26)
#   NAME                beginning of the runs' tags (miniseries)
#   NPROC_PER_NODE      processes, one a GPU (all GPUs; 1 without)
#   WANDB_RUN           beginning of the wandb runs' names (none)
#   further arguments go to base_train
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

AGAIN="bash runs/miniseries.sh${*:+ $*}"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
DEPTHS="${DEPTHS:-12 14 16 18 20 22 24 26}"
NAME="${NAME:-miniseries}" TAG="${NAME:-miniseries}"
# shellcheck disable=SC1091
source runs/stages.sh

setup() { bash runs/setup.sh; }

stage "set-up" setup
# shellcheck disable=SC1091
source runs/setup.sh
stage "tokenizer" python -m scripts.tok_train --resume
launch_on_all_devices
for depth in $DEPTHS; do
    tag="${NAME}_d${depth}"
    training "$tag" "${launch[@]}" scripts.base_train -- --depth="$depth" --model-tag="$tag" --sample-every=-1 --save-every=500 \
        --run="$([ -n "${WANDB_RUN:-}" ] && echo "${WANDB_RUN}_$tag" || echo dummy)" --keep-last=1 --device-batch-size=auto --resume "$@"
done
stage "table" python -m dev.collect_runs "${NAME}_d*" --output "$NANOCHAT_BASE_DIR/$NAME.csv"
table
