#!/usr/bin/env bash
# Writes launch/lock.txt anew: exact versions, with hashes, of all that the package and its tests
# (but torch and peft) stand on, for Python 3.11 and later, on CPUs.
# usage: launch/lock.sh      then run the tests and commit the file
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(mktemp -d)
trap 'rm -rf "$uv"' EXIT
python3 -m venv "$uv"
"$uv/bin/pip" install --quiet uv==0.13.9
{
  echo "# Made by launch/lock.sh; do not edit. pip install --require-hashes -r launch/lock.txt"
  "$uv/bin/uv" pip compile setup.py --extra dev --universal --python-version 3.11 \
    --generate-hashes --no-header --no-annotate --quiet
} >"$uv/lock.txt"
mv "$uv/lock.txt" launch/lock.txt
