#!/usr/bin/env bash
# Table 3: 1,000 images distilled from ImageNet at 64 px; a ConvNet4 pre-trained on them and fine-tuned on seven sets.
set -euo pipefail
methods="scratch random random_features frepo krr_st"
targets="cifar10 cifar100 aircraft cars cub2011 dogs flowers"
source "$(dirname "${BASH_SOURCE[0]}")/table.sh"

prepared "imagenet $targets"
for method in $methods; do distilled_set imagenet "$method"; done
for seed in $seeds; do
  for method in $methods; do
    pretrained imagenet "$method" convnet4 "$seed"
    evaluations imagenet "$method" convnet4 "$seed" 64
  done
done
at_the_end -m analysis.tables --only table3 "$runs"
carry_out
