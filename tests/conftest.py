"""Strict settings for all tests; the flags must be set before jax is first imported."""

import os

import compiling

# Four devices, so that sharding over a data axis is real on a machine without an accelerator.
os.environ["XLA_FLAGS"] = compiling.devices(4, level=1)
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network is wrong

import jax
import pytest
import slices

# A silent broadcast across ranks is the usual way for a shape mistake to stay unseen.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # level 0
compiling.once()


def pytest_addoption(parser):
    text = "K/N: of the slow tests, the K-th of N parts; see pytest.ini."
    parser.addoption("--slice", metavar="K/N", help=text)


@pytest.hookimpl(tryfirst=True)  # before -m: the parts are the same whatever else is chosen
def pytest_collection_modifyitems(config, items):
    given = config.getoption("--slice")
    if given is not None:
        others = slices.left_out(items, *slices.parse(given))
        config.hook.pytest_deselected(items=[item for item in items if item in others])
        items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="module")
def optimised():
    """Programs are compiled at level 1, for runs that take longer than their compilation."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def undrawn(request):
    """Runs leave out their pictures, a third of their time, but in modules marked `drawn`."""
    if request.node.get_closest_marker("drawn"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", _leave_out)
        yield


def _leave_out(figure, file, format, **options):
    if format == "svg":
        file.write("<svg></svg>")
    else:
        file.write_bytes(b"not drawn")


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
