#!/usr/bin/env bash
# KRR-ST beside MKDT and low-rank sets, with equal storage, under the protocols of two papers.
# --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments successors "$@"
