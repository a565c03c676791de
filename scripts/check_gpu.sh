#!/usr/bin/env bash
# What the first user with GPUs runs: all that no test on a CPU can show, into one file.
# usage: scripts/check_gpu.sh [REPORT]      (docs/gpu.md)
. "$(dirname "$0")/environment.sh" test
report=${1:-docs/gpu.md}
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

heading() { printf '\n## %s\n\n```\n' "$1"; }
{
    printf '# CUDA check\n\nCommit %s, %s.\n' "$(git rev-parse HEAD)" "$(date --utc +%F)"
    heading "Machine"
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
    python -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.nccl.version())'
    printf '```\n'
    heading "Tests"
} > "$report"

failed=0
pytest -q -rs -m gpu tests 2>&1 | tee -a "$report" || failed=1
printf '```\n' >> "$report"

lowbit prepare "$runs/data" --text 'lowbit/*.py' 'train/*/*.py' 'data/*.py' 'tests/*/*.py' --tokenizer bytes
for recipe in bf16 mxint8 mxfp8; do
    lowbit fit -c configs/launch/145m-ddp.yaml -c "configs/recipe/$recipe.yaml" \
        --data.path "$runs/data" --run_dir "$runs/$recipe" --data.global_batch_size 8 \
        --data.val_windows 4 --trainer.devices 1 --trainer.strategy auto --trainer.max_steps 30 \
        --trainer.accumulate_grad_batches 1 --trainer.val_check_interval 30 || failed=1
done
{
    heading "Throughput: the 145M model on one GPU, 30 steps of 8 windows, median tokens/s"
    lowbit compare "$runs"/{bf16,mxint8,mxfp8} || failed=1
    printf '```\n'
} >> "$report"
echo "report in $report"
exit $failed
