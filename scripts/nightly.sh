#!/usr/bin/env bash
# The tests that take minutes each, from nothing:  bash scripts/nightly.sh [arguments for pytest]
# Sets up what is missing, then runs what is marked `nightly`; scripts/test.sh and a plain pytest leave these out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${FASTTUNE_VENV:-$PWD/.venv}"

bash scripts/setup_h100.sh --venv "$venv" --dev </dev/null
"$venv/bin/python" -m pip install --quiet --no-deps --require-hashes -r stacks/nightly.txt
exec "$venv/bin/python" -m pytest -q -rs -m nightly "$@" </dev/null
