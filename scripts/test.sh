#!/usr/bin/env bash
# Run the linter, the format check, the check of the tables in the documentation, and all tests.
# Creates .venv and installs the packages if needed. Arguments are passed to pytest:
#     bash scripts/test.sh tests/test_krr.py -k gradient
set -euo pipefail
REQUIREMENTS=tests/requirements.txt
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m analysis.docs --check README.md docs/*.md
"$PYTHON" -m pytest -n 2 --dist loadfile "$@"
