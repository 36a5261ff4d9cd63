#!/usr/bin/env bash
# Stages of a pipeline, to be sourced: each is shown, timed and logged; a failed one stops the script and says what to do.
# Needs NANOCHAT_BASE_DIR and TAG; AGAIN is the command that goes on after a failure.

logs="$NANOCHAT_BASE_DIR/logs/$TAG"
mkdir -p "$logs"
stages=()    # lines of the final table
started=$SECONDS
interrupted=""
trap 'interrupted=yes' INT TERM  # the stage under way has got the signal too, and ends in good order

log_of() { echo "$logs/${1//[^a-zA-Z0-9]/_}.log"; }

fail() { # fail NAME CODE LOG COMMAND...: the last lines of a script that stops
    local name="$1" code="$2" log="$3"
    shift 3
    {
        printf '\n!!! stage "%s" failed (exit code %d)\n' "$name" "$code"
        printf '    why:        %s\n' "$(grep -E 'error:|Error|FAIL' "$log" | grep -v '^Traceback' | head -n 1 || true)"
        printf '    log:        %s\n' "$log"
        printf '    this stage: NANOCHAT_BASE_DIR=%s %s\n' "$NANOCHAT_BASE_DIR" "$(printf '%q ' "$@")"
        printf '    to go on:   %s\n' "$AGAIN"
    } >&2
    exit "$code"
}

suspicious() { # suspicious LOG: the first line of a log that a person should see, if there is one
    grep -m 1 -E '^(WARN|FAIL)|not finite|out of memory|out of reach|does not run here|torch.compile: off|truncated|cut,' "$1" || true
}

stage() { # stage NAME COMMAND...
    local name="$1" begun=$SECONDS status log
    shift
    log="$(log_of "$name")"
    rm -f "$log.done"
    printf '\n=== %s\n    %s\n' "$name" "$*"
    set +e
    "$@" 2>&1 | (trap '' INT TERM; exec tee "$log")
    status=${PIPESTATUS[0]}
    set -e
    [ -z "$interrupted" ] || { printf '\nstopped in stage "%s"; %s goes on from here\n' "$name" "$AGAIN" >&2; exit 130; }
    [ "$status" -eq 0 ] || fail "$name" "$status" "$log" "$@"
    touch "$log.done"
    stages+=("$(printf '%-30s %6d s  %s' "$name" $((SECONDS - begun)) "$(suspicious "$log" | cut -c 1-90)")")
    printf '%s %s %d\n' "$(date -u +%FT%TZ)" "${name// /_}" $((SECONDS - begun)) >> "$logs/times.txt"
}

training() { # training NAME COMMAND...: a stage that may be stopped in good order before its end: then nothing follows; with
    # REPORT set, the report is written anew after it
    stage "$@"
    local log
    log="$(log_of "$1")"
    if ! grep -Eq '^done:|is finished already' "$log"; then
        printf '\nstage "%s" was stopped before its end; %s goes on from here\n' "$1" "$AGAIN" >&2
        exit 130
    fi
    if [ -n "${REPORT:-}" ]; then  # as far as the run has come
        python -m nanochat.report generate --model-tag "$TAG" --price "${PRICE:-0}" ||
            echo "the report could not be written; going on without" >&2
    fi
}

once() { # once NAME NEWER_THAN COMMAND...: a stage that is shown again, not run again, while NEWER_THAN stays as it is
    local name="$1" input="$2" log
    log="$(log_of "$1")"
    shift 2
    if [ -e "$log.done" ] && [ "$log.done" -nt "$input" ]; then
        printf '\n=== %s: done before\n' "$name"
        cat "$log"
        stages+=("$(printf '%-30s %8s  %s' "$name" "before" "$(suspicious "$log" | cut -c 1-90)")")
        return
    fi
    stage "$name" "$@"
}

launch_on_all_devices() { # launch_on_all_devices [N]: sets `launch`, what stands before a script's name: NPROC_PER_NODE
    # processes, by default one a GPU, or N without; and `gpus`, their number
    gpus="$(nvidia-smi --list-gpus 2> /dev/null | grep -c GPU || true)"
    NPROC_PER_NODE="${NPROC_PER_NODE:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo "${1:-1}")}"
    launch=(torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m)
    if [ "$gpus" -eq 0 ]; then
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + NPROC_PER_NODE - 1) / NPROC_PER_NODE ))}"
    fi
}

newest() { ls -t "$NANOCHAT_BASE_DIR/$1/$TAG"/meta_*.json | head -n 1; } # newest KIND: the last checkpoint of this run

table() {
    printf '\n=== time\n'
    printf '%s\n' "${stages[@]}"
    printf '%-30s %6d s\n\n' "in all, this time" $((SECONDS - started))
}
