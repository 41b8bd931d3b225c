#!/usr/bin/env bash
# The methods of Table 1 at one small budget: 100 images of CIFAR-10 at 32 px. --help lists the
# flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments compare_methods "$@"
