#!/usr/bin/env bash
# Table 2: 2,000 images distilled from TinyImageNet. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments table2 "$@"
