"""`import gkdjax.losses` stands on jax and chex alone."""

import json
import subprocess
import sys

PROBE = """
import json, sys
import jax, jax.numpy, chex
before = set(sys.modules)
import gkdjax.losses
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_loads_nothing_but_itself_on_top_of_jax_and_chex():
    # In a process of its own: here much is loaded already.
    done = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True)
    loaded = json.loads(done.stdout)
    assert "gkdjax.losses.divergences" in loaded
    outside = {name.partition(".")[0] for name in loaded} - {"gkdjax"} - sys.stdlib_module_names
    assert not outside
    ours = {name for name in loaded if name.startswith("gkdjax.")}
    assert all(name.startswith("gkdjax.losses") for name in ours), ours
