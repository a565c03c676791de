#!/usr/bin/env bash
# What docs/results.md reports, one resumable command: what is done is skipped, what was stopped goes on, and
# a later call may add checkpoints, branches and recipes. Every stage prints what is left and what it took.
# usage: scripts/results.sh [STAGE...]     steps of the quickstart's model (0.4 to 0.6 s each on two quiet cores)
#   base       BF16, three seeds, 320 steps                                          960
#   branches   23 arms, H = 20, 3 branches from half-way of each run               4,140
#   casts      21 recipes on both plays of the validation split, three checkpoints 2,800 forward passes
#   planted    1 % and 4 % more learning rate, H = 20                                540
#   long       the arms of `branches` at H = 80; not part of a call without stages 16,560
#   tables     what the others have left                                           at the end of every call
# SEEDS="0 1" takes fewer runs, BRANCHES=6 more branches, DEVICE=cuda another device.
# JOBS, here 2, run at a time, with one thread each on two cores.
# TINY=1 shrinks everything to seconds, to try the script.
. "$(dirname "$0")/environment.sh" ""  # not the arguments of this script

out=runs/ladder tiny=() corpus=(--corpus shakespeare) data=corpus/shakespeare
short=20 long=80 step=160 branches=${BRANCHES:-3} spec=configs/sweep/ladder
read -ra seeds <<< "${SEEDS:-0 1 2}"
if [ -n "${TINY:-}" ]; then
    out=runs/ladder-tiny short=1 long=2 step=4
    tiny=(--data.seq_len 32 --data.val_windows 10 --trainer.max_steps 8 --trainer.val_check_interval 4
        --model.llama.num_hidden_layers 2 --checkpoint_every 4)
fi
[ -z "${DEVICE:-}" ] || tiny+=(--trainer.accelerator "$DEVICE")
points=() && for seed in "${seeds[@]}"; do points+=("$out/bf16-s$seed/checkpoints/step-$(printf %08d $step)"); done
jobs=${JOBS:-2}
# the study's questions, asked in advance
questions=(mxint8:mxfp8 mxint6:mxfp6 mxint4:mxfp4 nvint4:nvfp4_plain nvint4_rotated:nvfp4_rotated
    nvint4_rotated:nvint4 nvfp4_rotated:nvfp4_plain mxint4_rotated:mxint4 mxfp4_rotated:mxfp4)
margin=0.001  # nats: what counts as equal, stated before the run

branch() {  # NAME HORIZON ARGUMENTS...
    lowbit sweep --out "$out/$1" --branch-from "${points[@]}" --horizon "$2" --branches "$branches" --jobs "$jobs" "${@:3}"
}
base() {
    lowbit sweep --spec ${spec}_base.yaml --out $out --jobs "$jobs" --seeds "${seeds[@]}" -- "${tiny[@]}"
}
branches() { branch branches $short --spec $spec.yaml; }
casts() { branch branches $short --spec $spec.yaml --casts; }
planted() { branch planted $short --spec ${spec}_planted.yaml; }
long() { branch branches-h$long $long --spec $spec.yaml; }
tables() {
    [ -e $out/bf16-s0/run.json ] || return 0
    lowbit compare $out --pairs "${questions[@]}" --equivalent-within $margin
    python scripts/ladder.py $out --draw $out/compare/ladder
}

[ $# -gt 0 ] || set -- base branches casts planted
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
