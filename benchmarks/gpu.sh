#!/usr/bin/env bash
# Measure a GPU in under ten minutes (on a fast one): whether float32 gives the losses of the CPU, the
# speedup over the reference step (settings of CIFAR-100 and TinyImageNet, float32 and bf16), how a
# step scales, and the effect of bf16 on the result. Prints all results, a summary last, and stores
# them in the folder $1 (default: runs/gpu).
#     bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(realpath -m "${1:-runs/gpu}")
source scripts/environment.sh
export TQDM_DISABLE=1
mkdir -p "$out"

"$PYTHON" pretrain_target.py --source digits --run-root "$out" --device cpu
for run in "cpu fp32" "cuda fp32" "cuda bf16"; do
  set -- $run
  "$PYTHON" distill.py --source digits --run-root "$out" --device "$1" --precision "$2" --name "$1_$2" --log-every 1 \
    --outer-steps 100 --pool-steps 20
  "$PYTHON" pretrain.py --distilled "$out/digits/$1_$2/seed0/distilled.pt" --device cpu --run-root "$out"
  "$PYTHON" finetune.py --weights "$out/digits/$1_$2/seed0/convnet3-x0.25/seed0/model.pt" --dataset digits \
    --protocol linear --labels-per-class 10 --device cpu
done
for preset in cifar100 tinyimagenet; do
  for precision in fp32 bf16; do
    "$PYTHON" -m benchmarks.speed --preset $preset --precision $precision --device cuda | tee "$out/$preset-$precision.md"
  done
done
"$PYTHON" -m benchmarks.scaling --device cuda --precision bf16 --width 1 --out "$out/scaling.png" | tee "$out/scaling.md"

echo
echo "Losses on the digits in each step, relative to those of the CPU in float32:"
"$PYTHON" - "$out/digits" <<'END'
import sys
from pathlib import Path
from evaluation import results
from utils.run import read_log

losses = {}
for name in ("cpu_fp32", "cuda_fp32", "cuda_bf16"):
    folder = Path(sys.argv[1], name, "seed0")
    losses[name] = [line["loss"] for line in read_log(folder) if line["phase"] == "distil"]
    apart = [abs(a / b - 1) for a, b in zip(losses[name], losses["cpu_fp32"], strict=True)]
    probe = results.read(folder / "convnet3-x0.25" / "seed0" / "results.jsonl")[-1]["accuracy"]
    last = sum(losses[name][-10:]) / 10
    print(f"{name:10} first 5 steps {max(apart[:5]):.1e}, all {max(apart):.1e}; last loss {last:.4f}, probe {probe:.2f} %")
END
echo
grep -hE "^(Preset|Whole step)" "$out"/*.md
