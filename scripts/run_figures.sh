#!/usr/bin/env bash
# Figures 2 and 4 to 6 (images, t-SNE, curves) of KRR-ST's sets, and the FID of the sets to their
# sources. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments figures "$@"
