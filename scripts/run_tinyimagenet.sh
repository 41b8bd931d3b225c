#!/usr/bin/env bash
# Table 2: 2,000 images distilled from TinyImageNet; a ConvNet4 pre-trained on them and fine-tuned on each of seven sets.
set -euo pipefail
methods="scratch random random_features kmeans dsa dm mtt frepo krr_st"
targets="tinyimagenet cifar10 aircraft cars cub2011 dogs flowers"
quick_targets="cifar10 imagenette cars"
source "$(dirname "${BASH_SOURCE[0]}")/table.sh"

prepared "tinyimagenet $targets"
for method in $methods; do distilled_set tinyimagenet "$method"; done
for seed in $seeds; do
  for method in $methods; do
    pretrained tinyimagenet "$method" convnet4 "$seed"
    evaluations tinyimagenet "$method" convnet4 "$seed" 64
  done
done
at_the_end -m analysis.tables --only table2 "$runs"
carry_out
