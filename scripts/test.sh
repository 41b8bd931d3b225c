#!/usr/bin/env bash
# Lint, format, the documentation's tables, and the tests. Makes .venv and installs the packages if
# needed. The long tests run with --all only. Other arguments go to pytest:
#     bash scripts/test.sh tests/test_krr.py -k gradient
set -euo pipefail
REQUIREMENTS=tests/requirements.txt
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

part=()
if [ $# -eq 0 ]; then
  part=(-m "not long")
elif [ "$1" = --all ]; then
  shift
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m analysis.docs --check README.md docs/*.md
"$PYTHON" -m pytest -n 2 --dist loadfile "${part[@]}" "$@"
