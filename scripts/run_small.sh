#!/usr/bin/env bash
# The paper's claim at a scale that a CPU runs: sets of 100 images at 32 px, a ConvNet3 at a
# quarter of its width. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments small "$@"
