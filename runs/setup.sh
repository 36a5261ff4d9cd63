#!/usr/bin/env bash
# Set-up, to be sourced or run: finds or installs uv, makes .venv, installs what pyproject.toml pins.
# PyTorch's build is chosen for the machine (CUDA by driver version, CPU without a GPU) where PyTorch's own index can be
# reached, and is the registry's default otherwise; UV_TORCH_BACKEND=cpu, cu128, ... decides by hand.
# Takes seconds when nothing has changed.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_uv() {
    command -v uv && return
    for candidate in "$HOME/.local/bin/uv" "$repo/.venv/bin/uv"; do
        [ -x "$candidate" ] && { echo "$candidate"; return; }
    done
    return 1
}

install_uv() {
    echo "set-up: installing uv with pip" >&2
    if ! python3 -m pip install --quiet --user uv >&2 && ! python3 -m pip install --quiet uv >&2; then
        # a system Python that refuses pip: a virtual environment takes it
        python3 -m venv "$repo/.venv" >&2 && "$repo/.venv/bin/pip" install --quiet uv >&2 || {
            echo "set-up: uv could not be installed; install it by hand (https://docs.astral.sh/uv), then run this again" >&2
            exit 1
        }
    fi
    hash -r
    find_uv || python3 -c 'import sysconfig, os; p = os.path.join(sysconfig.get_path("scripts"), "uv"); assert os.path.exists(p); print(p)'
}

setup() {
    cd "$repo"
    local wanted installed uv
    wanted="$(cat pyproject.toml runs/setup.sh | cksum) ${UV_TORCH_BACKEND:-auto}"
    installed="$(cat .venv/.nanochat-setup 2>/dev/null || true)"
    if [ "$wanted" = "$installed" ]; then
        return
    fi
    uv="$(find_uv || install_uv)"
    [ -x .venv/bin/python ] || "$uv" venv --quiet --allow-existing --python '>=3.11' .venv
    local backend="${UV_TORCH_BACKEND:-auto}"
    echo "set-up: installing the packages of pyproject.toml into .venv"
    # a short look whether PyTorch's index answers, so that a closed network costs seconds and not minutes
    if UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=0 "$uv" pip install --quiet --dry-run --python .venv/bin/python \
            --torch-backend="$backend" -r pyproject.toml --group dev 2>/dev/null; then
        "$uv" pip install --quiet --python .venv/bin/python --torch-backend="$backend" -r pyproject.toml --group dev
    else
        echo "set-up: PyTorch's own index is out of reach: taking the registry's build of PyTorch"
        env -u UV_TORCH_BACKEND "$uv" pip install --quiet --python .venv/bin/python -r pyproject.toml --group dev
    fi
    echo "$wanted" > .venv/.nanochat-setup
    echo "set-up: done"
}

setup
# shellcheck disable=SC1091
source "$repo/.venv/bin/activate"
