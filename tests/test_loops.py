"""The loops and models of the how-to and of the page of loops."""

import functools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import params

import meta_optax as mo

PAGE = (pathlib.Path(__file__).parent.parent / "docs/loops.md").read_text()
SECTIONS = {
    title: re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}


def _batches(count=240, size=8):
    """Noisy lines, so that a plateau of minibatches' losses cuts."""
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1.0, 1.0, [count, size, 1])
    targets = 2.0 * inputs + 0.5 + 0.3 * rng.standard_normal(inputs.shape)
    return [
        (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
        for x, y in zip(inputs, targets, strict=True)
    ]


def _line_loss(p, batch):
    inputs, targets = batch
    return jnp.mean((p["w"] * inputs + p["b"] - targets) ** 2)


def _scope():
    """What the page says is given."""
    return {
        "jax": jax,
        "jnp": jnp,
        "mo": mo,
        "optax": optax,
        "loss_fn": _line_loss,
        "params": {"w": jnp.zeros([]), "b": jnp.zeros([])},
        "batches": _batches(),
        "validation_batch": _batches(1, 64)[0],
    }


def _run(block, scope):
    exec(compile(block, "docs/loops.md", "exec"), scope)
    return scope


@pytest.mark.parametrize(
    "title",
    [
        "A jitted step",
        "Micro-batches",
        "Flax NNX",
        "Flax Linen",
        "Equinox",
        "Steps that are not finite",
        "Some of the params",
        "Steps under `lax.scan`",
        "Many runs under `vmap`",
    ],
)
def test_a_loop_of_the_page_runs_as_printed(title):
    """Each has one block, and its plateau cuts what it was given."""
    scope = _scope()
    if title == "Flax NNX":
        scope["nnx"] = pytest.importorskip("flax.nnx", exc_type=Exception)
    if title == "Flax Linen":
        scope["nn"] = pytest.importorskip("flax.linen", exc_type=Exception)
    if title == "Equinox":
        scope["eqx"] = pytest.importorskip("equinox", exc_type=Exception)
    (block,) = SECTIONS[title]
    _run(block, scope)
    assert 0 < mo.read_hyperparams(scope["opt_state"])["learning_rate"] < 0.1
    if title == "Some of the params":
        assert float(scope["params"]["b"]) == 0.0
        assert float(scope["params"]["w"]) > 0.5
    if title == "Steps under `lax.scan`":
        assert scope["decisions"]
    if title == "Many runs under `vmap`":
        one, other = (jax.tree.map(lambda x, i=i: x[i], scope["many_states"]) for i in (0, 1))
        assert mo.read_hyperparams(one) != mo.read_hyperparams(other)


def test_every_section_of_the_page_is_run_by_a_test():
    assert len(SECTIONS) == 10
    assert sum(map(len, SECTIONS.values())) == 12


def test_the_validation_loops_of_the_page_run_as_printed():
    pair, signal, of_validation = SECTIONS["A validation loss every N steps"]
    scope = _run(pair, _scope())
    assert mo.read_hyperparams(scope["opt_state"])["learning_rate"] < 0.1
    assert scope["step"]._cache_size() == 1
    strategy = _run(signal, _scope())["strategy"]
    assert strategy.name == "chain(every('is_validation', plateau), adapt_aux_loss)"
    # The third is stepped as the first is.
    loop = pair[pair.index("evaluate = ") :]
    scope = _run(of_validation + loop, _scope())
    assert {d.reason for d in mo.read_decisions(scope["opt_state"])} >= {"plateau: patience"}
    assert scope["step"]._cache_size() == 1


@pytest.mark.parametrize("shown", ["freeze behind", "selective_transform", "masked"])
def test_what_is_frozen_stays_and_what_the_strategy_measures(shown):
    """Only `freeze` behind the optimizer shows the norm of all gradients."""
    seen = mo.MetaOptimizer(
        name="norm",
        init=lambda: jnp.zeros([], jnp.float32),
        observe=lambda state, metrics: metrics["grad_norm"],
        apply=lambda state, h: {**h, "learning_rate": 1.0 * h["learning_rate"]},
        metrics=("grad_norm",),
    )
    inner = mo.inject_meta_hyperparams(optax.adamw, seen)(learning_rate=0.1, weight_decay=0.5)
    frozen = {"w": False, "b": True}
    tx = {
        "freeze behind": optax.chain(inner, optax.transforms.freeze(frozen)),
        "selective_transform": optax.transforms.selective_transform(inner, freeze_mask=frozen),
        "masked": optax.masked(inner, {"w": True, "b": False}),
    }[shown]
    p = {"w": jnp.ones([]), "b": jnp.ones([])}
    grads = {"w": jnp.float32(3.0), "b": jnp.float32(4.0)}
    updates, state = jax.jit(tx.update)(grads, tx.init(p), p, value=1.0)
    assert float(updates["b"]) == (4.0 if shown == "masked" else 0.0)
    assert float(updates["w"]) != 0
    (norm,) = [
        float(leaf.meta_state.inner)
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "meta_state"))
        if hasattr(leaf, "meta_state")
    ]
    assert norm == (5.0 if shown == "freeze behind" else 3.0)


def test_freeze_in_front_lets_weight_decay_through():
    """What the page warns of."""
    inner = mo.inject_meta_hyperparams(optax.adamw, mo.plateau())(0.1, weight_decay=0.5)
    tx = optax.chain(optax.transforms.freeze({"w": False, "b": True}), inner)
    p = {"w": jnp.ones([]), "b": jnp.ones([])}
    updates, _ = tx.update(p, tx.init(p), p, value=1.0)
    assert float(updates["b"]) != 0


def test_apply_if_finite_drops_the_strategys_part_of_a_step():
    inner = mo.inject_meta_hyperparams(optax.adamw, mo.plateau())(0.1)
    tx = optax.apply_if_finite(inner, max_consecutive_errors=5)
    p = jnp.ones(2)
    state = tx.init(p)
    _, dropped = tx.update(jnp.nan * p, state, p, value=1.0)
    assert int(dropped.inner_state.count) == 0
    _, state = tx.update(p, state, p, value=jnp.nan)
    assert (int(state.inner_state.count), int(state.inner_state.nonfinite_count)) == (1, 1)


def test_equinox_partition_is_the_same_as_filter():
    eqx = pytest.importorskip("equinox", exc_type=Exception)
    model = eqx.nn.MLP(1, 1, 4, 1, key=jax.random.key(0))
    tx = mo.inject_meta_hyperparams(optax.adamw, mo.plateau(patience=1))(learning_rate=0.1)
    p, static = eqx.partition(model, eqx.is_inexact_array)
    state = tx.init(p)

    @jax.jit
    def step(p, state):
        def loss_fn(p):
            return jnp.mean(jax.vmap(eqx.combine(p, static))(jnp.ones([3, 1])) ** 2)

        grads = jax.grad(loss_fn)(p)
        updates, state = tx.update(grads, state, p, value=1.0)
        return eqx.apply_updates(p, updates), state

    for _ in range(3):
        p, state = step(p, state)
    assert mo.read_hyperparams(state)["learning_rate"] == pytest.approx(0.025)
    moments = optax.tree.get(state, "mu")
    chex.assert_trees_all_equal_structs(moments, eqx.filter(model, eqx.is_inexact_array))


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
