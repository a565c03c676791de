#!/usr/bin/env bash
# The main job on the embedded default: one Llama under three recipes on Shakespeare, compared, and what these
# minutes resolve. A second call skips what is done. The aim on two cores: 10 minutes where the CPU multiplies
# BF16 itself (AVX512-BF16, AMX), 25 elsewhere.
. "$(dirname "$0")/environment.sh" ""  # not the arguments of this script

stage() { echo "== $1"; }
recipes=(--recipes configs/recipe/{bf16,mxint8,mxfp8}.yaml)

stage "1 of 4: Shakespeare as tokens (seconds)"
lowbit prepare corpus/shakespeare --corpus shakespeare
stage "2 of 4: three runs, then the baseline's weights cast into each format (how long is said after the first steps)"
lowbit sweep --out runs/quickstart -c configs/model/quickstart.yaml -c configs/trainer/quickstart.yaml "${recipes[@]}"
stage "3 of 4: four branches of 10 steps from the baseline's step 100 (about a fifth of stage 2)"
lowbit sweep --out runs/quickstart/branches --branch-from runs/quickstart/bf16-s0/checkpoints/step-00000100 \
    --horizon 10 --branches 4 "${recipes[@]}"
stage "4 of 4: the comparison"
lowbit compare runs/quickstart
lowbit prepare --inspect corpus/shakespeare | grep "unigram entropy"  # what a loss must lie below
