#!/usr/bin/env bash
# Table 4: a CIFAR-10 teacher distilled into five networks on images from TinyImageNet, without the teacher's data.
set -euo pipefail
methods="gaussian random random_features kmeans dsa dm mtt frepo krr_st"
targets="cifar10"
archs="convnet4 vgg11 alexnet mobilenet resnet10"
source "$(dirname "${BASH_SOURCE[0]}")/table.sh"

prepared "tinyimagenet $targets"
for target in $targets; do fine_tuned tinyimagenet scratch resnet18 0 64 "$target"; done # the teachers
for method in $methods; do distilled_set tinyimagenet "$method"; done
for seed in $seeds; do
  for arch in $archs; do
    for method in $methods; do
      pretrained tinyimagenet "$method" "$arch" "$seed"
      folder=$(weights tinyimagenet "$method" "$arch" "$seed") start=$(weights tinyimagenet "$method" "$arch" "$seed")/model.pt
      [ "$method" != gaussian ] || { folder=$(scratch_folder "$arch" 64) start="none $(fresh "$arch" 64) --lr 1e-3"; }
      for target in $targets; do
        task "$folder/results.jsonl#${target}_kd_${method}_seed$seed" kd.py --weights $start --dataset "$target" \
          --distilled "$runs/tinyimagenet/$method/seed0/distilled.pt" --seed "$seed" ${quick:+--epochs 200} \
          --teacher "$(scratch_folder resnet18 64)/${target}_full_seed0/model.pt"
      done
    done
  done
done
at_the_end -m analysis.tables --only table4 "$runs"
carry_out
