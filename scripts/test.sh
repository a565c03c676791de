#!/usr/bin/env bash
# All tests, from a fresh clone: the fast tier, then the slow one (subprocesses, kills, two ranks).
. "$(dirname "$0")/environment.sh" test

export OMP_NUM_THREADS=1  # several test processes; sums depend on the number of threads
pytest -q -n 2 "$@"
pytest -q -m slow -n 2 tests/lowbit "$@"  # compilations and builds
pytest -q -m slow tests/data tests/train "$@"  # kills and ranks, one at a time
