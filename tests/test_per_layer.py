"""Control by layer: each layer's own state, decisions and rates, in subtrees and in stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import meta_optax as mo

LAYERS, EXPERTS, WIDTH = 3, 4, 5
# Layer 0 is decided, layer 1 is not, layer 2 is at the edge of nothing.
ENTROPY = jnp.array([0.2, 1.2, 0.9])


def _layer(*lead, axis=0):
    shapes = {"router": (WIDTH, EXPERTS), "experts": (EXPERTS, WIDTH, WIDTH), "bias": (EXPERTS,)}
    leaves = {
        name: jnp.ones((*shape[:axis], *lead, *shape[axis:])) for name, shape in shapes.items()
    }
    return {
        "router": {"kernel": leaves["router"], "bias": leaves["bias"]},
        "experts": {"w1": leaves["experts"]},
    }


def _separate():
    return {"norm": jnp.ones(2), **{f"layer_{i}": _layer() for i in range(LAYERS)}}


def _stacked(axis=0):
    return {"norm": jnp.ones(2), "layers": _layer(LAYERS, axis=axis)}


def _row(entropy=ENTROPY, sparsity=0.7, usage=None):
    usage = jnp.full([LAYERS, EXPERTS], 1 / EXPERTS) if usage is None else usage
    return {
        "gate_entropy_per_layer": entropy,
        "gate_entropy_normalized_per_layer": entropy / np.log(EXPERTS),
        "gate_sparsity_per_layer": jnp.broadcast_to(sparsity, [LAYERS]),
        "expert_usage_per_layer": usage,
    }


def _slices(updates, layer, axis):
    """One layer's updates, whichever way the layers are kept."""
    if "layers" not in updates:
        return updates[f"layer_{layer}"]
    return jax.tree.map(lambda u: jnp.take(u, layer, axis=axis), updates["layers"])


LAYOUTS = [(_separate, None), (lambda: _stacked(0), 0), (lambda: _stacked(1), 1)]


@pytest.mark.parametrize(("make", "axis"), LAYOUTS)
@pytest.mark.parametrize("inner", [optax.sgd, optax.adamw])
def test_each_layers_updates_are_those_of_its_own_rate(make, axis, inner):
    strategy = mo.expert_gate(per_layer=True, num_layers=LAYERS, expert_lr_factor=2.0)
    factory = mo.moe_partition(inner, mo.label_moe_params, num_layers=LAYERS, layer_axis=axis)
    tx = mo.inject_meta_hyperparams(factory, strategy)(learning_rate=0.1)
    p = make()
    plain = inner(0.1)
    expected, _ = plain.update(p, plain.init(p), p)
    updates, state = jax.jit(tx.update)(p, tx.init(p), p, **_row())
    for layer, gate_ratio in enumerate((0.05, 0.1, 0.1)):
        own, reference = _slices(updates, layer, axis), _slices(expected, layer, axis)
        for name in ("kernel", "bias"):
            np.testing.assert_allclose(
                own["router"][name], gate_ratio * reference["router"][name], rtol=1e-5
            )
        np.testing.assert_allclose(own["experts"]["w1"], 2 * reference["experts"]["w1"], rtol=1e-5)
        rate = state.hyperparams[f"gate_{layer}_learning_rate"]
        assert float(rate) == pytest.approx(0.1 * gate_ratio)
    np.testing.assert_allclose(updates["norm"], expected["norm"], rtol=1e-5)


@pytest.mark.parametrize(("make", "axis"), LAYOUTS)
def test_scale_by_layer_agrees_with_injection(make, axis):
    """Behind an SGD of rate 1, factors are rates."""
    p = make()
    strategy = {"per_layer": True, "num_layers": LAYERS}
    injected = mo.inject_meta_hyperparams(
        mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=LAYERS, layer_axis=axis),
        mo.smart_expert_gate(**strategy),
    )(learning_rate=1.0)
    meta = mo.smart_expert_gate(**strategy)
    scaled = optax.chain(
        optax.sgd(1.0), mo.scale_by_meta(meta, mo.label_moe_params, layer_axis=axis)
    )
    one, other = injected.init(p), scaled.init(p)
    for step in range(4):
        row = _row(sparsity=0.9 - 0.1 * step)
        updates, one = injected.update(p, one, p, **row)
        expected, other = scaled.update(p, other, p, **row)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


def test_layers_of_one_group_alone_behind_an_optimizer():
    """The guard sets rates of the gates' layers, the other strategy those of whole groups."""
    meta = mo.chain(
        mo.expert_gate(expert_lr_factor=2.0, entropy_threshold=0.0),
        mo.guard_collapse(per_layer=True, num_layers=LAYERS, patience=1),
    )
    metrics = {
        "gate_entropy": 1.0,
        "load_entropy_normalized_per_layer": jnp.array([1.0, 0.1, 1.0]),
        "dead_experts_per_layer": jnp.zeros(LAYERS),
        "max_violation_per_layer": jnp.zeros(LAYERS),
        "gate_entropy_normalized_per_layer": jnp.full(LAYERS, 0.3),
    }
    tx = mo.scale_by_meta(meta, mo.label_moe_params)
    p = _separate()
    updates, _ = tx.update(p, tx.init(p), p, **metrics)
    gates = [float(updates[f"layer_{i}"]["router"]["kernel"][0, 0]) for i in range(LAYERS)]
    assert gates == pytest.approx([0.1, 0.01, 0.1])
    assert float(updates["layer_1"]["experts"]["w1"][0, 0, 0]) == 2.0
    assert float(updates["norm"][0]) == 1.0


