#!/usr/bin/env bash
# All tests, from a fresh clone: the fast tier, then the slow one (subprocesses, kills, two ranks).
# Every tier runs, whatever the one before it did; the exit code is 1 if any failed.
. "$(dirname "$0")/environment.sh" test

export OMP_NUM_THREADS=1  # several test processes; sums depend on the number of threads
failed=()
tier() {  # tier NAME ARGUMENTS...
    local name=$1 code=0
    shift
    pytest -q "$@" || code=$?
    [ "$code" = 0 ] || failed+=("$name (pytest's exit code $code)")
}
tier "fast" -n 2 --dist worksteal "$@"  # which leaves the tests of a fixture together
tier "slow" -m slow -n 2 --dist loadfile "$@"

for name in ${failed[@]+"${failed[@]}"}; do
    echo "test.sh: failed: $name" >&2
done
[ ${#failed[@]} = 0 ]
