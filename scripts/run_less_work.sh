#!/usr/bin/env bash
# KRR-ST at a fraction of the work: what can be saved, and what it costs in accuracy. --help lists
# the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments less_work "$@"
