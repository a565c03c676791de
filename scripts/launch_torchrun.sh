#!/usr/bin/env bash
# `lowbit fit` on all GPUs of one node, or of several: the same command on each of them.
# usage: [PROCESSES=8] [NODES=2 HEAD=host:29500] scripts/launch_torchrun.sh FIT_ARGUMENTS
#   scripts/launch_torchrun.sh -c configs/launch/1b-fsdp2.yaml -c configs/recipe/mxint8.yaml
# SIGTERM, SIGINT or SIGUSR1 stops the run with a checkpoint; the same command goes on.
set -euo pipefail
processes=${PROCESSES:-$(nvidia-smi -L | wc -l)}
nodes=${NODES:-1}
if [ "$nodes" = 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "${HEAD:?host:port of one node}")
fi
signals=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1  # passed on; then it waits for the save
exec torchrun "${rendezvous[@]}" --nproc-per-node "$processes" \
    --signals-to-handle "$signals" --shutdown-timeout 600 "$(command -v lowbit)" fit "$@" \
    --trainer.devices "$processes" --trainer.num_nodes "$nodes"
