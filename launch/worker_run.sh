#!/usr/bin/env bash
# A run on one machine of a cluster, which does not end with the connection that started it.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/worker_run.sh run [arguments of gkdjax.main]
       launch/worker_run.sh logs|stop

run   starts python -m gkdjax.main, shows what it says until it ends, and ends with its exit code.
      Where one is running already, with whatever arguments, that one is shown.
logs  shows the end of what it has said, and what it goes on to say
stop  asks it to save and to stop (SIGTERM), and returns when it has: its exit code is 75

  GKDJAX_VENV   where launch/worker_setup.sh has made the environment; ~/gkdjax-venv unless set
  GKDJAX_KEYS   a file of lines NAME=VALUE for the run's environment, readable by its owner alone
                (HF_TOKEN, what teacher.api_key_env names); ~/gkdjax-keys unless set, if it is there
TEXT
}

here=$(cd "$(dirname "$0")" && pwd)
state=$HOME/.gkdjax-run
keys=${GKDJAX_KEYS:-$HOME/gkdjax-keys}
python=${GKDJAX_VENV:-$HOME/gkdjax-venv}/bin/python

# Whoever runs holds this lock, so it is free when he is gone, however he went.
is_running() { ! flock --nonblock "$state/lock" true; }

run_in_background() {
  exec 8>"$state/lock"
  flock 8
  if [[ -f $keys ]]; then
    set -a
    # shellcheck disable=SC1090  # the user's own
    source "$keys"
    set +a
  fi
  local code=0
  "$python" -m gkdjax.main "$@" 8>&- &
  echo $! >"$state/pid"
  wait $! || code=$?
  echo "$code" >"$state/code"
}

start() {
  if [[ -f $keys && $(stat -c %a "$keys") != 600 ]]; then
    echo "$keys can be read by others: chmod 600 $keys" >&2
    exit 2
  fi
  rm -f "$state/code" "$state/pid"
  : >"$state/log"
  # A session of its own is not hung up with the terminal.
  setsid "$here/worker_run.sh" in-background "$@" >>"$state/log" 2>&1 </dev/null &
  until [[ -f $state/pid ]]; do
    kill -0 $! 2>/dev/null || { cat "$state/log" >&2 && exit 1; }
    sleep 0.1
  done
}

follow() {
  tail -n +1 -f "$state/log" &
  local shown=$!
  flock "$state/lock" true  # until it is free
  sleep 0.5  # for the last lines
  kill "$shown"
  if [[ ! -f $state/code ]]; then
    echo "worker_run.sh: the run was killed" >&2
    exit 137
  fi
  exit "$(<"$state/code")"
}

mkdir -p "$state"
touch "$state/lock"
case ${1:-} in
  run)
    shift
    cd "$here/.."
    is_running || start "$@"
    follow
    ;;
  in-background)
    shift
    run_in_background "$@"
    ;;
  logs) exec tail -n 200 -F "$state/log" ;;
  stop)
    if is_running; then
      kill -TERM "$(<"$state/pid")"
      flock "$state/lock" true
    fi
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
