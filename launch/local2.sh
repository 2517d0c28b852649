#!/usr/bin/env bash
# usage: launch/local2.sh arguments of gkdjax.main
#
# The run of a cluster on this machine alone: two processes with one CPU device each, which find
# each other at a free port of 127.0.0.1. SIGTERM and Ctrl-C go to both. The exit code is that of
# the first that does not end with 0; if the other does not end by itself within STOP_AFTER_S (10
# unless set) seconds, it is asked to. PYTHON is the interpreter, python3 unless set.
set -euo pipefail

if [[ $# -eq 0 || $1 == --help ]]; then
  sed -n 's/^# \{0,1\}//; 2,7p' "$0" >&2
  exit $(($# == 0 ? 2 : 0))
fi
python=${PYTHON:-python3}
export JAX_PLATFORMS=cpu
port=$("$python" -c '
import socket
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    print(free.getsockname()[1])')

processes=()
for id in 0 1; do
  "$python" -m gkdjax.main "--coordinator=127.0.0.1:$port" --num_processes=2 "--process_id=$id" \
    "$@" &
  processes+=($!)
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT

first=0 stopper=
for _ in "${processes[@]}"; do
  while true; do
    code=0
    wait -n -p ended "${processes[@]}" || code=$?
    [[ -z ${ended:-} ]] || break  # else it was a signal that ended the waiting
  done
  if [[ $first == 0 && $code != 0 ]]; then
    first=$code
    # They tell each other, but one that was killed could not.
    (sleep "${STOP_AFTER_S:-10}" && kill -TERM "${processes[@]}") &>/dev/null &
    stopper=$!
  fi
done
[[ -z $stopper ]] || kill "$stopper" 2>/dev/null || true
exit "$first"
