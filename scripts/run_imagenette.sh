#!/usr/bin/env bash
# Appendix D: 10 images distilled from ImageNette at 224 px with a ConvNet5 and the features of a
# ResNet50 that torch.hub downloads. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments imagenette "$@"
