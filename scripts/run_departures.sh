#!/usr/bin/env bash
# The departures on real images, one at a time and together, each against KRR-ST as the paper has
# it. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments departures "$@"
