#!/usr/bin/env bash
# Make .venv, install what the tests need, run the tests. Further arguments go to pytest:
#   bash test.sh                    every test but the fault injections
#   bash test.sh -k tokenizer       some of them
#   bash test.sh -m faults          the ones that kill processes at bad moments
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh requirements-dev.txt
exec "$PYTHON" -m pytest "$@"
