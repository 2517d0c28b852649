"""Strict settings for all tests; the flags must be set before jax is first imported."""

import atexit
import os
import shutil
import tempfile

# Runs in this process and in others compile the same small programs again and again: each is
# compiled once by each of pytest's workers. JAX does not write its cache in one go, so that no
# worker may read what another is writing: each has its own directory.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gkdjax-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Four devices, so that sharding over a data axis is real on a machine without an accelerator.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
).strip()
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network is wrong

import jax
import pytest

# A silent broadcast across ranks is the usual way for a shape mistake to stay unseen.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> str:
    """A tiny random model directory."""
    import factories  # transformers takes seconds, and most tests do without

    return factories.model_dir(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> str:
    """Another one, of another width: a teacher."""
    import factories

    return factories.model_dir(tmp_path_factory.mktemp("teacher"), seed=1, hidden_size=32)


@pytest.fixture(scope="module")
def quick_compilation():
    """For many programs that run once each: optimising them would take twice their time.

    They are not written to the cache: two of four whole runs ended in a crash of JAX while it
    wrote such a program, and none while it wrote another.
    """
    key = "jax_persistent_cache_min_compile_time_secs"
    least = getattr(jax.config, key)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update(key, 1e9)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update(key, least)
