#!/usr/bin/env bash
# Figure 3 and Tables 5 to 8: TinyImageNet's sets, distilled with a ConvNet4, pre-train four other
# networks. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments architectures "$@"
