#!/usr/bin/env bash
# Ctrl-C in a program that has imported jax. One guesses that KeyboardInterrupt is raised wherever the
# program is, and ends it.
# Behaviour: jax registers a callback of Python's garbage collector. Python discards whatever is raised
# in such a callback, and the exception of a signal that arrives there too ("Exception ignored in"):
# the program goes on as if nobody had pressed a key. The same holds for sys.exit in a handler of
# SIGTERM. Programs collect garbage most while they import and compile, so a start is when it happens.
# Run: findings/jax_discards_ctrl_c.sh      (makes a temporary folder and a venv; exit 1: it changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import gc
import os
import signal
import sys

import jax

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell's foreground
codes = {callback.__code__ for callback in gc.callbacks if callback.__module__.startswith("jax")}
sent, discarded = [], []
sys.unraisablehook = lambda found: discarded.append(found.exc_type.__name__)


def press_key(frame, event, _):
    """Sends the signal when jax's callback begins."""
    if event == "call" and frame.f_code in codes and not sent:
        sent.append(signal.SIGINT.name)
        os.kill(os.getpid(), signal.SIGINT)


sys.setprofile(press_key)
try:
    gc.collect()
    seen = "goes on"
except KeyboardInterrupt:
    seen = "ends"
sys.setprofile(None)
print(f"jax {jax.__version__}, Python {sys.version.split()[0]}")
print(f"callbacks of jax: {len(codes)}; sent: {sent}; discarded: {discarded}; the program {seen}")
sys.exit(not (codes and sent and discarded == ["KeyboardInterrupt"] and seen == "goes on"))
PY
