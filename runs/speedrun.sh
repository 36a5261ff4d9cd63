#!/usr/bin/env bash
# From a blank 8xH100 node to a chat model of GPT-2's grade: set-up, tokenizer, pretraining, finetuning, evaluation, report.
#
#   bash runs/speedrun.sh --rehearse     first: every stage of this script at toy size, in minutes, in a folder of its own
#   bash runs/speedrun.sh                then: the real thing; better inside tmux, or: nohup bash runs/speedrun.sh &
#
# Run it again after any interruption: finished stages are recognised, an interrupted one goes on where it stopped.
# By environment:
#   NANOCHAT_BASE_DIR   where everything is written (~/.cache/nanochat)
#   NPROC_PER_NODE      processes, one a GPU (all GPUs; 2 without)
#   DEPTH RATIO         of the model (24), tokens per parameter (8)
#   DEVICE_BATCH_SIZE   rows a GPU takes at a time (16); auto: by its memory
#   FP8                 1 or 0 (1 where the GPU can)
#   NUM_SHARDS          training shards of ClimbMix (170)
#   SAVE_EVERY          steps between checkpoints (250)
#   WANDB_RUN TAG       name of the wandb run (none), of the run's folders (d$DEPTH)
#   RL                  1: reinforcement learning on GSM8K after finetuning (0; the rehearsal always has it, on arithmetic)
#   PRICE               of the node, dollars an hour: the report then says what it cost
#   SKIP_PREFLIGHT      1: do not stop at what preflight finds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

AGAIN="bash runs/speedrun.sh${*:+ $*}" REPORT=yes
REHEARSE=""
case "${1:-}" in
    --rehearse) REHEARSE=1 ;;
    "") ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' runs/speedrun.sh; exit 0 ;;
    *) echo "error: unknown argument $1; bash runs/speedrun.sh [--rehearse]" >&2; exit 2 ;;
esac
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}${REHEARSE:+/rehearsal}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"  # seconds to finish a step and save
WANDB_RUN="${WANDB_RUN:-dummy}"
PRICE="${PRICE:-0}"
RATIO="${RATIO:-8}"
RL="${RL:-0}"
SAVE_EVERY="${SAVE_EVERY:-250}"

if [ -n "$REHEARSE" ]; then  # the same stages and processes, toy sizes
    DEPTH=2 TAG=rehearsal NUM_SHARDS=1 FIRST_SHARDS=1
    shape=(--max-seq-len=256 --head-dim=128 --window-pattern=SL --device-batch-size=4 --total-batch-size=8192
           --num-iterations=20 --save-every=10 --eval-every=10 --eval-tokens=16384 --sample-every=-1)
    preflight=(--max-seq-len=256 --num-iterations=20 --total-batch-size=8192 --vocab-size=4096)
    tokenizer=(--vocab-size=4096 --max-chars=3000000)
    base_eval=(--split-tokens=16384 --device-batch-size=4 --max-new-tokens=8 --max-per-task=16)
    sft=(--num-iterations=12 --save-every=6 --eval-every=-1 --eval-rows=64 --spelling-rows=500)
    chat_eval=(-x 16 -m 32)
    RL=1 rl=(--task=Arithmetic --num-iterations=4 --examples-per-step=4 --num-samples=4 --max-new-tokens=32 --eval-every=-1
             --eval-examples=8 --eval-samples=2 --save-every=2)
    identities=200
else
    DEPTH="${DEPTH:-24}" TAG="${TAG:-d${DEPTH:-24}}" NUM_SHARDS="${NUM_SHARDS:-170}" FIRST_SHARDS=8
    shape=(--target-param-data-ratio="$RATIO" --device-batch-size="${DEVICE_BATCH_SIZE:-16}" --save-every="$SAVE_EVERY")
    preflight=(--target-param-data-ratio="$RATIO" --device-batch-size=16)
    tokenizer=(--vocab-size=32768)
    base_eval=()
    sft=(--save-every=200)
    chat_eval=() rl=(--save-every=60)
    identities=1000
fi
mkdir -p "$NANOCHAT_BASE_DIR"
# shellcheck disable=SC1091
source runs/stages.sh

launch_on_all_devices 2
FP8="${FP8:-$([ "$gpus" -gt 0 ] && echo 1 || echo 0)}"

