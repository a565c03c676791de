#!/usr/bin/env bash
# The main job on the embedded default: one Llama under three recipes on Shakespeare, compared.
# A second call skips what is done. Takes under a quarter of an hour on two CPU cores.
. "$(dirname "$0")/environment.sh" ""  # not the arguments of this script

lowbit prepare corpus/shakespeare --corpus shakespeare
lowbit sweep --out runs/quickstart \
    -c configs/model/quickstart.yaml -c configs/trainer/quickstart.yaml \
    --recipes configs/recipe/{bf16,mxint8,mxfp8}.yaml
lowbit compare runs/quickstart
lowbit prepare --inspect corpus/shakespeare | grep "unigram entropy"  # what a loss must lie below
