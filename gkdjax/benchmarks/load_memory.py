"""What loading a checkpoint costs in host memory, and what each device then holds of it.

    python -m gkdjax.benchmarks.load_memory [--gb=2]

A bfloat16 checkpoint of random bits is written to a temporary directory and loaded twice, each
time in a fresh process: by one device, and cut over the fsdp axis of four forced host devices.
The memory counted is RssAnon of /proc/self/status (Linux), every 2 ms; the checkpoint's own pages,
which the kernel maps in and takes back as it pleases, are not in it but in RssFile. The exit code
is 1 if loading takes more than the size of the parameters and one stacked leaf.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import ml_dtypes
import numpy as np
import safetensors.numpy
from absl import app, flags

from gkdjax.utils.text import table

_GB = flags.DEFINE_float("gb", 2.0, "At least so many gigabytes of parameters, of 10^9 bytes.")
_LOAD = flags.DEFINE_string("load", None, "Measure loading this directory (in a fresh process).")
_FSDP = flags.DEFINE_integer("fsdp", 1, "With --load: devices that share the parameters.")

_LAYERS = 16
_STATUS = pathlib.Path("/proc/self/status")


def main(argv: list[str]) -> None:
    del argv
    if _LOAD.value is not None:
        print(json.dumps(measure(_LOAD.value, _FSDP.value)))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(pathlib.Path(directory), _GB.value * 1e9)
        results = [in_new_process(directory, fsdp) for fsdp in (1, 4)]
    print(report(results))
    sys.exit(any(result["rise"] > limit(result) for result in results))


def write_checkpoint(directory: pathlib.Path, size: float) -> None:
    """A Llama of 16 layers and at least `size` bytes, one file a layer and an index."""
    from gkdjax.models.decoder_config import param_shapes
    from gkdjax.models.families.common import CheckpointNames
    from gkdjax.models.hf import load
    from gkdjax.models.hf.model_config import load_spec

    (directory / "config.json").write_text(json.dumps(_config(size)))
    spec, rng, weight_map = load_spec(directory), np.random.default_rng(0), {}
    names = load.leaf_names(spec, CheckpointNames())
    shapes = {name: (path, i) for path, all_ in names.items() for i, name in enumerate(all_)}
    for layer in range(_LAYERS):
        tensors = {}
        for name, (path, at) in shapes.items():
            if at == layer:
                shape = param_shapes(spec)[path]
                shape = shape[:0:-1] if path.startswith("layers/") else shape
                bits = rng.integers(0, 0x4000, shape, np.uint16)  # from 0 up to 2.0
                tensors[name] = bits.view(ml_dtypes.bfloat16)
        file = f"model-{layer + 1:05}-of-{_LAYERS:05}.safetensors"
        safetensors.numpy.save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)


def _config(size: float) -> dict:
    # 16 D^2 parameters a layer, with as many heads for keys as for queries, and 16 D^2 embeddings.
    width = 64 * math.ceil(math.sqrt(size / 2 / (16 * _LAYERS + 16)) / 64)
    return {
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


def in_new_process(directory: str, fsdp: int) -> dict:
    """`measure` in a process of its own with `fsdp` CPU devices."""
    process = subprocess.run(
        [sys.executable, "-m", __spec__.name, f"--load={directory}", f"--fsdp={fsdp}"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # Freed arrays go back to the system at once; else glibc keeps those below 32 MB.
            "MALLOC_MMAP_THRESHOLD_": str(2**20),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={fsdp}",
        },
    )
    return json.loads(process.stdout.splitlines()[-1])


def measure(directory: str, fsdp: int) -> dict:
    """Loads a checkpoint in this process, which should be a fresh one.

    Returns:
      In bytes: size, of all parameters; largest_leaf; rise, of RssAnon from just before to its
      peak; on_device, the most that one device holds of each leaf that is cut; cut, those leaves.
      And the seconds it took.
    """
    import jax

    from gkdjax.models.decoder_config import param_shapes
    from gkdjax.models.hf import load, model_config
    from gkdjax.parallel import mesh as parallel_mesh
    from gkdjax.utils import tree

    mesh = None if fsdp == 1 else parallel_mesh.make_mesh(fsdp=fsdp)
    # The library loads what it loads on its first call.
    param_shapes(model_config.load_spec(directory))
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    with Peak() as peak:
        start = time.perf_counter()
        _, params = load.load_pretrained(directory, mesh=mesh)
        seconds = time.perf_counter() - start
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = {tree.path_str(path): leaf for path, leaf in flat}
    cut = {path: leaf for path, leaf in leaves.items() if not leaf.is_fully_replicated}
    return {
        "fsdp": fsdp,
        "size": sum(leaf.nbytes for leaf in leaves.values()),
        "largest_leaf": max(leaf.nbytes for leaf in leaves.values()),
        "rise": peak.bytes,
        "cut": {path: leaf.nbytes for path, leaf in cut.items()},
        "on_device": {
            path: max(shard.data.nbytes for shard in leaf.addressable_shards)
            for path, leaf in cut.items()
        },
        "seconds": seconds,
    }


class Peak:
    """`with Peak() as peak: ...`; then peak.bytes is how far RssAnon rose in between."""

    def __enter__(self) -> "Peak":
        self.bytes, self._done, self._before = 0, threading.Event(), _anonymous()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            done = self._done.wait(0.002)
            self.bytes = max(self.bytes, _anonymous() - self._before)
            if done:
                return


def _anonymous() -> int:
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def limit(result: dict) -> int:
    """The most that loading may take, in bytes."""
    return result["size"] + result["largest_leaf"]


def report(results: list[dict]) -> str:
    """The results of one device and of several as text."""
    rows = [
        [
            f"fsdp={r['fsdp']}",
            *(f"{n / 1e6:,.1f}" for n in (r["size"], r["largest_leaf"], r["rise"], limit(r))),
            "passes" if r["rise"] <= limit(r) else "FAILS",
            f"{r['seconds']:.2f}",
        ]
        for r in results
    ]
    shares = [
        [path, f"{whole / 1e6:,.1f}", f"{r['on_device'][path] / 1e6:,.1f}", str(r["fsdp"])]
        for r in results
        for path, whole in r["cut"].items()
    ]
    columns = ["devices", "size, MB", "largest leaf", "rise", "limit", "rise <= limit", "seconds"]
    held = table(["leaf", "MB", "on one device, MB", "devices"], shares)
    return f"{table(columns, rows)}\n\n{held}"


if __name__ == "__main__":
    app.run(main)
