#!/usr/bin/env bash
# All measurements for a GPU machine, no network needed:  bash benchmarks/gpu_battery.sh --wheels DIR --out DIR
# --dry-run runs every stage on the CPU with a tiny model; --help lists the rest. PYTHON=… chooses the interpreter.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-${FASTTUNE_VENV:-$here/../.venv}/bin/python}"
if ! command -v "$python" >/dev/null; then python=python3; fi
exec "$python" "$here/battery.py" "$@"
