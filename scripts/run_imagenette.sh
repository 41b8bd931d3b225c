#!/usr/bin/env bash
# Appendix D: 10 images distilled from ImageNette at 224 px with a ConvNet5 and the features of a ResNet50 that torch.hub
# fetches; ConvNet5 and ResNet18 pre-trained on them and fine-tuned on each of six sets.
set -euo pipefail
methods="scratch random random_features dsa dm krr_st"
targets="imagenette aircraft cars cub2011 dogs flowers"
archs="convnet5 resnet18"
source "$(dirname "${BASH_SOURCE[0]}")/table.sh"

prepared "imagenette $targets"
for method in $methods; do distilled_set imagenette "$method"; done
for seed in $seeds; do
  for arch in $archs; do
    batch=""
    [ "$arch" = convnet5 ] || [ -n "$quick" ] || batch="--batch-size 64" # as the released code, for its size
    for method in $methods; do
      pretrained imagenette "$method" "$arch" "$seed"
      evaluations imagenette "$method" "$arch" "$seed" 224 $batch
    done
  done
done
at_the_end -m analysis.tables --only imagenette_convnet,imagenette_resnet18 "$runs"
carry_out
