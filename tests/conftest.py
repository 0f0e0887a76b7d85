"""Strict numerics for every test, and eight devices on the host."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import chex
import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def count_traces_afresh():
    """Functions of tests share names, and chex counts by name."""
    chex.clear_trace_counter()


@pytest.fixture
def strict_numerics():
    """No dtype and no rank is promoted without being asked to."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
