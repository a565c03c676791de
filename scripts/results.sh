#!/usr/bin/env bash
# What docs/results.md reports, one resumable command: what is done is skipped, what was stopped goes on, and
# a later call may add checkpoints, branches and recipes. Every stage prints what is left and what it took.
# usage: scripts/results.sh [OPTIONS] [STAGE...]     steps of the quickstart's model (0.4 to 0.6 s each on two
# quiet cores)
#   base       BF16, three seeds, 320 steps                                          960
#   branches   23 arms, H = 20, 3 branches from half-way of each run               4,140
#   casts      21 recipes on both plays of the validation split, three checkpoints 2,800 forward passes
#   planted    1 % and 4 % more learning rate, H = 20                                540
#   disputes   nine arms on which papers disagree, H = 20, beside the ladder's       1,620
#   clipping   six arms: codes to -128 or to -127, three block sizes, H = 20         1,080
#   long       the arms of `branches` at H = 80; not part of a call without stages 16,560
#   tables     what the others have left                                           at the end of every call
# SEEDS="0 1" takes fewer runs, BRANCHES=6 more branches, ARMS="a.yaml b.yaml" these arms alone of a stage's.
# --device cuda, --model 145m with --data FOLDER (prepared) and --tokens N (of a run): larger, into a folder of
# its own. Not measured: no GPU was lent while this was built.
# JOBS, here 2, run at a time, with one thread each on two cores.
# TINY=1 shrinks everything to seconds, to try the script.
. "$(dirname "$0")/environment.sh" ""  # not the arguments of this script

device=${DEVICE:-} model= tokens= data=
while [[ "${1:-}" == --* ]]; do
    name=${1#--}
    case $name in
        device | model | tokens | data) printf -v "$name" %s "${2:?$1 needs a value}" && shift 2 ;;
        *) echo "no option $1, see $0" >&2 && exit 2 ;;
    esac
done
case $device in '' | cpu | cuda) ;; *) echo "--device $device: cpu or cuda" >&2 && exit 2 ;; esac
out=runs/ladder${model:+-$model} tiny=() larger=() arms=()
short=20 long=80 step=160 branches=${BRANCHES:-3} spec=configs/sweep/ladder
read -ra seeds <<< "${SEEDS:-0 1 2}"
if [ -n "${TINY:-}" ]; then
    out+=-tiny short=1 long=2 step=4
    tiny=(--data.seq_len 32 --data.val_windows 10 --trainer.max_steps 8 --trainer.val_check_interval 4
        --model.llama.num_hidden_layers 2 --checkpoint_every 4)
fi
[ -z "$device" ] || tiny+=(--trainer.accelerator "$device")
[ "$device" != cuda ] || out+=-cuda  # numbers of one device are no pairs of another's
if [ -n "$model" ]; then
    config=configs/model/$model.yaml
    size() { sed -n "s/^  $1: //p" "$config"; }
    [ -f "$config" ] || { echo "--model $model: there is no $config" >&2; exit 2; }
    larger=(-c "$config" -c configs/trainer/quickstart.yaml)
    if [ -n "$tokens" ]; then
        quarter=$((tokens / $(size global_batch_size) / $(size seq_len) / 4)) step=$((2 * quarter))
        [ $step -ge $short ] || { echo "--tokens $tokens: half of them are $step steps, branches take $short" >&2; exit 2; }
        tiny+=(--trainer.max_steps $((4 * quarter)) --trainer.val_check_interval $quarter --checkpoint_every $step)
    fi
fi
[ -z "$data" ] || tiny+=(--data.path "$data")
[ -z "${ARMS:-}" ] || arms=(--recipes configs/recipe/bf16.yaml $ARMS)
points=() && for seed in "${seeds[@]}"; do points+=("$out/bf16-s$seed/checkpoints/step-$(printf %08d $step)"); done
jobs=${JOBS:-2}
# the study's questions, asked in advance
questions=(mxint8:mxfp8 mxint6:mxfp6 mxint4:mxfp4 nvint4:nvfp4_plain nvint4_rotated:nvfp4_rotated
    nvint4_rotated:nvint4 nvfp4_rotated:nvfp4_plain mxint4_rotated:mxint4 mxfp4_rotated:mxfp4)
questions+=(mxfp4_wgrad_only:mxfp4_dgrad_only mxfp8_2d_weights:mxfp8 nvfp4_forward_bf16:nvfp4
    nvfp4_wgrad_rotated:nvfp4_signs_none nvfp4_signs_step:nvfp4_wgrad_rotated
    nvfp4_signs_once_stochastic:nvfp4_signs_none_stochastic nvfp4_signs_step_stochastic:nvfp4_signs_once_stochastic
    nvfp4_signs_once_stochastic:nvfp4_wgrad_rotated)
for block in '' _128 _row; do questions+=("mxint8_asymmetric_bf16$block:mxint8_symmetric_bf16$block"); done
margin=0.001  # nats: what counts as equal, stated before the run

branch() {  # NAME HORIZON ARGUMENTS...
    lowbit sweep --out "$out/$1" --branch-from "${points[@]}" --horizon "$2" --branches "$branches" --jobs "$jobs" "${@:3}"
}
base() {
    lowbit sweep --spec ${spec}_base.yaml "${larger[@]}" --out $out --jobs "$jobs" --seeds "${seeds[@]}" -- "${tiny[@]}"
}
branches() { branch branches $short --spec $spec.yaml "${arms[@]}"; }
disputes() { branch branches $short --spec configs/sweep/disputes.yaml "${arms[@]}"; }
clipping() { branch branches $short --spec configs/sweep/clipping.yaml "${arms[@]}"; }
casts() { branch branches $short --spec $spec.yaml --casts; }
planted() { branch planted $short --spec ${spec}_planted.yaml; }
long() { branch branches-h$long $long --spec $spec.yaml; }
tables() {
    [ -e $out/branches/branches.json ] || return 0
    known=" $(python -c 'import json, sys; print(*(a["label"] for a in json.load(open(sys.argv[1]))["arms"]))' \
        $out/branches/branches.json) " asked=()
    for pair in "${questions[@]}"; do
        [[ $known != *" ${pair%:*} "* || $known != *" ${pair#*:} "* ]] || asked+=("$pair")
    done
    lowbit compare $out ${asked[@]:+--pairs "${asked[@]}"} --equivalent-within $margin
    python scripts/ladder.py $out --draw $out/compare/ladder
    python scripts/clipping.py $out
}

[ $# -gt 0 ] || set -- base branches casts planted disputes clipping
for stage in "$@"; do
    [[ " base branches casts planted disputes clipping long tables " == *" $stage "* ]] || { echo "no stage $stage, see $0" >&2; exit 2; }
done
[ -n "$data" ] || lowbit prepare corpus/shakespeare --corpus shakespeare
for stage in "$@"; do
    began=$(date +%s)
    $stage
    echo "stage $stage: $(($(date +%s) - began)) s"
done
[ "${*: -1}" = tables ] || tables
