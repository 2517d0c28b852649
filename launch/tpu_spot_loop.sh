#!/usr/bin/env bash
# A run on spot TPU VMs, through as many of them as it takes; see usage() below.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_spot_loop.sh [--print] arguments of gkdjax.main

Makes the TPU VM of launch/tpu_vm.sh where there is none that works, sets it up, and runs; again
and again, until the run

  ends with 0: done; with 1: a fault of the program; with 2 or 3: a person has to look at it; with
  4 on VMs that are all there: the teacher is not, and waiting for it on TPUs is dear.

It goes on after 75 (stopped, saved), VMs that were taken away, whatever the code of the run was
then, and all else. It waits 30 s before the next try, twice as long each time, up to
15 minutes; after a try of 10 minutes 30 s again. The VM of the last try is left: it costs until
launch/tpu_vm.sh delete.

--print  shows one round of commands instead of running them

The run is continued from --workdir, which has to outlive the VMs: a path under /mnt/gkdjax, with
TPU_NFS set. Environment: as for launch/tpu_vm.sh, TPU_SPOT=1 unless set, and

  SPOT_TRIES     100 unless set; after so many the loop ends with the code of the last
  SPOT_PAUSE_S   instead of 30
TEXT
}

if [[ $# -eq 0 || $1 == --help ]]; then
  usage >&2
  exit $(($# == 0 ? 2 : 0))
fi
here=$(cd "$(dirname "$0")" && pwd)
export TPU_SPOT=${TPU_SPOT-1}
shortest=${SPOT_PAUSE_S:-30} longest=900
tries=${SPOT_TRIES:-100}

if [[ $1 == --print ]]; then
  shift
  for command in create setup; do
    "$here/tpu_vm.sh" "$command" --print
  done
  "$here/tpu_vm.sh" run --print "$@"
  exit
fi
for name in TPU_NAME TPU_ZONE TPU_TYPE TPU_RUNTIME; do
  [[ -n ${!name:-} ]] || { echo "tpu_spot_loop.sh: set $name; --help says to what" >&2 && exit 2; }
done

# READY, PREEMPTED, ...; nothing if there is no such VM.
state() {
  gcloud compute tpus tpu-vm describe "$TPU_NAME" "--zone=$TPU_ZONE" '--format=value(state)' || true
}

# A mistake stays a mistake; whatever else goes wrong may go well next time.
prepare() {
  local code=0
  "$here/tpu_vm.sh" "$1" || code=$?
  case $code in 0 | 2) return "$code" ;; *) return 75 ;; esac
}

attempt() {
  local now code=0
  now=$(state)
  if [[ $now != READY ]]; then
    if [[ -n $now ]]; then prepare delete || return; fi
    prepare create || return
  fi
  prepare setup || return
  "$here/tpu_vm.sh" run "$@" || code=$?
  # gcloud ends with 1, too, when the VM is gone, and a run with 4, when only some of them are.
  if [[ $code == [14] && $(state) != READY ]]; then code=75; fi
  return "$code"
}

case " $*" in
  *" --workdir="* | *" --workdir "*) ;;
  *)
    echo "tpu_spot_loop.sh: set --workdir to a path that outlives the VMs, under /mnt/gkdjax" >&2
    exit 2
    ;;
esac

pause=$shortest
for ((try = 1; try <= tries; try++)); do
  begin=$SECONDS code=0
  attempt "$@" || code=$?
  case $code in
    0 | 1 | 2 | 3 | 4)
      if [[ $code == 4 ]]; then
        echo "tpu_spot_loop.sh: the teacher's server, or process 0, could not be reached" >&2
      fi
      echo "tpu_spot_loop.sh: the run ended with $code; $TPU_NAME is still there" >&2
      exit "$code"
      ;;
  esac
  if ((SECONDS - begin > 600)); then pause=$shortest; fi
  echo "tpu_spot_loop.sh: try $try of $tries ended with $code; the next in $pause s" >&2
  sleep "$pause"
  pause=$((2 * pause < longest ? 2 * pause : longest))
done
exit "$code"
