"""How programs are compiled where they run a few times only: most of the tests' time was this."""

import importlib.metadata

# An unknown flag ends the process: jaxlib 0.12 has no other way of fusing, and no name for it.
_MINOR = int(importlib.metadata.version("jaxlib").split(".")[1])
_FUSION = "--xla_cpu_use_fusion_emitters=false " if _MINOR < 11 else ""

# XLA's defaults on a CPU take two to three times as long to compile our programs. What is compiled
# by them is tested too: by the benchmarks, by runs that are killed, by the README's main job.
_SIMPLE = (
    f"{_FUSION}--xla_cpu_parallel_codegen_split_count=1"
    " --xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level="
)
QUICK = f"{_SIMPLE}0"


def devices(count: int, level: int = 0) -> str:
    """XLA_FLAGS for a process with so many devices.

    Args:
      level: 1 where programs run long enough that some optimisation pays.
    """
    return f"{_SIMPLE}{level} --xla_force_host_platform_device_count={count}"


def once():
    """Has this process compile a program once, whoever asks: each run makes its functions anew.

    JAX's own cache does so through files, which crashed where two processes wrote them.
    """
    from jax._src import cache_key, compiler  # not before XLA_FLAGS are set

    compile_or_get_cached, made = compiler.compile_or_get_cached, {}

    def get(backend, module, devices, options, callbacks, *others):
        if callbacks:  # Python functions of one program
            return compile_or_get_cached(backend, module, devices, options, callbacks, *others)
        key = cache_key.get(module, devices, options, backend)
        if key not in made:
            made[key] = compile_or_get_cached(backend, module, devices, options, callbacks, *others)
        return made[key]

    compiler.compile_or_get_cached = get
