#!/usr/bin/env bash
# Other networks, pre-trained on the sets of run_encoder.sh. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments encoder_architectures "$@"
