#!/usr/bin/env bash
# The set in sets/cifar10, beside random images and no pre-training: 50 images of CIFAR-10 at 32 px.
# --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments shipped "$@"
