#!/usr/bin/env bash
# safetensors.numpy.save_file. One guesses that it writes as open(path, "wb") does: through a link, with
# the permissions that the umask leaves, and with an OSError where the disk takes no more.
# Behaviour: it replaces the path by a new file. A link becomes a file, and what it pointed to stays as
# it was; the new file can be read by its owner alone (mode 600, whatever the umask), so weights
# saved by one user cannot be loaded by the next. A disk that takes no more is a SafetensorError, which is
# no OSError and has no errno: the number stands in its text alone.
# Run: findings/safetensors_save_file.sh      (makes a temporary folder and a venv; exit 1: it changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'safetensors==0.8.0' 'numpy==2.4.6'
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import os
import pathlib
import resource
import stat
import sys

import numpy as np
import safetensors.numpy

os.umask(0o022)
target, link, plain = map(pathlib.Path, ("target", "link", "plain"))
target.write_bytes(b"old")
link.symlink_to(target)
safetensors.numpy.save_file({"a": np.zeros(3)}, link)
safetensors.numpy.save_file({"a": np.zeros(3)}, plain)
linked, kept = link.is_symlink(), target.read_bytes() == b"old"
mode = stat.S_IMODE(plain.stat().st_mode)

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))  # no file may grow further
try:
    safetensors.numpy.save_file({"a": np.zeros(10_000)}, "large")
    error = None
except Exception as raised:
    error = raised
name, is_os_error = type(error).__name__, isinstance(error, OSError)
print(f"safetensors {importlib.metadata.version('safetensors')}")
print(f"the link is one still: {linked}; its target is as it was: {kept}; mode: {mode:o}")
print(f"beyond the limit: {name}, an OSError: {is_os_error}: {error}")
sys.exit(linked or not kept or mode != 0o600 or name != "SafetensorError" or is_os_error)
PY
