#!/usr/bin/env bash
# The paper's claim at a scale for a CPU: sets of 100 images at 32 px, and a ConvNet3 with a quarter
# of its width. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments small "$@"
