#!/usr/bin/env bash
# Table 4: knowledge distillation without the teacher's data. A CIFAR-10 teacher is distilled into
# five networks on images distilled from TinyImageNet. --help lists the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m experiments table4 "$@"
