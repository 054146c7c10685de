#!/usr/bin/env bash
# Environment, installation and all tests. Extra arguments go to pytest: bash test/run.sh -k model
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/python -m pytest "$@"
