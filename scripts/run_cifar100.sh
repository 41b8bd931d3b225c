#!/usr/bin/env bash
# Table 1: 1,000 images distilled from CIFAR-100. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments table1 "$@"
