"""Strict settings for all tests; the flags must be set before jax is first imported."""

import os

# Four devices, so that sharding over a data axis is real on a machine without an accelerator.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
).strip()
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network is wrong

import jax

# A silent broadcast across ranks is the usual way for a shape mistake to stay unseen.
jax.config.update("jax_numpy_rank_promotion", "raise")
