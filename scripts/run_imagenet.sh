#!/usr/bin/env bash
# Table 3: 1,000 images distilled from ImageNet at 64 px. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments table3 "$@"
