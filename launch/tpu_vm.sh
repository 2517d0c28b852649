#!/usr/bin/env bash
# A TPU VM or a pod slice of them, from nothing to a run; see usage() below.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm.sh COMMAND [--print] [arguments of gkdjax.main, for run]

create   makes the TPU VM, or all VMs of a slice
setup    sends this checkout and what it needs to every VM: launch/worker_setup.sh
run      starts python -m gkdjax.main on every VM and shows what it says, until it ends; ends with
         its exit code. Goes on without us if the connection is lost: the same command, again,
         shows it once more. Make --workdir a path under /mnt/gkdjax (see TPU_NFS)
logs     shows what the run says, on the first VM
stop     asks the run to save and to stop (its exit code is 75), and returns when it has
delete   deletes the VMs, with their disks

--print  shows the commands instead of running them

Environment:
  TPU_NAME      what to call it
  TPU_ZONE      as us-west4-a
  TPU_TYPE      for create: as v5litepod-8 (one VM), v5litepod-16 (four VMs)
  TPU_RUNTIME   for create: the software of the VM, as v2-alpha-tpuv5-lite
  TPU_SPOT      for create: 1 for a spot VM, which may be taken away; see launch/tpu_spot_loop.sh
  TPU_NFS       for setup: HOST:/PATH, which every VM mounts at /mnt/gkdjax
  TPU_KEYS      for setup: a file of lines NAME=VALUE (HF_TOKEN, what teacher.api_key_env names),
                readable by its owner alone, for the environment of the run
TEXT
}

die() {
  echo "tpu_vm.sh: $1" >&2
  exit 2
}

need() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || die "set $name; launch/tpu_vm.sh --help says to what"
  done
}

# In quotes where a shell needs them.
quoted() {
  local word line=
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+="${line:+ }$word"
  done
  echo "$line"
}

do_or_print() {
  if $print; then quoted "$@"; else "$@"; fi
}

on_workers() {
  local workers=$1 command=$2
  do_or_print gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--zone=$TPU_ZONE" --quiet \
    "--worker=$workers" "--command=$command"
}

send() {
  do_or_print gcloud compute tpus tpu-vm scp "$1" "$TPU_NAME:$2" "--zone=$TPU_ZONE" --quiet \
    --worker=all
}

create() {
  need TPU_TYPE TPU_RUNTIME
  local flags=("--zone=$TPU_ZONE" "--accelerator-type=$TPU_TYPE" "--version=$TPU_RUNTIME" --quiet)
  if [[ ${TPU_SPOT:-} == 1 ]]; then flags+=(--spot); fi
  do_or_print gcloud compute tpus tpu-vm create "$TPU_NAME" "${flags[@]}"
}

# All files that git knows or would take, as they are now.
pack() {
  mkdir -p "$(dirname "$archive")"
  git -C "$checkout" ls-files -z --cached --others --exclude-standard --deduplicate |
    (cd "$checkout" && while IFS= read -r -d '' file; do
      if [[ -e $file ]]; then printf '%s\0' "$file"; fi
    done) |
    tar -C "$checkout" --null -T - -czf "$archive"
}

setup() {
  local keys=${TPU_KEYS:-}
  if [[ -n $keys ]]; then
    [[ -f $keys ]] || die "TPU_KEYS=$keys is no file"
    [[ $(ls -lL "$keys") == -??-------* ]] || die "$keys can be read by others: chmod 600 $keys"
  fi
  $print || pack
  send "$archive" gkdjax.tar.gz
  if [[ -n $keys ]]; then
    on_workers all 'touch gkdjax-keys && chmod 600 gkdjax-keys'  # before anything is in it
    send "$keys" gkdjax-keys
  fi
  # The package is replaced; runs and data that lie beside it stay.
  on_workers all "mkdir -p gkdjax && rm -rf gkdjax/gkdjax && tar -xzf gkdjax.tar.gz -C gkdjax &&\
 gkdjax/launch/worker_setup.sh $(quoted tpu ${TPU_NFS:+"$TPU_NFS"})"
}

if [[ ${1:-} == --help ]]; then
  usage
  exit 0
fi
command=${1:-} print=false
[[ $# -gt 0 ]] && shift
if [[ ${1:-} == --print ]]; then
  print=true
  shift
fi
if [[ ! $command =~ ^(create|setup|run|logs|stop|delete)$ || ($command != run && $# -gt 0) ]]; then
  usage >&2
  exit 2
fi
need TPU_NAME TPU_ZONE
$print || command -v gcloud >/dev/null || die "needs gcloud, Google Cloud's command line"
checkout=$(cd "$(dirname "$0")/.." && pwd)
archive=${XDG_CACHE_HOME:-$HOME/.cache}/gkdjax/$TPU_NAME.tar.gz

case $command in
  create) create ;;
  setup) setup ;;
  run)
    [[ $# -gt 0 ]] || die "run needs the arguments of gkdjax.main, as --config=configs/gemma3.py"
    on_workers all "gkdjax/launch/worker_run.sh run $(quoted "$@")"
    ;;
  logs) on_workers 0 'gkdjax/launch/worker_run.sh logs' ;;
  stop) on_workers all 'gkdjax/launch/worker_run.sh stop' ;;
  delete)
    do_or_print gcloud compute tpus tpu-vm delete "$TPU_NAME" "--zone=$TPU_ZONE" --quiet
    ;;
esac
