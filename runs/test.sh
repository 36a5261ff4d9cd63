#!/usr/bin/env bash
# Set-up, then the tests. Arguments go to pytest: bash runs/test.sh -k tokenizer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source runs/setup.sh
exec python -m pytest -q "$@"
