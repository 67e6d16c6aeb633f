#!/usr/bin/env bash
# From a bare machine to a checked environment in one command:  bash scripts/setup_h100.sh [--help]
# Finds a Python 3.11 to 3.13 (or takes --python PATH), then hands over to scripts/setup_env.py.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
asked=""
previous=""
for argument in "$@"; do
    case "$argument" in --python=*) asked="${argument#--python=}" ;; esac
    if [ "$previous" = "--python" ]; then asked="$argument"; fi
    previous="$argument"
done

# PYTHONSAFEPATH: a venv.py in the current folder is none of ours
fits() { PYTHONSAFEPATH=1 "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

if [ -n "$asked" ]; then
    candidates=("$asked")
else
    candidates=(python3.12 python3.11 python3.13 python3)
fi
found=""
for candidate in "${candidates[@]}"; do
    if fits "$candidate"; then
        found="$candidate"
        # Debian ships a python3 that cannot make environments; another one may
        if PYTHONSAFEPATH=1 "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then break; fi
    fi
done
if [ -z "$found" ]; then
    echo "setup: no Python 3.11 to 3.13 (tried ${candidates[*]}); install one, e.g. apt-get install python3.12 python3.12-venv, or name it with --python PATH" >&2
    exit 2
fi
exec "$found" "$here/setup_env.py" "$@"
