#!/usr/bin/env bash
# Check and measure a GPU, in parts. Installs and downloads nothing; PYTHON (default: python3) is an
# interpreter with the packages of requirements.txt.
#     bash benchmarks/gpu.sh smoke                          # does everything work?
#     bash benchmarks/gpu.sh speed --preset tinyimagenet    # default preset: cifar100
#     bash benchmarks/gpu.sh distill --minutes 4            # at full size; rerun it to resume
# All parts accept --device cpu; speed and distill also --preset digits, a setting for a CPU, and
# --precision. Each prints its other flags with --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export TQDM_DISABLE=1
part=${1:-}
shift || true
case $part in
  smoke) exec "$PYTHON" -m benchmarks.smoke "$@" ;;
  speed)
    "$PYTHON" -m benchmarks.stages "$@"
    exec "$PYTHON" -m benchmarks.speed "$@"
    ;;
  distill) exec "$PYTHON" -m benchmarks.distillation "$@" ;;
  *)
    echo "usage: bash benchmarks/gpu.sh smoke|speed|distill [flags]" >&2
    exit 2
    ;;
esac
