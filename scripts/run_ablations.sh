#!/usr/bin/env bash
# Appendix E: KRR-ST on CIFAR-100 with random initial Y_s instead of the target network's features.
# Also the departures from the paper. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments ablations "$@"
