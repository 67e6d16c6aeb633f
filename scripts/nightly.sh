#!/usr/bin/env bash
# The tests that take minutes each, from nothing:  bash scripts/nightly.sh [arguments for pytest]
# Sets up what is missing, then runs what is marked `nightly`; scripts/test.sh and a plain pytest leave these out.
# Then, where no arguments choose tests, every stage of the GPU battery, dry.
# Then the rehearsal of the GPU path on the libraries that run on a card (stacks/cu130, 5 GB, kept in FASTTUNE_CARD_VENV).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${FASTTUNE_VENV:-$PWD/.venv}"
card="${FASTTUNE_CARD_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/fasttune/cu130}"

bash scripts/setup_h100.sh --venv "$venv" --dev </dev/null
"$venv/bin/python" -m pip install --quiet --no-deps --require-hashes -r stacks/nightly.txt
failed=0
"$venv/bin/python" -m pytest -q -rs -m nightly "$@" </dev/null || failed=$?
if [ $# -eq 0 ]; then PYTHON="$venv/bin/python" bash benchmarks/gpu_battery.sh --dry-run </dev/null || failed=$?; fi

[ -x "$card/bin/python" ] || "$venv/bin/python" -m venv "$card"
install=("$card/bin/python" -m pip install --quiet)
if "${install[@]}" uv; then install=("$card/bin/uv" pip install --quiet --python "$card/bin/python"); fi
for pins in cu130 dev; do "${install[@]}" --no-deps --require-hashes -r "stacks/$pins.txt"; done
"${install[@]}" --no-deps --no-build-isolation --editable .
"$card/bin/python" -m pytest -q -rs -m "nightly or not nightly" tests/rehearsal </dev/null || failed=$?
exit "$failed"
