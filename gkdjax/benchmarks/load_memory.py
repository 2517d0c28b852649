"""Measures the host memory of loading a checkpoint, and each device's part of it afterwards.

    python -m gkdjax.benchmarks.load_memory [--gb=2]

A bfloat16 checkpoint of random bits is written to a temporary directory and loaded twice, each
time in a fresh process: by one device, and cut over the fsdp axis of four forced host devices.
The memory counted is RssAnon of /proc/self/status (Linux), every 2 ms; the checkpoint's own pages,
which the kernel maps in and takes back as it pleases, are not in it but in RssFile. The exit code
is 1 if loading takes more than the size of the parameters and one stacked leaf.
"""

import argparse
import json
import math
import pathlib
import sys
import tempfile
import threading
import time

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from flax import traverse_util

from gkdjax.benchmarks import harness
from gkdjax.models.decoder_config import param_shapes
from gkdjax.models.families.common import CheckpointNames
from gkdjax.models.hf import load
from gkdjax.models.hf.model_config import load_spec
from gkdjax.parallel.mesh import make_mesh
from gkdjax.utils.files import write_text
from gkdjax.utils.text import table

_LAYERS = 16


def main() -> None:
    parser = argparse.ArgumentParser("load_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.0, help="At least so many 10^9 bytes.")
    parser.add_argument("--load", help="Measure loading this directory (in a fresh process).")
    parser.add_argument("--fsdp", type=int, default=1, help="With --load: devices that share it.")
    a = parser.parse_args()
    if a.load is not None:
        print(json.dumps(measure(a.load, a.fsdp)))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(pathlib.Path(directory), a.gb * 1e9)
        results = [in_new_process(directory, fsdp) for fsdp in (1, 4)]
    print(report(results))
    sys.exit(any(result["rise"] > limit(result) for result in results))


def write_checkpoint(directory: pathlib.Path, size: float) -> None:
    """A Llama of 16 layers and at least `size` bytes, one file a layer and an index."""
    # 16 D^2 parameters a layer, with as many heads for keys as for queries, and 16 D^2 embeddings.
    width = 64 * math.ceil(math.sqrt(size / 2 / (16 * _LAYERS + 16)) / 64)
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "head_dim": 64,
        "vocab_size": 16 * width,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }
    write_text(directory / "config.json", json.dumps(config))
    spec, rng, weight_map = load_spec(directory), np.random.default_rng(0), {}
    names, shapes = load.leaf_names(spec, CheckpointNames()), param_shapes(spec)
    for layer in range(_LAYERS):
        tensors = {}
        for path, of_layers in names.items():
            if layer < len(of_layers):
                shape = shapes[path][:0:-1] if path.startswith("layers/") else shapes[path]
                bits = rng.integers(0, 0x4000, shape, np.uint16)  # from 0 up to 2.0
                tensors[of_layers[layer]] = bits.view(ml_dtypes.bfloat16)
        file = f"model-{layer + 1:05}-of-{_LAYERS:05}.safetensors"
        safetensors.numpy.save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    write_text(directory / "model.safetensors.index.json", index)


def in_new_process(directory: str, fsdp: int) -> dict:
    """`measure` in a process of its own with `fsdp` CPU devices."""
    return harness.in_new_process(
        "gkdjax.benchmarks.load_memory",
        *(f"--load={directory}", f"--fsdp={fsdp}"),
        JAX_PLATFORMS="cpu",
        # Freed arrays go back to the system at once; else glibc keeps those below 32 MB.
        MALLOC_MMAP_THRESHOLD_=str(2**20),
        XLA_FLAGS=f"--xla_force_host_platform_device_count={fsdp}",
    )


def measure(directory: str, fsdp: int) -> dict:
    """Loads a checkpoint in this process, which should be a fresh one.

    Returns:
      In bytes: size, of all parameters; largest_leaf; rise, of RssAnon from just before to its
      peak. And the seconds it took; cut, the leaves that are cut; share, the most that one device
      holds of any of them.
    """
    mesh = None if fsdp == 1 else make_mesh(fsdp=fsdp)
    # The libraries load what they load on their first call.
    load_spec(directory)
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    with Peak() as peak:
        start = time.perf_counter()
        _, params = load.load_pretrained(directory, mesh=mesh)
        seconds = time.perf_counter() - start
    leaves = traverse_util.flatten_dict(params, sep="/")
    cut = {path: leaf for path, leaf in leaves.items() if not leaf.is_fully_replicated}
    parts = ((leaf, shard.data) for leaf in cut.values() for shard in leaf.addressable_shards)
    return {
        "fsdp": fsdp,
        "size": sum(leaf.nbytes for leaf in leaves.values()),
        "largest_leaf": max(leaf.nbytes for leaf in leaves.values()),
        "rise": peak.bytes,
        "seconds": seconds,
        "cut": [*cut],
        "share": max((part.nbytes / leaf.nbytes for leaf, part in parts), default=1.0),
    }


class Peak:
    """`with Peak() as peak: ...`; then peak.bytes is how far RssAnon rose in between."""

    def __enter__(self) -> "Peak":
        self.bytes, self._done = 0, threading.Event()
        self._before = harness.status_bytes("RssAnon")
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        done = False
        while not done:
            done = self._done.wait(0.002)
            self.bytes = max(self.bytes, harness.status_bytes("RssAnon") - self._before)


def limit(result: dict) -> int:
    """The most that loading may take, in bytes."""
    return result["size"] + result["largest_leaf"]


def report(results: list[dict]) -> str:
    """A row of each result."""
    rows = []
    for r in results:
        sizes = (f"{n / 1e6:,.1f}" for n in (r["size"], r["largest_leaf"], r["rise"], limit(r)))
        verdict = "passes" if r["rise"] <= limit(r) else "FAILS"
        cells = (verdict, f"{r['seconds']:.2f}", str(len(r["cut"])), f"{r['share']:.2f}")
        rows.append([f"fsdp={r['fsdp']}", *sizes, *cells])
    columns = ["devices", "size, MB", "largest leaf", "rise", "limit", "rise <= limit", "seconds"]
    return table([*columns, "leaves cut", "of one on a device"], rows)


if __name__ == "__main__":
    main()
