#!/usr/bin/env bash
# The departures from the paper, one at a time and together, compared with KRR-ST as in the paper.
# --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments departures "$@"
