"""The loops and models of the how-to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import params

import meta_optax as mo


def test_nnx_optimizer_forwards_the_metrics():
    nnx = pytest.importorskip("flax.nnx", exc_type=Exception)
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = mo.inject_meta_hyperparams(optax.adamw, mo.plateau(patience=1))(learning_rate=0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(jnp.ones([3, 2])) ** 2))(model)
        optimizer.update(model, grads, value=jnp.float32(1.0))
        return loss

    before = float(step(model, optimizer))
    for _ in range(2):
        assert float(step(model, optimizer)) != before
    assert mo.read_hyperparams(optimizer.opt_state)["learning_rate"] == pytest.approx(0.025)
    pure = nnx.as_pure(optimizer.opt_state)
    weights = nnx.as_pure(nnx.state(model, nnx.Param))
    assert mo.reset(pure, tx, weights).count == 3
    with pytest.raises(ValueError, match=r"nnx.as_pure\(optimizer.opt_state\)"):
        mo.reset(optimizer.opt_state, tx, weights)


def test_a_clip_inside_the_factory_leaves_the_norm_to_be_seen():
    def clipped(learning_rate, weight_decay=1e-4):
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=weight_decay)
        )

    p = params()
    grads = jax.tree.map(lambda x: 100 * x, p)
    inside = mo.inject_meta_hyperparams(clipped, mo.plateau())(0.1)
    in_front = optax.chain(
        optax.clip_by_global_norm(1.0), mo.inject_meta_hyperparams(optax.adamw, mo.plateau())(0.1)
    )
    for tx, grown in ((inside, 1.1e-4), (in_front, 1e-4)):
        _, state = tx.update(grads, tx.init(p), p, value=1.0)
        assert mo.read_hyperparams(state)["weight_decay"] == pytest.approx(grown)


def test_partition_of_a_model_in_bf16_in_one_donated_scan():
    """Whole steps under scan, params of two dtypes, decisions read at the end."""
    labels = {"gate": {"w": "gate"}, "experts": "expert", "rest": "dense"}
    p = {
        "gate": {"w": jnp.ones([4], jnp.float32)},
        "experts": {"w": jnp.ones([2, 4], jnp.bfloat16), "b": jnp.ones([2], jnp.bfloat16)},
        "rest": jnp.ones([4], jnp.bfloat16),
    }
    strategy = mo.with_decisions(
        mo.chain(mo.advanced_plateau(warmup_steps=5, patience=3), mo.smart_expert_gate())
    )
    tx = mo.inject_meta_hyperparams(mo.moe_partition(optax.adamw, labels), strategy)(1e-2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(p, state):
        def step(carry, _):
            p, state = carry
            value = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(p))
            metrics = {
                "value": value,
                "gate_entropy": jnp.float32(0.5),
                "gate_sparsity": jnp.float32(0.5),
                "expert_usage": jnp.array([0.9, 0.1]),
            }
            updates, state = tx.update(p, state, p, **metrics)
            return (optax.apply_updates(p, updates), state), value

        return jax.lax.scan(step, (p, state), length=40)

    (p, state), values = run(p, tx.init(p))
    assert values[-1] < values[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(p)} == {"float32", "bfloat16"}
    reasons = {decision.reason for decision in mo.read_decisions(state)}
    assert "advanced_plateau: warm-up" in reasons
    assert any(reason.startswith("smart_expert_gate") for reason in reasons)
    assert np.isfinite(values).all()
