"""Random routing, and what the suites expect of the metrics of it."""

import jax.numpy as jnp
import numpy as np

TOKEN_NAMES = {"gate_entropy", "gate_entropy_normalized", "gate_sparsity"}
LOAD_NAMES = {"expert_usage", "load_entropy_normalized", "max_violation", "load_cv", "dead_experts"}
NAMES = TOKEN_NAMES | LOAD_NAMES | {"drop_fraction"}


def routing(seed, layers, tokens, experts, selected, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((layers, tokens, experts))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    index = np.argsort(-probs, axis=-1)[..., :selected]
    mask = rng.random((layers, tokens)) < 0.7
    mask[:, 0] = True
    return probs.astype(np.float32), index, mask, rng.random(index.shape) < 0.2


def assert_close(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
        assert got[name].dtype == jnp.float32
