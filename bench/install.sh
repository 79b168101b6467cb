#!/usr/bin/env bash
# Makes bench/.venv-energon and bench/.venv-streaming, in which bench/data.py runs these peers, and
# bench/.venv-chinchilla for bench/fit.py.
# PYTHON and TORCH_PIP_ARGS are those of launch/install.sh.
set -euo pipefail
cd "$(dirname "$0")"

for peer in energon streaming chinchilla; do
  venv=.venv-$peer
  requirements=peers/requirements-$peer.txt
  if cmp -s "$requirements" "$venv/installed.txt"; then continue; fi
  "${PYTHON:-python3}" -m venv --clear "$venv"
  pip() { "$venv/bin/python" -m pip --disable-pip-version-check install -qq "$@"; }
  if [ "$peer" = chinchilla ]; then
    pip -r "$requirements"
    cp "$requirements" "$venv/installed.txt"
    continue
  fi
  # shellcheck disable=SC2086 # the arguments are a list of words
  pip ${TORCH_PIP_ARGS:-} torch==2.13.0
  # NOTE: without the constraint another torch, of several gigabytes, would replace this one.
  pip -c <(echo torch==2.13.0) -r "$requirements"
  cp "$requirements" "$venv/installed.txt"
done
