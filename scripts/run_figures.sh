#!/usr/bin/env bash
# Figures 2 and 4 to 6 (images, t-SNE, curves) of KRR-ST's sets, and the FID of the sets to their sources. Here the
# targets are the sources whose sets are drawn. With --quick, FID is by the source's own target network.
set -euo pipefail
methods="random dsa dm mtt krr_st"
targets="cifar100 tinyimagenet imagenet"
quick_targets="tinyimagenet"
source "$(dirname "${BASH_SOURCE[0]}")/table.sh"

prepared "$targets"
for source in $targets; do
  home=$runs/$source plots=$runs/figures/$source
  target_network "$source"
  for method in $methods; do
    set=$home/$method/seed0/distilled.pt network=inception
    case $source-$method in imagenet-dsa | imagenet-dm | imagenet-mtt) continue ;; esac # too large for them
    [ -z "$quick" ] || network=$home/target/seed0/target.pt
    distilled_set "$source" "$method"
    task "$home/$method/seed0/results.jsonl#fid_$(basename "$network" .pt)" -m evaluation.fid --distilled "$set" \
      --network "$network" --data-root "$data"
    [ "$method" = krr_st ] || continue
    task "$plots-images.png" -m analysis.figures images --distilled "$set" --out "$plots-images.png" --data-root "$data"
    task "$plots-tsne.png" -m analysis.figures tsne --distilled "$set" --target-network "$home/target/seed0/target.pt" \
      --out "$plots-tsne.png" --data-root "$data"
    at_the_end -m analysis.figures curves --out "$plots-curves.png" "$home/$method/seed0"
  done
done
at_the_end -m analysis.tables --only fid "$runs"
carry_out
