#!/usr/bin/env bash
# What docs/results.md reports, one resumable command: what is done is skipped, what was stopped goes on.
# usage: scripts/results.sh [STAGE...]         times on two cores
#   runs            3 recipes x 3 seeds, cast gaps             40 min
#   branches        H = 20 from 25, 50, 75 % of a BF16 run     20 min, 8 of them for that run
#   controls        BF16 perturbed, and with noise, 3 seeds    25 min
#   drift           learning rate x 1.02, H = 20               20 min
#   long-branches   H = 80                                     30 min
#   tables          what the others have left                  at the end of every call
# JOBS, here 2, run at a time, with one thread each on two cores.
# TINY=1 shrinks everything to seconds, to try the script.
. "$(dirname "$0")/environment.sh" ""  # not the arguments of this script

out=runs/results base=runs/results-base tiny=() corpus=(--corpus shakespeare) data=corpus/shakespeare
short=20 long=80 rounds=5 drift_rounds=9 long_rounds=2 steps=(80 160 240)
if [ -n "${TINY:-}" ]; then
    out=runs/results-tiny base=runs/results-tiny-base
    tiny=(--data.seq_len 32 --data.val_windows 4 --trainer.max_steps 16 --trainer.val_check_interval 8
        --model.llama.num_hidden_layers 1 --checkpoint_every 4 --keep_checkpoints 4)
    short=1 long=4 steps=(4 8 12)
fi
points=() && for step in "${steps[@]}"; do points+=("$base/bf16-s0/checkpoints/step-$(printf %08d "$step")"); done
recipe=configs/recipe control=configs/control jobs=${JOBS:-2}

runs() {
    lowbit sweep --spec configs/sweep/results.yaml --out $out --jobs $jobs -- "${tiny[@]}"
}
base() {
    lowbit sweep --spec configs/sweep/results_base.yaml --out $base -- "${tiny[@]}"
}
branch() {  # NAME HORIZON BRANCHES ARGUMENTS...
    lowbit sweep --out "$out/$1" --branch-from "${points[@]}" --horizon "$2" --branches "$3" --jobs $jobs "${@:4}"
}
branches() {
    base
    branch branches-h$short $short $rounds --target-se 0.0002 --recipes $recipe/{bf16,mxint8,mxfp8}.yaml
}
controls() {
    lowbit sweep --spec configs/sweep/results.yaml --out $out --jobs $jobs \
        --recipes $recipe/bf16.yaml $control/bf16_{perturbed,noise_mxint8}.yaml -- "${tiny[@]}"
}
drift() {
    base
    branch drift $short $drift_rounds --spec configs/sweep/results_drift.yaml
}
long-branches() {
    base
    branch branches-h$long $long $long_rounds --recipes $recipe/{bf16,mxint8,mxfp8}.yaml
}
tables() {
    [ ! -e $out/bf16-s0/run.json ] || lowbit compare $out
    [ ! -e $out/drift/branches.json ] || python scripts/check_drift.py $out/drift
}

[ $# -gt 0 ] || set -- runs branches controls drift long-branches
for stage in "$@"; do
    declare -F "$stage" > /dev/null || { echo "no stage $stage, see $0" >&2; exit 2; }
done
lowbit prepare "$data" "${corpus[@]}"
for stage in "$@"; do
    began=$(date +%s)
    $stage
    echo "stage $stage: $(($(date +%s) - began)) s"
done
[ "${*: -1}" = tables ] || tables
