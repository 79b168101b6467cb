#!/usr/bin/env bash
# Makes the Python environment: torch first, from a source of your choice, then requirements.lock.
# Used by `make env` and by the Dockerfile. Run again, it does nothing until an input changes.
#
#   VENV            where the environment lives, by default .venv
#   PYTHON          the interpreter that makes it, by default the first of python3, 3.13 ... 3.10
#   TORCH           what pip installs as torch, by default torch==2.13.0
#   TORCH_PIP_ARGS  more arguments for that pip call, e.g. "--index-url URL" of another build
#
# TORCH and TORCH_PIP_ARGS are remembered in the environment: give them once.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
stamp=$venv/installed.txt # two lines with the chosen torch, then the lock file that was installed
lock=requirements.lock

say() { echo "environment: $*"; }
fail() { say "$*" >&2 && exit 1; }
remembered() { if [ -f "$stamp" ]; then sed -n "s/^$1=//p" "$stamp"; fi; }
works() { # the shims of version managers exist and fail, so try the interpreter itself
  "$1" -c 'import ensurepip, sys, venv; assert (3, 10) <= sys.version_info < (3, 14)' 2>/dev/null
}

find_python() {
  local name
  for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if works "$name"; then echo "$name" && return; fi
  done
  fail "none of ${PYTHON:-python3 and python3.10 to python3.13} is a Python 3.10-3.13" \
    "with its venv module; install one (Debian, Ubuntu: python3 and python3-venv)," \
    "or name one with PYTHON=/path/to/python3."
}

torch=${TORCH:-$(remembered TORCH)}
torch_pip_args=${TORCH_PIP_ARGS:-$(remembered TORCH_PIP_ARGS)}
choice="TORCH=$torch"$'\n'"TORCH_PIP_ARGS=$torch_pip_args"
if works "$venv/bin/python" &&
  [ "$choice"$'\n'"$(cat "$lock")" = "$(cat "$stamp" 2>/dev/null)" ]; then
  say "$venv is up to date" && exit
fi

if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
  fail "$venv exists and is no virtual environment; move it away, or name another place with VENV=."
fi
if ! works "$venv/bin/python"; then
  python=$(find_python)
  "$python" -m venv --clear "$venv"
fi
version=$("$venv/bin/python" --version)
say "installing ${torch:-torch==2.13.0} and $lock into $venv ($version); this takes minutes"

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# pip takes another build of the same version for the wanted one: a new choice begins without torch.
if [ "$choice" != "$(head -n 2 "$stamp" 2>/dev/null)" ]; then
  pip uninstall -qq --yes torch
fi
echo "$choice" >"$stamp"
# shellcheck disable=SC2086 # the arguments are a list of words
pip install -qq $torch_pip_args "${torch:-torch==2.13.0}"
# NOTE: the lock is complete; with --no-deps nothing in it can replace the torch that was chosen.
pip install -qq --no-deps -r "$lock"
cat "$lock" >>"$stamp"
say "$venv is ready after $SECONDS s"
