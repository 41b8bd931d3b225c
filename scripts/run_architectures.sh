#!/usr/bin/env bash
# Figure 3 and Tables 5 to 8: four other networks are pre-trained on sets that a ConvNet4 distilled
# from TinyImageNet. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments architectures "$@"