def test_layers_are_judged_as_they_would_be_alone():
    rng = np.random.default_rng(0)
    together = mo.smart_expert_gate(per_layer=True, num_layers=LAYERS, normalized_entropy=True)
    alone = mo.smart_expert_gate(normalized_entropy=True)
    base = {"learning_rate": jnp.float32(1.0), "weight_decay": jnp.float32(0.1)}
    state, states = together.init(), [alone.init()] * LAYERS
    for step in range(8):
        usage = rng.dirichlet(np.ones(EXPERTS) * 0.3, LAYERS).astype(np.float32)
        row = _row(rng.uniform(0, 1.4, LAYERS), rng.uniform(0, 1, LAYERS), usage)
        state = together.observe(state, {"step": step, **row})
        used = together.apply(state, base)
        for layer in range(LAYERS):
            own = {k.removesuffix("_per_layer"): v[layer] for k, v in row.items()}
            states[layer] = alone.observe(states[layer], {"step": step, **own})
            expected = alone.apply(states[layer], base)
            for group in ("gate", "expert"):
                np.testing.assert_allclose(
                    used[f"{group}_{layer}_learning_rate"], expected[f"{group}_learning_rate"]
                )
            assert float(used["gate_weight_decay"]) == float(expected["gate_weight_decay"])


def test_decisions_name_the_layer():
    strategy = mo.with_decisions(mo.expert_gate(per_layer=True, num_layers=LAYERS))
    factory = mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=LAYERS)
    tx = mo.inject_meta_hyperparams(factory, strategy)(learning_rate=1.0)
    p = _separate()
    _, state = tx.update(p, tx.init(p), p, **_row())
    (decision,) = mo.read_decisions(state)
    assert decision.hyperparam == "gate_0_learning_rate"
    assert decision.reason == "expert_gate: gate_entropy"
    assert (decision.old, decision.new) == pytest.approx((0.1, 0.05))


@pytest.mark.parametrize("first", ["plateau", "gate"])
def test_a_plateau_cuts_every_layer(first):
    parts = [
        mo.plateau(patience=1, min_lr=0.0, wd_increase_factor=1.0),
        mo.expert_gate(per_layer=True, num_layers=LAYERS),
    ]
    strategy = mo.chain(*(parts if first == "plateau" else parts[::-1]))
    factory = mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=LAYERS)
    tx = mo.inject_meta_hyperparams(factory, strategy)(learning_rate=1.0)
    p = _separate()
    state = tx.init(p)
    for _ in range(2):
        updates, state = tx.update(p, state, p, value=1.0, **_row())
    assert float(updates["layer_0"]["router"]["kernel"][0, 0]) == pytest.approx(-0.025)
    assert float(updates["layer_1"]["experts"]["w1"][0, 0, 0]) == pytest.approx(-0.5)


def test_bounds_of_the_group_hold_for_its_layers():
    strategy = mo.bounded(
        mo.expert_gate(per_layer=True, num_layers=LAYERS),
        gate_learning_rate=(0.08, 1.0),
        gate_2_learning_rate=(0.0, 0.01),
    )
    state = strategy.observe(strategy.init(), {"step": 0, **_row()})
    used = strategy.apply(state, {"learning_rate": 1.0})
    rates = [float(used[f"gate_{layer}_learning_rate"]) for layer in range(LAYERS)]
    assert rates == pytest.approx([0.08, 0.1, 0.01])
    with pytest.raises(ValueError, match="bounds for 'dense_learning_rate'"):
        mo.bounded(strategy, dense_learning_rate=(0.0, 1.0)).apply(state, {"learning_rate": 1.0})


def test_bases_of_layer_group_and_all():
    factory = mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=LAYERS)
    strategy = mo.expert_gate(per_layer=True, num_layers=LAYERS)
    tx = mo.inject_meta_hyperparams(factory, strategy)(
        learning_rate=1.0, gate_learning_rate=0.5, gate_1_learning_rate=0.1
    )
    read = mo.read_hyperparams(tx.init(_separate()))
    assert read["gate_0_learning_rate"] == pytest.approx(0.05)
    assert read["gate_1_learning_rate"] == pytest.approx(0.01)
    assert read["expert_2_learning_rate"] == pytest.approx(1.0)


def test_rates_of_zero_move_nothing():
    factory = mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=LAYERS)
    meta = mo.expert_gate(per_layer=True, num_layers=LAYERS, gate_lr_factor=0.0)
    tx = mo.inject_meta_hyperparams(factory, meta)(learning_rate=1.0)
    p = _separate()
    updates, _ = tx.update(p, tx.init(p), p, **_row())
    assert float(jnp.abs(updates["layer_0"]["router"]["kernel"]).max()) == 0.0
    assert float(updates["layer_0"]["experts"]["w1"][0, 0, 0]) == -1.0


