#!/usr/bin/env bash
# KRR-ST beside the random images that it starts from, with the features of an encoder trained on
# ImageNet as targets: 100 images of ImageNette at 32 px. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments encoder "$@"
