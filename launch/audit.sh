#!/usr/bin/env bash
# Looks for known vulnerabilities of all that launch/install.sh installs, by name and version.
#
# It asks pypi.org for its advisories, which mirrors of the registry seldom have, so it is no part of
# CI. What could not be looked up fails it as well: silence is no good news.
#
#   PYTHON  the interpreter that makes .venv-audit, where pip-audit lives; by default python3
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-audit
tool=pip-audit==2.10.1
if [ "$tool" != "$(cat "$venv/installed.txt" 2>/dev/null)" ]; then
  "${PYTHON:-python3}" -m venv --clear "$venv"
  "$venv/bin/python" -m pip --disable-pip-version-check install -qq "$tool"
  echo "$tool" >"$venv/installed.txt"
fi
torch=$(sed -n 's/.*by default \(torch==[0-9.]*\)$/\1/p' launch/install.sh)
"$venv/bin/pip-audit" --strict --no-deps --disable-pip -r requirements.lock -r <(echo "$torch")
