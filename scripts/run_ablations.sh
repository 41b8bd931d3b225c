#!/usr/bin/env bash
# Appendix E: KRR-ST on CIFAR-100 with Y_s started at random instead of from the target network.
# --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments ablations "$@"
