#!/usr/bin/env bash
# All tests, from a fresh clone: the fast tier, then the slow one (subprocesses, kills, two ranks).
. "$(dirname "$0")/environment.sh" test

pytest -q "$@"
pytest -q -m slow "$@"
