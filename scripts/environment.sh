# Sourced by the other scripts: a virtual environment in .venv with lowbit and its pinned dependencies.
# usage: . scripts/environment.sh [EXTRA]      (EXTRA: test)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:+[$1]}
stamp=.venv/installed$extra-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)

if [ ! -e "$stamp" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lowbit needs Python 3.11 or newer")'
    [ -x .venv/bin/python ] || python3 -m venv .venv
    pip=".venv/bin/python -m pip --disable-pip-version-check"
    echo "installing into .venv (once, a few minutes) ..."
    if ! command -v nvidia-smi > /dev/null; then  # no GPU: not the CUDA build, which is gigabytes
        torch=$(grep '^torch==' constraints.txt)
        $pip install -q "$torch+cpu" 2> /dev/null ||
            $pip install -q --index-url https://download.pytorch.org/whl/cpu "$torch" ||
            echo "no CPU build of $torch found, taking what the default index has"
    fi
    $pip install -q -c constraints.txt -e ".$extra"
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
