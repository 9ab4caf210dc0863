#!/usr/bin/env bash
# One command for whoever has a GPU: the rows that docs/results.md calls "not run", the most wanted
# first, each with both evaluations, and then the benchmark.
#
#     bash tests/full_size.sh --try              first: all of it in small, kept apart
#     bash tests/full_size.sh                    stopped or failed, the same command goes on
#     bash tests/full_size.sh --data-dir ~/data  what is added goes to each training run
#
# Add only --data-dir, --device and --seed: docs/results.py refuses runs with other settings.
# PYTHON=python3 in front names another Python.

set -euo pipefail
cd "$(dirname "$0")/.."
trap 'echo "stopped: the same command goes on from here" >&2; exit 130' INT

python=${PYTHON:-python} runs=runs/full-size results=docs/results
tiny="" probe="" bench="--data cifar10"
case ${1:-} in
-h | --help) sed -n '2,/^$/ s/^# \{0,1\}//p' "$0" && exit ;;
--try)
    shift
    runs=runs/full-size-try results=runs/full-size-try/results
    tiny="--subset 200 --holdout 100 --epochs 1 --batch-size 20" probe="--epochs 1"
    bench="--only step --arch conv4 --rounds 1 --images 256"
    ;;
esac
rows=(  # RESNET in docs/results.py: the folder's name up to the seed, and the command
    "ressl-cifar10-resnet18 ressl.py --data cifar10"
    "rm-cifar100-resnet18-with residual_momentum.py --data cifar100"
    "rm-cifar100-resnet18-without residual_momentum.py --data cifar100 --residual-weight 0"
    "ressl-cifar100-resnet18 ressl.py --data cifar100"
    "rm-cifar10-resnet18 residual_momentum.py --data cifar10"
)
seed=0 data_dir=data device=auto before=""
for word in "$@"; do  # --seed 1 or --seed=1
    case $before in
    --seed) seed=$word ;; --data-dir) data_dir=$word ;; --device) device=$word ;;
    esac
    case $word in
    --seed=*) seed=${word#*=} ;; --data-dir=*) data_dir=${word#*=} ;; --device=*) device=${word#*=} ;;
    esac
    before=$word
done

check_tree() {  # the commit in a log has to be what made it
    commit=$(git describe --always --dirty 2>/dev/null || echo "no git, so dirty")
    if [ $results = docs/results ] && [[ $commit = *dirty ]]; then
        echo "error: docs/results.py refuses runs of changed files (git status): commit them," \
            "or git stash; without git, start from a git clone" >&2
        exit 2
    fi
}

call() {  # COMMAND: say it, run it, stop everything where it fails
    check_tree
    { printf '\n$'; printf ' %q' "$@"; echo; } >&2
    "$@" || { code=$?; echo "stopped, exit code $code: $*" >&2; exit $code; }
}

row() {  # NAME SCRIPT OPTIONS: train or go on, evaluate, keep the logs
    local name=$1-seed$seed script=$2
    local run=$runs/$name kept=$results/gpu/$name
    shift 2
    if [ -e "$kept" ]; then echo "there already: $kept"; return; fi
    if [ -e "$run/checkpoint.pt" ]; then
        call "$python" "$script" --resume "$run" --device "$device"
    else
        call "$python" "$script" "$@" --output "$run"
    fi
    call "$python" knn_eval.py "$run" --device "$device"
    call "$python" linear_eval.py "$run" --device "$device" $probe
    mkdir -p "$kept.part"
    cp "$run/log.jsonl" "$run/evals.jsonl" "$kept.part"
    mv "$kept.part" "$kept"  # never half a folder
}

check_tree
mkdir -p $results/gpu
echo "In turn, each NAME-seed$seed in $runs; evaluated, its logs go to $results/gpu:"
printf '    %s\n' "${rows[@]}" "bench-gpu.md tests/bench.py $bench"
for each in "${rows[@]}"; do row $each $tiny "$@"; done  # unquoted: split into words

if [ ! -e $results/gpu/bench-gpu.md ]; then
    {
        printf '# Output of `tests/bench.py`, commit %s\n\n' "$commit"
        printf '`python tests/bench.py %s`:\n\n' "$bench"
        call "$python" tests/bench.py $bench --data-dir "$data_dir" --device "$device"
    } | tee $results/gpu/bench-gpu.md.part
    mv $results/gpu/bench-gpu.md.part $results/gpu/bench-gpu.md
fi

case $results in
docs/results) echo "Next: $python docs/results.py fills the tables; commit, or send $results" ;;
*) echo "All of it works here. Next: rm -r $runs, then the same command without --try" ;;
esac
