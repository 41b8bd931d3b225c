#!/usr/bin/env bash
# Table 4: a CIFAR-10 teacher distilled into five networks on images of TinyImageNet, without the
# teacher's data. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments table4 "$@"
