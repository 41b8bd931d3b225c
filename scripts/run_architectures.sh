#!/usr/bin/env bash
# Figure 3 and Tables 5 to 8: TinyImageNet's sets, distilled with a ConvNet4, pre-train four other networks.
set -euo pipefail
methods="scratch random random_features kmeans dsa dm mtt frepo krr_st"
targets="aircraft cars cub2011 dogs flowers"
archs="vgg11 alexnet mobilenet resnet10"
source "$(dirname "${BASH_SOURCE[0]}")/table.sh"

prepared "tinyimagenet $targets"
for method in $methods; do distilled_set tinyimagenet "$method"; done
for seed in $seeds; do
  for arch in $archs; do
    for method in $methods; do
      pretrained tinyimagenet "$method" "$arch" "$seed"
      evaluations tinyimagenet "$method" "$arch" "$seed" 64
    done
  done
done
at_the_end -m analysis.tables --only table5,table6,table7,table8 "$runs"
at_the_end -m analysis.figures bars --out "$runs/figures/architectures.png" "$runs"
carry_out
