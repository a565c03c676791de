#!/usr/bin/env bash
# All tests, from a fresh clone: the fast tier, then the slow one (subprocesses, kills, two ranks).
. "$(dirname "$0")/environment.sh" test

export OMP_NUM_THREADS=1  # several test processes; sums depend on the number of threads
pytest -q -n 2 "$@"
# what needs no clock and starts no ranks, side by side; the rest one at a time
side_by_side="tests/lowbit tests/data tests/train/analysis tests/train/test_recipes.py"
pytest -q -m slow -n 2 $side_by_side "$@"
pytest -q -m slow tests/train --ignore tests/train/analysis --ignore tests/train/test_recipes.py "$@"
