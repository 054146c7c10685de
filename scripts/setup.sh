#!/usr/bin/env bash
# Makes .venv and installs what requirements.txt names. What is there already is kept.
#   PYTHON=python3.12 bash scripts/setup.sh     chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/python ]; then
    for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "${python:-}" ]; then
        echo "error: expected Python 3.11 or 3.12, found $(python3 --version 2>&1 || true); name one with PYTHON=…" >&2
        exit 1
    fi
    echo "making .venv with $("$python" --version)"
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "error: $python cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
        exit 1
    fi
fi

# Debian packages: rendering without a display, and a compiler for the operators DeepSpeed builds on the CPU
missing=()
has_library() { .venv/bin/python -c "import ctypes; ctypes.CDLL('$1')" 2>/dev/null; }
has_library libEGL.so.1 && has_library libEGL_mesa.so.0 && has_library libOpenGL.so.0 ||
    missing+=(libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0)
command -v g++ >/dev/null || missing+=(g++)
.venv/bin/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    missing+=(python3-dev)
if [ ${#missing[@]} -gt 0 ]; then
    as_root=$([ "$(id -u)" = 0 ] && echo env || echo sudo -n)
    echo "installing Debian packages: ${missing[*]}"
    if ! { $as_root apt-get update -qq && $as_root apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null; then
        echo "note: could not install them; as root: apt-get install ${missing[*]}" >&2
    fi
fi

wanted=$(sha256sum requirements.txt)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    echo "installing requirements.txt: 2 to 4 minutes, 6 GB on disk"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    # for the tests of the policy server; without its dependencies, since it asks for a numpy below 2 and runs with any
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps openpi-client==0.1.2
    echo "$wanted" >.venv/installed
fi
