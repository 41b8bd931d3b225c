#!/usr/bin/env bash
# Figures 2 and 4 to 6 (images, t-SNE, curves) of sets of KRR-ST, and the FID between sets and
# sources. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments figures "$@"
