#!/usr/bin/env bash
# Scaling laws: models of several depths, each trained with several fixed budgets of FLOPs; then one csv of all runs, which
# dev/scaling_analysis.ipynb turns into isoFLOP curves and power laws.
#
#   bash runs/scaling_laws.sh               on a GPU node that has the corpus and the tokenizer
#   bash runs/scaling_laws.sh --miniature   tiny models on a laptop, in a folder of its own: about 20 minutes on 2 cores
#
# Run it again after any interruption: finished runs are skipped, an interrupted one goes on.
#   BUDGETS DEPTHS      lists; all pairs are trained
#   NAME                beginning of the runs' tags (scaling)
#   NPROC_PER_NODE      processes, one a GPU (all GPUs; 1 without)
#   WANDB_RUN           beginning of the wandb runs' names (none)
#   further arguments go to base_train
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

AGAIN="bash runs/scaling_laws.sh${*:+ $*}"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
if [ "${1:-}" = --miniature ]; then
    shift
    export NANOCHAT_BASE_DIR="$NANOCHAT_BASE_DIR/miniature"
    BUDGETS="${BUDGETS:-1e12 2e12 4e12}" DEPTHS="${DEPTHS:-1 2 3 4}" NPROC_PER_NODE="${NPROC_PER_NODE:-1}"
    # small batches, so that the shortest run has 40 steps; no weight decay, whose rule is for longer ones
    shape=(--aspect-ratio=24 --head-dim=24 --max-seq-len=128 --window-pattern=L --total-batch-size=2048 --device-batch-size=16
           --embedding-lr=0.6 --unembedding-lr=0.03 --matrix-lr=0.08 --weight-decay=0 --warmup-steps=10 --eval-tokens=200000)
    prepare() {
        python -m nanochat.dataset --auto -n 1
        python -m scripts.tok_train --vocab-size 512 --max-chars 5000000 --resume
    }
else
    BUDGETS="${BUDGETS:-1e18 2.15e18 4.64e18 1e19}" DEPTHS="${DEPTHS:-8 10 12 14 16 18 20}"
    shape=(--device-batch-size=auto --save-every=500)
    prepare() { python -m scripts.tok_train --resume; }
fi
NAME="${NAME:-scaling}" TAG="${NAME:-scaling}"
# shellcheck disable=SC1091
source runs/stages.sh

setup() { bash runs/setup.sh; }

stage "set-up" setup
# shellcheck disable=SC1091
source runs/setup.sh
stage "corpus and tokenizer" prepare
launch_on_all_devices
for budget in $BUDGETS; do
    for depth in $DEPTHS; do
        tag="${NAME}_${budget}_d${depth}"
        training "$tag" "${launch[@]}" scripts.base_train -- --depth="$depth" --target-flops="$budget" --model-tag="$tag" \
            --run="$([ -n "${WANDB_RUN:-}" ] && echo "${WANDB_RUN}_$tag" || echo dummy)" --eval-every=-1 --sample-every=-1 --keep-last=1 \
            --resume "${shape[@]}" "$@"
    done
done
stage "table" python -m dev.collect_runs "${NAME}_*" --output "$NANOCHAT_BASE_DIR/$NAME.csv"
table
printf 'To look at it:\n\n    SCALING_CSV=%s jupyter lab dev/scaling_analysis.ipynb\n\n' "$NANOCHAT_BASE_DIR/$NAME.csv"
