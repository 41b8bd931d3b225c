#!/usr/bin/env bash
# The gain of KRR-ST over random images with the features of seven target networks, from an
# untrained one to an encoder trained on ImageNet. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments targets "$@"
