"""Prints, as JSON, mesh, planned bytes and XLA's of a step on three meshes of eight devices."""

import json

import jax

from gkdjax.benchmarks import planned_memory

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
cases = planned_memory.SHARDED[:3]
print(json.dumps([(case.mesh, *planned_memory.compare(case)) for case in cases]))
