#!/usr/bin/env bash
# The departures of README on real images, one at a time and together, each against KRR-ST as the paper has it; and Y_s
# at random, a pool of one member, other T and m, and networks in bf16 from distillation on. TinyImageNet at 32 px and
# small networks, whatever the flags say: hours of a CPU. Three distillations each, so that differences are paired by
# seed; each set is judged by a linear probe with 10 % of the labels and by fine-tuning with 15 labels a class. A
# member of the pool is drawn about 120 times, so it starts afresh five times. analysis/findings.md has what came out.
set -euo pipefail
methods="krr_st scratch random_features krr_st_d1 krr_st_d2 krr_st_d3 krr_st_d5 krr_st_d7 krr_st_d8 krr_st_as_released
 krr_st_random_targets krr_st_pool_of_1 krr_st_T_5 krr_st_T_80 krr_st_m_50 krr_st_m_200 krr_st_bf16"
methods=$(echo $methods) # on one line
targets="cifar10 imagenette cars"
reduced=departures quick_width=0.25
source "$(dirname "${BASH_SOURCE[0]}")/table.sh"
arch=convnet3 images="--num-images 100"
usual="--outer-steps 600 --outer-lr 0.02 --outer-batch 256 --pool-size 5 --pool-steps 20"

prepared "tinyimagenet $targets"
target_network tinyimagenet
for seed in $seeds; do
  for method in $methods; do
    folder=$runs/tinyimagenet/$method/seed$seed
    network=$folder/$(net $arch)/seed$seed precise="--precision fp32"
    [ $method != krr_st_bf16 ] || precise="--precision bf16"
    from="--source tinyimagenet $(preset tinyimagenet) --target-network $runs/tinyimagenet/target/seed0/target.pt --seed $seed $precise"
    case $method in
      scratch) ;;
      random_features) task "$folder/distilled.pt" -m distillers $method $from $images ;;
      *) task "$folder/distilled.pt" distill.py --name $method $from --arch $arch --width "$width" $images $usual $(variant $method 0.002) ;;
    esac
    if [ $method = scratch ]; then
      network=$(scratch_folder $arch 32) start="none $(fresh $arch 32)"
    else
      start=$network/model.pt
      task "$start" pretrain.py --distilled "$folder/distilled.pt" --arch $arch --width "$width" --epochs 400 --seed "$seed" $precise
    fi
    for target in $targets; do
      task "$network/results.jsonl#${target}_linear_0.1_seed$seed" \
        finetune.py --weights $start --dataset "$target" --seed "$seed" --protocol linear --label-fraction 0.1 $precise
      task "$network/results.jsonl#${target}_full_15perclass_seed$seed" \
        finetune.py --weights $start --dataset "$target" --seed "$seed" --labels-per-class 15 --steps 150 --batch-size 64 $precise
    done
  done
done
at_the_end -m analysis.departures "$runs"
carry_out
