#!/usr/bin/env bash
# KRR-ST with 64, 256 and all principal components of an encoder's features as targets.
# --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments pca "$@"
