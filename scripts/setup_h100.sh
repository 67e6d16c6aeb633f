#!/usr/bin/env bash
# From a bare machine to a checked environment in one command:  bash scripts/setup_h100.sh [--help]
# Takes a Python 3.11 to 3.13 (--python PATH, else the first one found, else one that uv brings) and hands over to
# scripts/setup_env.py.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
asked=""
dry=""
previous=""
for argument in "$@"; do
    case "$argument" in --python=*) asked="${argument#--python=}" ;; --dry-run) dry=1 ;; esac
    if [ "$previous" = "--python" ]; then asked="$argument"; fi
    previous="$argument"
done

# PYTHONSAFEPATH: a json.py in the current folder is none of ours
fits() { PYTHONSAFEPATH=1 "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

for candidate in "${asked:-python3.12}" python3.11 python3.13 python3; do
    if fits "$candidate"; then exec "$candidate" "$here/setup_env.py" "$@"; fi
    if [ -n "$asked" ]; then
        echo "setup: --python $asked: is no Python 3.11 to 3.13 (name another, or none: uv brings one)" >&2
        exit 2
    fi
done
echo "no Python 3.11 to 3.13 here: uv brings a 3.12"
if [ -n "$dry" ]; then
    echo "uv=\$(bash $here/uv.sh)"
    echo "\$uv python install 3.12  # by which the rest is planned"
    exit
fi
uv="$(bash "$here/uv.sh")"
if ! "$uv" python install 3.12 >&2; then
    echo "setup: uv cannot bring a Python (see above); install one, e.g. apt-get install python3.12, or name it with --python PATH" >&2
    exit 2
fi
exec "$("$uv" python find --managed-python 3.12)" "$here/setup_env.py" "$@"
