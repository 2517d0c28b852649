#!/usr/bin/env bash
# Makes a machine ready for a run; see usage() below.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/worker_setup.sh tpu|cuda12|cuda13|cpu [NFS-HOST:/PATH]

On a machine of a cluster, in a checkout of gkdjax: an environment in ~/gkdjax-venv with this
checkout, JAX for the accelerator, and the versions of launch/pins.txt. Can be run again at any
time: what is there already is left as it is.

NFS-HOST:/PATH is mounted at /mnt/gkdjax (needs sudo): a run of several machines needs a --workdir
that all of them see, and one on spot machines a --workdir that outlives them.

  GKDJAX_VENV   another directory for the environment
TEXT
}

if [[ $# -lt 1 || $# -gt 2 || ! $1 =~ ^(tpu|cuda12|cuda13|cpu)$ ]]; then
  usage >&2
  exit 2
fi
accelerator=$1 share=${2:-}
checkout=$(cd "$(dirname "$0")/.." && pwd)
venv=${GKDJAX_VENV:-$HOME/gkdjax-venv}
mounted=/mnt/gkdjax

if [[ -n $share ]] && ! grep -q " $mounted nfs" /proc/mounts; then
  [[ -x /sbin/mount.nfs ]] || { sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common; }
  sudo mkdir -p "$mounted"
  sudo mount -t nfs "$share" "$mounted"
fi

# The environment is made again when one of these is another than it was.
wanted=$(
  echo "$accelerator $checkout"
  cat "$checkout/setup.py" "$checkout/launch/pins.txt"
)
stamp=$venv/installed.txt
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  echo "$venv is as it should be"
  exit 0
fi

find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  return 1
}

# Ubuntu 22.04, of which TPU VMs are made, comes with Python 3.10.
if ! python=$(find_python); then
  sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv
  python=$(find_python) || { echo "needs Python 3.11 or newer, with venv" >&2 && exit 2; }
fi

case $accelerator in
  cpu) what=$checkout ;;
  *) what="${checkout}[$accelerator]" ;;
esac
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint "$checkout/launch/pins.txt" --editable "$what"
"$venv/bin/python" -c 'import gkdjax.main, jax; print("jax", jax.__version__, "in", jax.__file__)'
echo "$wanted" >"$stamp"
