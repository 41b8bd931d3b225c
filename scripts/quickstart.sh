#!/usr/bin/env bash
# All stages on scikit-learn's handwritten digits: target network, distillation, pre-training,
# linear probe, fine-tuning and knowledge distillation. Prints a table of accuracies and the path of
# the distilled images. Takes 4 to 8 minutes on 2 CPU cores after installation. Rerun it to resume.
# The precision is float32 on all machines.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# As in the preset digits in utils/presets.py.
digits=runs/digits arch=convnet3-x0.25 precision="--precision fp32"

run() {
  echo "\$ python $*"
  "$PYTHON" "$@"
}

run pretrain_target.py --source digits
run distill.py --source digits $precision
run -m distillers random_features --source digits

for seed in 0 1 2; do
  for method in krr_st random_features; do
    echo "pretrain.py --distilled $digits/$method/seed0/distilled.pt --seed $seed $precision"
  done
done | run_in_parallel

for seed in 0 1 2; do
  for set in none random_features krr_st; do
    weights="$digits/$set/seed0/$arch/seed$seed/model.pt"
    [ $set = none ] && weights="none --seed $seed"
    weights="$weights $precision"
    evaluate="finetune.py --weights $weights --dataset digits"
    echo "$evaluate --protocol linear --labels-per-class 2 10 --label-draws 10"
    echo "$evaluate --labels-per-class 2"
    [ $set = none ] || echo "$evaluate --protocol r2"
  done
done | run_in_parallel

run finetune.py --weights none --arch convnet4 --width 0.25 --dataset digits --steps 60
run kd.py --weights $digits/krr_st/seed0/$arch/seed0/model.pt \
  --distilled $digits/krr_st/seed0/distilled.pt --dataset digits \
  --teacher runs/scratch/convnet4-x0.25_32px/digits_full_seed0/model.pt

echo
"$PYTHON" -m analysis.tables runs
echo
echo "Distilled images: $digits/krr_st/seed0/images.png"
