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

# Not "wait -n": it does not tell of one that a signal has ended before.
first=0 failed_at=
while [[ ${#processes[@]} -gt 0 ]]; do
  sleep 0.1
  for id in "${!processes[@]}"; do
    if kill -0 "${processes[id]}" 2>/dev/null; then continue; fi
    code=0
    wait "${processes[id]}" || code=$?
    unset "processes[id]"
    if [[ $first == 0 && $code != 0 ]]; then first=$code failed_at=$SECONDS; fi
  done
  # They tell each other, but one that was killed could not.
  if [[ -n $failed_at ]] && ((SECONDS - failed_at >= ${STOP_AFTER_S:-10})); then
    kill -TERM "${processes[@]}" 2>/dev/null || true
    failed_at=
  fi
done
exit "$first"
