#!/usr/bin/env bash
# The departures from the paper with the features of an encoder as targets. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments departures_encoder "$@"
