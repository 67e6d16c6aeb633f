#!/usr/bin/env bash
# A first fine-tuned model, from nothing:  bash scripts/demo.sh [key=value …]
# Sets up what is missing, then trains configs/quickstart.yaml and prints the report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${FASTTUNE_VENV:-$PWD/.venv}"

bash scripts/setup_h100.sh --venv "$venv" >&2
exec "$venv/bin/fasttune" train configs/quickstart.yaml "$@"