def test_layers_through_router_metrics():
    """The whole way: probabilities of layers to rates of layers."""
    probs = jnp.stack([jax.nn.one_hot(jnp.arange(8) % EXPERTS, EXPERTS), jnp.full([8, 4], 0.25)])
    strategy = mo.expert_gate(per_layer=True, num_layers=2, normalized_entropy=True)
    tx = mo.scale_by_meta(strategy, mo.label_moe_params)
    p = {f"layer_{i}": _layer() for i in range(2)}
    updates, _ = tx.update(p, tx.init(p), p, **mo.router_metrics(probs))
    assert float(updates["layer_0"]["router"]["kernel"][0, 0]) == pytest.approx(0.05)
    assert float(updates["layer_1"]["router"]["kernel"][0, 0]) == pytest.approx(0.1)


def test_masked_leaves_are_left_to_their_owner():
    p = _separate()
    mask = jax.tree.map(lambda x: x.ndim > 1, p)
    meta = mo.expert_gate(per_layer=True, num_layers=LAYERS)
    tx = optax.masked(mo.scale_by_meta(meta, mo.label_moe_params), mask)
    updates, _ = tx.update(p, tx.init(p), p, **_row())
    assert float(updates["layer_0"]["router"]["bias"][0]) == 1.0
    assert float(updates["layer_0"]["router"]["kernel"][0, 0]) == pytest.approx(0.05)


class TestErrors:
    def test_how_many_layers_must_be_said(self):
        with pytest.raises(ValueError, match=r"per_layer=True needs num_layers="):
            mo.expert_gate(per_layer=True)
        with pytest.raises(ValueError, match=r"num_layers=3 needs per_layer=True"):
            mo.smart_expert_gate(num_layers=3)

    def test_another_number_of_layers_than_the_params_have(self):
        factory = mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=5)
        with pytest.raises(ValueError, match=r"num_layers=5.*'layer_0/router/kernel \[5, 4\]'"):
            factory(1.0).init(_separate())

    @pytest.mark.parametrize("said", [1, 2])
    def test_fewer_layers_than_there_are(self, said):
        """Also where as many parts of the tree as layers are said hold several each."""
        p = {"encoder": _separate(), "decoder": _separate()}
        for params in (p, _separate()):
            factory = mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=said)
            with pytest.raises(ValueError, match=rf"num_layers={said}"):
                factory(1.0).init(params)

    def test_a_router_of_several_layers_is_one(self):
        router = {f"Dense_{i}": {"kernel": jnp.ones([4, 4])} for i in range(2)}
        p = {f"l_{i}": {"router": router, "experts": jnp.ones([4, 4, 4])} for i in range(3)}
        tx = mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=3)(
            1.0, gate_1_learning_rate=0.5
        )
        updates, _ = tx.update(p, tx.init(p))
        got = [float(updates[f"l_{i}"]["router"]["Dense_1"]["kernel"][0, 0]) for i in range(3)]
        assert got == [-1.0, -0.5, -1.0]

    def test_another_number_of_layers_than_the_metrics_have(self):
        strategy = mo.expert_gate(per_layer=True, num_layers=5)
        with pytest.raises(ValueError, match=r"'gate_entropy_per_layer'.*shape \[5\].*\(3,\)"):
            strategy.observe(strategy.init(), {"step": 0, **_row()})

    def test_an_axis_that_cannot_be_told(self):
        square = {"router": jnp.ones([3, 3, 3]), "experts": jnp.ones([3, 3, 3, 3])}
        factory = mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=3)
        with pytest.raises(ValueError, match=r"which axis.*\[0, 1, 2\].*layer_axis="):
            factory(1.0).init({"layers": square})
        factory = mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=3, layer_axis=1)
        factory(1.0).init({"layers": square})

    def test_a_wrong_axis(self):
        factory = mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=3, layer_axis=1)
        with pytest.raises(ValueError, match="num_layers=3"):
            factory(1.0).init(_stacked(0))

    def test_a_factory_that_is_not_told_of_layers(self):
        factory = mo.moe_partition(optax.sgd, mo.label_moe_params)
        with pytest.raises(
            ValueError, match=r"'gate_0_learning_rate'.*moe_partition\(.*num_layers=\.\.\.\)"
        ):
            mo.inject_meta_hyperparams(factory, mo.expert_gate(per_layer=True, num_layers=3))(1.0)

    def test_an_expert_that_is_of_no_layer(self):
        p = _separate() | {"elsewhere": {"experts": jnp.ones([4, 5, 5])}}
        factory = mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=3)
        with pytest.raises(ValueError, match=r"which layer 'elsewhere/experts' is of"):
            factory(1.0).init(p)

    def test_schedules_as_rates_of_layers_outside_the_injection(self):
        factory = mo.moe_partition(optax.sgd, mo.label_moe_params, num_layers=3)
        with pytest.raises(ValueError, match="needs numbers as the rates of layers"):
            factory(optax.constant_schedule(1.0), gate_0_learning_rate=0.1)
