"""Strict settings for all tests; the flags must be set before jax is first imported."""

import os

import compiling

# Four devices, so that sharding over a data axis is real on a machine without an accelerator.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compiling.devices(4)}".strip()
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
