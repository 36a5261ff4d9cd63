#!/usr/bin/env bash
# From nothing to a chat model on a laptop, with or without a network: about 20 minutes on 2 cores, 8 GB of memory.
#
#   bash runs/runcpu.sh
#
# Run it again at any time: finished stages are recognised and skipped, an interrupted one goes on.
#   NANOCHAT_BASE_DIR   where everything is written (~/.cache/nanochat)
#   NANOCHAT_DATA_DIR   your own folder of parquet, jsonl or txt files to pretrain on, with a validation split (val.*)
#   CONVERSATIONS       your own jsonl file of conversations, added to the finetuning mixture
#   BASE_STEPS, SFT_STEPS, RL_STEPS   lengths of the trainings (RL_STEPS=0: no reinforcement learning); with other lengths,
#                       give the run another name:
#   TAG                 name of the run (cpu)
#   WANDB_RUN           name of a wandb run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    "") ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' runs/runcpu.sh; exit 0 ;;
    *) echo "error: unknown argument $1; settings come by environment (bash runs/runcpu.sh --help)" >&2; exit 2 ;;
esac
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
TAG="${TAG:-cpu}"
BASE_STEPS="${BASE_STEPS:-360}"
SFT_STEPS="${SFT_STEPS:-300}"
RL_STEPS="${RL_STEPS:-70}"
for steps in "$BASE_STEPS" "$SFT_STEPS" "$RL_STEPS"; do
    [[ "$steps" =~ ^[0-9]+$ ]] || { echo "error: BASE_STEPS, SFT_STEPS, RL_STEPS: expected a number, got $steps" >&2; exit 2; }
done
WANDB_RUN="${WANDB_RUN:-dummy}"
AGAIN="bash runs/runcpu.sh" REPORT=yes
# shellcheck disable=SC1091
source runs/stages.sh

setup() { bash runs/setup.sh; }

stage "set-up" setup
# shellcheck disable=SC1091
source runs/setup.sh

stage "corpus" python -m nanochat.dataset --auto -n 1
stage "tokenizer" python -m scripts.tok_train --vocab-size 8192 --max-chars 20000000 --resume
once "tokenizer, compared" "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.json" python -m scripts.tok_eval
training "pretraining" python -m scripts.base_train --resume --model-tag "$TAG" --run "$WANDB_RUN" \
    --depth 4 --head-dim 64 --max-seq-len 512 --window-pattern L --device-batch-size 16 --total-batch-size 8192 \
    --num-iterations "$BASE_STEPS" --embedding-lr 0.6 --unembedding-lr 0.03 --matrix-lr 0.08 \
    --eval-every 100 --eval-tokens 100000 --sample-every -1 --save-every 50 --keep-last 1
once "base evaluation" "$(newest base_checkpoints)" python -m scripts.base_eval --eval bpb,sample --model-tag "$TAG" --split-tokens 100000 --device-batch-size 16
once "conversations about itself" dev/self_knowledge.md python -m dev.gen_synthetic_data --count 5000
training "finetuning" python -m scripts.chat_sft --resume --model-tag "$TAG" --run "$WANDB_RUN" --num-iterations "$SFT_STEPS" \
    --builtin --identity-epochs 2 --spelling-rows 10000 --eval-every 100 --eval-rows 400 --save-every 50 --keep-last 1 \
    ${CONVERSATIONS:+--conversations "$CONVERSATIONS"}
once "chat evaluation" "$(newest chatsft_checkpoints)" python -m scripts.chat_eval -i sft --model-tag "$TAG" \
    -a SpellingBee,SimpleSpelling,Arithmetic -m 128
SOURCE=sft
if [ "$RL_STEPS" -gt 0 ]; then
    SOURCE=rl
    training "reinforcement learning" python -m scripts.chat_rl --resume --model-tag "$TAG" --run "$WANDB_RUN" \
        --num-iterations "$RL_STEPS" --task Arithmetic --max-new-tokens 64 --eval-every 20 --eval-examples 128 --eval-samples 8 \
        --save-every 20 --keep-last 1
    once "chat evaluation after RL" "$(newest chatrl_checkpoints)" python -m scripts.chat_eval -i rl --model-tag "$TAG" \
        -a SpellingBee,SimpleSpelling,Arithmetic -m 128
fi

ask() {
    for question in "Who are you?" "How many t are in butterfly?" "Why is the sky blue?"; do
        printf '\nYou: %s\n' "$question"
        python -m scripts.chat_cli -i "$SOURCE" --model-tag "$TAG" -t 0 -p "$question" || return
    done
}

stage "three questions" ask
stage "report" python -m nanochat.report generate --model-tag "$TAG"

table
printf 'To go on talking:\n\n    source .venv/bin/activate && NANOCHAT_BASE_DIR=%s python -m scripts.chat_cli -i %s --model-tag %s\n\n' \
    "$NANOCHAT_BASE_DIR" "$SOURCE" "$TAG"
