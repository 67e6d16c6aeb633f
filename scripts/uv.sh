#!/usr/bin/env bash
# Prints the path of uv, which does the installing:  uv="$(bash scripts/uv.sh)"
# That of the PATH where it is new enough; else the one of stacks/setup.txt, which pip brings once (where there is no pip:
# uv's own installer) into a folder of its own in the cache.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."  # nothing in the caller's folder is imported
oldest=0.13.0
version="$(sed -n 's/^uv==\([0-9.]*\).*/\1/p' stacks/setup.txt)"

read -r _ have _ <<<"$(uv --version 2>/dev/null || true)"
if [ -n "$have" ] && [ "$(printf '%s\n' "$oldest" "$have" | sort -V | head -n 1)" = "$oldest" ]; then
    command -v uv
    exit
fi
place="${XDG_CACHE_HOME:-$HOME/.cache}/fasttune/uv-$version"
if [ ! -x "$place/bin/uv" ]; then
    mkdir -p "${place%/*}"
    new="$(mktemp -d "$place.XXXXXX")"
    trap 'rm -rf "$new"' EXIT
    for python in python3 python3.12 python3.11 python3.13 ""; do
        if [ -n "$python" ] && "$python" -m pip --version >/dev/null 2>&1; then break; fi
    done
    if [ -n "$python" ]; then
        unset PIP_PREFIX PIP_ROOT PIP_CONSTRAINT PIP_REQUIREMENT
        PIP_USER=0 "$python" -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes --target "$new" \
            -r stacks/setup.txt >&2
    elif command -v curl >/dev/null; then
        curl -LsSf "https://astral.sh/uv/$version/install.sh" | UV_UNMANAGED_INSTALL="$new/bin" sh >&2
    elif command -v wget >/dev/null; then
        wget -qO- "https://astral.sh/uv/$version/install.sh" | UV_UNMANAGED_INSTALL="$new/bin" sh >&2
    else
        echo "setup: pip, curl or wget is needed to bring uv (apt-get install -y curl ca-certificates)" >&2
        exit 2
    fi
    mv -T "$new" "$place" 2>/dev/null || [ -x "$place/bin/uv" ]  # another set-up may have been faster
fi
echo "$place/bin/uv"
