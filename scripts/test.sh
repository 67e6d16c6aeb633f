#!/usr/bin/env bash
# Everything that must hold, from nothing:  bash scripts/test.sh [arguments for pytest]
# Sets up what is missing, then lint, format, types, tests and the first stage of the GPU battery, dry: nightly.sh has all.
# Continuous integration calls this and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${FASTTUNE_VENV:-$PWD/.venv}"

bash scripts/setup_h100.sh --venv "$venv" --dev </dev/null
bin="$venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/python" -m mypy
"$bin/shellcheck" scripts/*.sh benchmarks/*.sh .ci/run

if [ $# -gt 0 ]; then
    exec "$bin/python" -m pytest -q "$@" </dev/null
fi
# Most of the time goes into imports, on one core each: two processes, of one thread each, since threads that wait for each
# other on a core that another process holds burn most of it.
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # what a process has compiled serves the next one
"$bin/python" -m pytest -q -n 2 --dist loadfile </dev/null
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
PYTHON="$bin/python" bash benchmarks/gpu_battery.sh --dry-run --stages canary \
    --out "$scratch/out" --scratch "$scratch" </dev/null
