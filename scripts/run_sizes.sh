#!/usr/bin/env bash
# KRR-ST by the number of unlabelled source images. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments sizes "$@"
