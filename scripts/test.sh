#!/usr/bin/env bash
# Everything that must hold, from nothing:  bash scripts/test.sh [arguments for pytest]
# Sets up what is missing, then lint, format, types and tests. Continuous integration calls this and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${FASTTUNE_VENV:-$PWD/.venv}"

bash scripts/setup_h100.sh --venv "$venv" --dev </dev/null
bin="$venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/python" -m mypy
"$bin/shellcheck" scripts/*.sh benchmarks/*.sh .ci/run
exec "$bin/python" -m pytest -q "$@" </dev/null
