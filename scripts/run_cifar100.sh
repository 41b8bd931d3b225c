#!/usr/bin/env bash
# Table 1: 1,000 images distilled from CIFAR-100; a ConvNet3 pre-trained on them and fine-tuned on each of seven sets.
set -euo pipefail
methods="scratch random random_features kmeans dsa dm mtt kip frepo krr_st"
targets="cifar100 cifar10 aircraft cars cub2011 dogs flowers"
quick_width=0.25
source "$(dirname "${BASH_SOURCE[0]}")/table.sh"

prepared "cifar100 $targets"
for method in $methods; do distilled_set cifar100 "$method"; done
for seed in $seeds; do
  for method in $methods; do
    pretrained cifar100 "$method" convnet3 "$seed"
    evaluations cifar100 "$method" convnet3 "$seed" 32
  done
done
at_the_end -m analysis.tables --only table1 "$runs"
carry_out
