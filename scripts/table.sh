# Sourced by the run_*.sh after they have set $methods and $targets (and $archs, $quick_targets, $quick_width; $reduced, a
# folder of the run root, where there is but a reduced scale): reads the flags, and has a function for each command of
# the paper's pipeline. `task` notes a command with what it leaves; `carry_out`, at a script's end, does what is missing
# (benchmarks/plan.py).
table=$0
flags="
  --dry-run          list the commands, what is done, and an estimate of the time left
  --quick            reduced scale, in hours of a CPU, into <run root>/quick; rows are marked as such
  --methods \"A B\"    of: $methods
  --targets \"A B\"    data sets (default: $targets)
  --archs \"A B\"      of: ${archs:-(this script has one network)}
  --oracle           also pre-train on all of the source, with the target network's features: the row full
  --probes           also linear probes with 1, 5, 10, 50 and 100 % of the labels, and nearest neighbours
  --head             also what a network that has seen only the distilled set knows of the source's classes
  --seeds \"0 1 2\"    of the pre-trainings
  --jobs N           commands at a time (default: 1; with --quick, one a core)
  --run-root FOLDER  default: runs; several of these scripts may work on one folder at the same time
  --data-root FOLDER default: datasets, or \$DATA_ROOT
  -- FLAGS           for every script, such as: -- --device cuda --precision tf32"

seeds="0 1 2" runs=runs data=${DATA_ROOT:-datasets} quick=${reduced:-} jobs="" dry="" roots="" extra=""
oracle="" probes="" head="" evaluated=""
usage_error() {
  echo "$(basename "$table"): error: $1 (see --help)" >&2
  exit 2
}
narrowed() { # the words of $2, each of which must be among those of $3
  for word in $2; do
    case " $3 " in *" $word "*) ;; *) usage_error "$1 $word: not one of: $3" ;; esac
  done
  echo "$2"
}
wanted=""
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$table"; echo "$flags"; exit 0 ;;
    --dry-run) dry=--dry-run; shift ;;
    --quick) quick=yes; shift ;;
    --oracle) oracle=--oracle; shift ;;
    --probes) probes=--probes; shift ;;
    --head) head=--head; shift ;;
    --) shift; extra=$*; break ;;
    --methods | --targets | --archs | --seeds | --jobs | --run-root | --data-root)
      case ${2:--} in -*) usage_error "$1: a value is missing" ;; esac
      case $1 in
        --methods) methods=$(narrowed "$1" "$2" "$methods") || exit 2 ;;
        --archs) archs=$(narrowed "$1" "$2" "${archs:-}") || exit 2 ;;
        --targets) wanted=$2 ;;
        --seeds) seeds=$2 ;;
        --jobs) jobs=$2 ;;
        --run-root) runs=$2 ;;
        --data-root) data=$2; roots="--data-root $2" ;;
      esac
      shift 2 ;;
    *) usage_error "unknown flag $1" ;;
  esac
done
case "$runs$data" in *[[:space:]]*) usage_error "--run-root and --data-root: no spaces, please" ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ -z "$quick" ] || { runs=$runs/${reduced:-quick} targets=${quick_targets:-$targets}; }
[ -z "$oracle" ] || methods="$methods full"
targets=${wanted:-$targets} jobs=${jobs:-$([ -z "$quick" ] && echo 1 || nproc)}
roots="--run-root $runs $roots"
width=${quick_width:-0.5} # with --quick, that of the preset quick-<source> in utils/presets.py

commands=""
task() { # LEAVES WORDS...: `python WORDS...` leaves the file LEAVES, or the line NAME in results.jsonl: FOLDER/results.jsonl#NAME
  local leaves=$1; shift
  case $2 in data.* | evaluation.* | experiments.* | analysis.*) set -- "$@" ;; *) set -- "$@" $roots $extra ;; esac
  commands+="$leaves"$'\t'"$*"$'\n'
}
at_the_end() { commands+="-"$'\t'"$*"$'\n'; } # a command that is carried out each time
carry_out() {
  [ -z "$oracle$probes$head" ] || [ -n "$evaluated" ] || usage_error "$(echo $oracle $probes $head): nothing to add to here"
  exec "$PYTHON" -m benchmarks.plan $dry --jobs "$jobs" --run-root "$runs" <<<"$commands"
}

net() { [ -z "$quick" ] && echo "$1" || echo "$1-x$width"; }            # ARCH: as run folders call it
pixels() { [ -z "$quick" ] && echo "$1" || echo 32; }                    # SIZE: of the images
preset() { [ -z "$quick" ] || echo "--preset quick-$1"; }                # SOURCE
fresh() { echo "--arch $1 --image-size $(pixels "$2") ${quick:+--width $width}"; } # ARCH SIZE: a network that nobody trained
scratch_folder() { echo "$runs/scratch/$(net "$1")_$(pixels "$2")px"; }  # ARCH SIZE

