#!/usr/bin/env bash
# A run with a vLLM teacher beside it; see usage() below and launch/README.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/teacher_vllm.sh [--cpu] MODEL NAME PORT [more vLLM arguments] -- COMMAND...

Starts launch/start_vllm.sh with what stands before "--", waits until the server answers, runs
COMMAND, stops the server, and ends with COMMAND's exit code:

  launch/teacher_vllm.sh google/gemma-3-12b-it teacher 8000 --max-model-len 4096 -- \
      python -m gkdjax.main --config=configs/vllm_teacher.py

SIGTERM goes to COMMAND, and the server stays until that has ended. A server that ends before it
answers, or does not answer in time, is exit code 4. It listens to this machine alone; of a cluster,
start it on one machine, with --host 0.0.0.0 and a key.

Both on the same GPUs is what is taken for granted: --gpu-memory-utilization 0.45 for the server
and XLA_PYTHON_CLIENT_MEM_FRACTION=0.4 for COMMAND, unless they are given.

Environment:
  TEACHER_GPUS      as 0,1: GPUs for the server alone, of which it takes 0.8 unless told. Give
                    COMMAND the others, with CUDA_VISIBLE_DEVICES
  TEACHER_KEY_FILE  a file with the server's key, readable by its owner alone
  TEACHER_KEY_ENV   the variable in which COMMAND gets the key: what teacher.api_key_env names
  TEACHER_WAIT_S    900 unless set: so long the server may take to read its model
  TEACHER_LOG       a file for what the server says; teacher_vllm.log unless set
  VLLM_PYTHON       as for launch/start_vllm.sh
TEXT
}

die() {
  echo "teacher_vllm.sh: $1" >&2
  exit "${2:-2}"
}

die_with_log() {
  die "$1; the end of $log:"$'\n'"$(tail -n 20 "$log")" 4
}

server=()
while [[ $# -gt 0 && $1 != -- ]]; do
  if [[ $1 == --help ]]; then usage && exit 0; fi
  server+=("$1")
  shift
done
if [[ ${#server[@]} -lt 3 || $# -lt 2 ]]; then
  usage >&2
  exit 2
fi
shift
position=2
if [[ ${server[0]} == --cpu ]]; then position=3; fi
port=${server[position]:-}
[[ $port =~ ^[0-9]+$ ]] || die "the port is '$port': write MODEL NAME PORT, in this order"
# Another server there would be taken for ours.
if (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  die "somebody listens at port $port already; take another, or stop him"
fi
wait_s=${TEACHER_WAIT_S:-900} log=${TEACHER_LOG:-teacher_vllm.log}

key=
if [[ -n ${TEACHER_KEY_FILE:-} ]]; then
  [[ -n ${TEACHER_KEY_ENV:-} ]] || die "set TEACHER_KEY_ENV, to what teacher.api_key_env names"
  [[ -f $TEACHER_KEY_FILE ]] || die "TEACHER_KEY_FILE=$TEACHER_KEY_FILE is no file"
  [[ $(stat -L -c %a "$TEACHER_KEY_FILE") =~ ^[0-7]00$ ]] ||
    die "$TEACHER_KEY_FILE can be read by others: chmod 600 $TEACHER_KEY_FILE"
  key=$(<"$TEACHER_KEY_FILE")
  [[ -n $key ]] || die "$TEACHER_KEY_FILE is empty"
fi

(
  if [[ -n $key ]]; then export VLLM_API_KEY=$key; fi
  if [[ -n ${TEACHER_GPUS:-} ]]; then
    export CUDA_VISIBLE_DEVICES=$TEACHER_GPUS
  elif [[ ${server[0]} != --cpu && " ${server[*]} " != *" --gpu-memory-utilization"* ]]; then
    server+=(--gpu-memory-utilization 0.45)
  fi
  # A session of its own, so that all of its processes can be ended.
  exec setsid "$(dirname "$0")/start_vllm.sh" "${server[@]}"
) >"$log" 2>&1 </dev/null &
group=$!

# shellcheck disable=SC2329  # the trap calls it
stop_server() {
  # Before setsid has run there is no such group yet, only the process.
  kill -TERM -- "-$group" 2>/dev/null || kill -TERM "$group" 2>/dev/null || return 0
  for _ in {1..100}; do
    kill -0 -- "-$group" 2>/dev/null || return 0
    sleep 0.2
  done
  kill -KILL -- "-$group" 2>/dev/null || true
}
trap stop_server EXIT
trap 'exit 143' TERM INT

answers() {
  python3 - "$port" <<'PYTHON'
import sys, urllib.request
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    direct.open(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=5)
except OSError:
    sys.exit(1)
PYTHON
}

deadline=$((SECONDS + wait_s))
until answers; do
  kill -0 "$group" 2>/dev/null || die_with_log "the server ended"
  ((SECONDS < deadline)) || die_with_log "the server did not answer within $wait_s s"
  sleep 1
done

if [[ -n $key ]]; then export "$TEACHER_KEY_ENV=$key"; fi
if [[ -z ${TEACHER_GPUS:-} ]]; then
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.4}
fi
"$@" &
command=$!
trap 'kill -TERM "$command" 2>/dev/null || true' TERM INT
while kill -0 "$command" 2>/dev/null; do
  wait "$command" || true  # a signal ends the waiting, too
done
wait "$command"
