#!/usr/bin/env bash
# Lint, format check, the documentation's tables against the results, and the whole test suite. Makes .venv and installs the
# packages if that is needed.
# Arguments go to pytest: bash scripts/test.sh tests/test_krr.py -k gradient
set -euo pipefail
REQUIREMENTS=tests/requirements.txt
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m analysis.docs --check README.md docs/*.md
"$PYTHON" -m pytest -n 2 --dist loadfile "$@"