prepared() { # NAMES: with --quick, a part of a data set is enough
  for name in $1; do
    [ -z "$quick" ] || task "$data/prepared/$name-32px/test.json" -m data.prepare "$name" --size 32 --partial --data-root "$data"
  done
  commands+="then"$'\n'
}

target_network() { # SOURCE
  task "$runs/$1/target/seed0/target.pt" pretrain_target.py --source "$1" $(preset "$1")
}

distilled_set() { # SOURCE METHOD [FLAGS]: with flags, a variant of KRR-ST under the name METHOD; and the target it needs
  local source=$1 method=$2 folder=$runs/$1/$2/seed0 script="" target="--target-network $runs/$1/target/seed0/target.pt"; shift 2
  case $method in
    scratch) return ;;
    krr_st* | kmeans | random_features | full) target_network "$source" ;;
  esac
  case $method in
    full) return ;;
    krr_st) script="distill.py $target" ;;
    krr_st_*) script="distill.py --name $method $target" ;;
    kmeans | random_features) script="-m distillers $method $target" ;;
    *) script="-m distillers $method" ;;
  esac
  task "$folder/distilled.pt" $script --source "$source" $(preset "$source") "$@"
}

variant() { # METHOD RATE: the flags that make this variant of KRR-ST (README, "Departures"); RATE is D1's
  case $1 in
    krr_st_random_targets) echo "--random-targets" ;;
    krr_st_d1) echo "--outer-lr $2" ;;
    krr_st_d2) echo "--ridge-per-image" ;;
    krr_st_d3) echo "--no-bias-column" ;;
    krr_st_d5) echo "--keep-pool-count" ;;
    krr_st_d7) echo "--raw-init" ;;
    krr_st_d8) echo "--augment-outer" ;;
    krr_st_as_released) echo "--outer-lr $2 --keep-pool-count --raw-init --augment-outer" ;;
    krr_st_pool_of_1) echo "--pool-size 1" ;;
    krr_st_T_*) echo "--pool-steps ${1##*_}" ;;
    krr_st_m_*) echo "--num-images ${1##*_}" ;;
  esac
}

weights() { echo "$runs/$1/$2/seed0/$(net "$3")/seed$4"; } # SOURCE METHOD ARCH SEED: the folder of a pre-trained network

pretrained() { # SOURCE METHOD ARCH SEED
  local images="--distilled $runs/$1/$2/seed0/distilled.pt"
  case $2 in
    scratch | gaussian) return ;;
    full) images="--source $1 $(preset "$1") --target-network $runs/$1/target/seed0/target.pt" ;;
  esac
  task "$(weights "$@")/model.pt" pretrain.py $images --arch "$3" --seed "$4"
}

tuned() { # PROTOCOL LABELS SOURCE METHOD ARCH SEED SIZE TARGET [FLAGS]; LABELS: a share of them, or nothing for all
  local protocol=$1 labels=$2 folder start name; shift 2
  local seed=$4 target=$6
  if [ "$2" = scratch ]; then
    folder=$(scratch_folder "$3" "$5") start="none $(fresh "$3" "$5")"
  else
    folder=$(weights "$@") start=$folder/model.pt
  fi
  name=${target}_$protocol${labels:+_$labels}_seed$seed
  shift 6
  [ "$protocol" = full ] || set -- --protocol "$protocol" ${labels:+--label-fraction $labels}
  task "$folder/results.jsonl#$name" finetune.py --weights $start --dataset "$target" --seed "$seed" "$@"
}
fine_tuned() { tuned full "" "$@" ${quick:+--steps 300 --batch-size 128}; } # SOURCE METHOD ARCH SEED SIZE TARGET [FLAGS]

evaluations() { # SOURCE METHOD ARCH SEED SIZE [FLAGS]: fine-tuned on each target, and what --probes and --head add
  local set="$1 $2 $3 $4 $5" source=$1 method=$2 target share; shift 5
  evaluated=yes
  for target in $targets; do
    fine_tuned $set "$target" "$@"
    [ -n "$probes" ] || continue
    for share in 0.01 0.05 0.1 0.5 ""; do tuned linear "$share" $set "$target"; done
    tuned knn "" $set "$target"
  done
  case $method in # those with labels: the others have no head for classes
    random | kmeans | dsa | dm | mtt | kip | frepo) [ -z "$head" ] || tuned head "" $set "$source" ;;
  esac
}