corpus() { # corpus SHARDS: what the rehearsal cannot download, the built-in corpus replaces; a real run stops
    if [ -n "$REHEARSE" ] || [ -n "${NANOCHAT_DATA_DIR:-}" ]; then
        python -m nanochat.dataset --auto -n "$1"
    else
        python -m nanochat.dataset -n "$1" -w 8
    fi
}

look_over() {
    python -m scripts.preflight --depth "$DEPTH" --nproc "$NPROC_PER_NODE" --run "$WANDB_RUN" --price "$PRICE" \
        $([ "$FP8" = 1 ] && echo --fp8) "${preflight[@]}" || [ $? -eq 1 ] || [ -n "$REHEARSE${SKIP_PREFLIGHT:-}" ]
}

rest_of_corpus() { # the download that ran beside the tokenizer, and what it left undone
    while kill -0 "$download" 2> /dev/null; do sleep 1; done  # wait is of no use here: stages run in a subshell
    cat "$logs/download.log"
    corpus "$NUM_SHARDS"
}

setup() { bash runs/setup.sh; }

stage "set-up" setup
# shellcheck disable=SC1091
source runs/setup.sh
stage "preflight" look_over
stage "first shards" corpus "$FIRST_SHARDS"
corpus "$NUM_SHARDS" > "$logs/download.log" 2>&1 &
download=$!
trap 'kill "$download" 2> /dev/null || true' EXIT
stage "tokenizer" python -m scripts.tok_train --resume --first-files "$FIRST_SHARDS" "${tokenizer[@]}"
once "tokenizer, compared" "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" python -m scripts.tok_eval
stage "all shards" rest_of_corpus
training "pretraining" "${launch[@]}" scripts.base_train -- --depth="$DEPTH" --model-tag="$TAG" --run="$WANDB_RUN" --resume --keep-last=2 \
    $([ "$FP8" = 1 ] && echo --fp8) "${shape[@]}"
once "base evaluation" "$(newest base_checkpoints)" "${launch[@]}" scripts.base_eval -- --model-tag="$TAG" "${base_eval[@]}"
once "conversations about itself" dev/self_knowledge.md python -m dev.gen_synthetic_data --count "$identities"
training "finetuning" "${launch[@]}" scripts.chat_sft -- --model-tag="$TAG" --run="$WANDB_RUN" --resume --keep-last=2 "${sft[@]}"
once "chat evaluation" "$(newest chatsft_checkpoints)" "${launch[@]}" scripts.chat_eval -- -i sft --model-tag="$TAG" "${chat_eval[@]}"
SOURCE=sft
if [ "$RL" = 1 ]; then
    SOURCE=rl
    training "reinforcement learning" "${launch[@]}" scripts.chat_rl -- --model-tag="$TAG" --run="$WANDB_RUN" --resume --keep-last=2 "${rl[@]}"
    once "chat evaluation after RL" "$(newest chatrl_checkpoints)" "${launch[@]}" scripts.chat_eval -- -i rl --model-tag="$TAG" "${chat_eval[@]}"
fi
stage "a question" python -m scripts.chat_cli -i "$SOURCE" --model-tag "$TAG" -t 0 -m 64 -p "Why is the sky blue?"
stage "report" python -m nanochat.report generate --model-tag "$TAG" --price "$PRICE"

table
total="$(awk '{ total += $3 } END { print total }' "$logs/times.txt")"
printf 'All stages, interrupted ones and earlier starts included: %d min' $((total / 60))
awk -v s="$total" -v p="$PRICE" 'BEGIN { if (p > 0) printf ", about $%.2f at $%s an hour", s / 3600 * p, p; print "" }'
if [ -n "$REHEARSE" ]; then
    printf '\nThe rehearsal is over: every stage ran. Remarks in the table want a look; the numbers mean nothing at this size.\n'
    printf 'The real run: %s\n\n' "${AGAIN% --rehearse}"
else
    printf '\nTo chat:\n\n    source .venv/bin/activate && NANOCHAT_BASE_DIR=%s python -m scripts.chat_cli -i %s --model-tag %s\n\n' \
        "$NANOCHAT_BASE_DIR" "$SOURCE" "$TAG"
fi
