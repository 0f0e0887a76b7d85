"""`adopt`: control for runs that were begun without it, against those that go on without."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import LABELS, params

import meta_optax as mo

COSINE = optax.cosine_decay_schedule(0.1, 20)
BEFORE, AFTER = 5, 4


def _grads(step, p):
    return jax.tree.map(lambda x: (0.3 + 0.1 * step) * x, p)


def _update_of(tx):
    # A MultiSteps is no GradientTransformation, and takes extra arguments itself.
    return (tx if isinstance(tx, optax.MultiSteps) else optax.with_extra_args_support(tx)).update


def _run(tx, p, state, first, steps, **metrics):
    update = _update_of(tx)
    with jax.disable_jit():
        for step in range(first, first + steps):
            updates, state = update(_grads(step, p), state, p, **metrics)
            p = optax.apply_updates(p, updates)
    return p, state


def _idle(strategy=None):
    return mo.log_only(strategy or mo.plateau(patience=1))


# An injected b2 is a float32, and 1 - b2 of that is 5e-5 off what a plain AdamW computes with.
FLOATS = ("b1", "b2", "eps", "eps_root")


def _injected(factory=optax.adamw, static_args=FLOATS, **arguments):
    return mo.inject_meta_hyperparams(factory, _idle(), static_args)(**arguments)


def _scheduled(base, factory=optax.adamw, **arguments):
    return optax.inject_hyperparams(factory, FLOATS)(
        learning_rate=mo.as_schedule(_idle(), base), **arguments
    )


def _clipped(*links):
    return optax.chain(optax.clip_by_global_norm(1.0), *links)


ADAMW = {"learning_rate": 0.1, "weight_decay": 0.01}
INJECTED = optax.inject_hyperparams(optax.adamw, FLOATS)
# Each: the old transformation, and the new one that never acts.
CASES = {
    "plain": (lambda: optax.adamw(**ADAMW), lambda: _injected(**ADAMW)),
    "schedule": (
        lambda: optax.adamw(COSINE, weight_decay=0.01),
        lambda: _injected(learning_rate=COSINE, weight_decay=0.01),
    ),
    "inject": (lambda: INJECTED(**ADAMW), lambda: _injected(**ADAMW)),
    "inject, schedule": (
        lambda: INJECTED(learning_rate=COSINE, weight_decay=0.01),
        lambda: _injected(learning_rate=COSINE, weight_decay=0.01),
    ),
    "sgd": (
        lambda: optax.sgd(COSINE, momentum=0.9),
        lambda: _injected(optax.sgd, (), learning_rate=COSINE, momentum=0.9),
    ),
    "adafactor": (
        lambda: optax.adafactor(0.01),
        lambda: _injected(
            optax.adafactor,
            ("min_dim_size_to_factor", "decay_rate", "decay_offset", "clipping_threshold", "eps"),
            learning_rate=0.01,
        ),
    ),
    "a chain in the factory": (
        lambda: _clipped(optax.adamw(**ADAMW)),
        lambda: _injected(
            lambda learning_rate, weight_decay: _clipped(
                optax.adamw(learning_rate, weight_decay=weight_decay)
            ),
            (),
            **ADAMW,
        ),
    ),
    "scale behind": (
        lambda: optax.adamw(**ADAMW),
        lambda: optax.chain(optax.adamw(**ADAMW), mo.scale_by_meta(_idle())),
    ),
    "scale behind a schedule": (
        lambda: optax.adamw(COSINE),
        lambda: optax.chain(optax.adamw(COSINE), mo.scale_by_meta(_idle())),
    ),
    "scale in a chain": (
        lambda: _clipped(optax.adamw(COSINE)),
        lambda: _clipped(optax.adamw(COSINE), mo.scale_by_meta(_idle())),
    ),
    "scale behind a chain of one": (
        lambda: optax.chain(optax.adamw(**ADAMW)),
        lambda: optax.chain(optax.adamw(**ADAMW), mo.scale_by_meta(_idle())),
    ),
    "scale among the links": (
        lambda: optax.chain(optax.scale_by_adam(), optax.scale(-0.1)),
        lambda: optax.chain(optax.scale_by_adam(), mo.scale_by_meta(_idle()), optax.scale(-0.1)),
    ),
    "named chain": (
        lambda: optax.named_chain(("adam", optax.adam(0.1))),
        lambda: optax.named_chain(("adam", optax.adam(0.1)), ("m", mo.scale_by_meta(_idle()))),
    ),
    "masked scale": (
        lambda: optax.adamw(**ADAMW),
        lambda: optax.chain(
            optax.adamw(**ADAMW),
            optax.masked(mo.scale_by_meta(_idle()), dict.fromkeys(params(), True)),
        ),
    ),
    "as_schedule": (lambda: optax.adamw(**ADAMW), lambda: _scheduled(0.1, weight_decay=0.01)),
    "as_schedule, inject and schedule": (
        lambda: INJECTED(learning_rate=COSINE, weight_decay=0.01),
        lambda: _scheduled(COSINE, weight_decay=0.01),
    ),
    "groups": (
        lambda: optax.adamw(**ADAMW),
        lambda: _injected(mo.moe_partition(optax.adamw, LABELS), **ADAMW),
    ),
    "groups, inject and schedule": (
        lambda: INJECTED(learning_rate=COSINE, weight_decay=0.01),
        lambda: _injected(
            mo.moe_partition(optax.adamw, LABELS), learning_rate=COSINE, weight_decay=0.01
        ),
    ),
    "groups, as_schedule": (
        lambda: optax.adamw(**ADAMW),
        lambda: _scheduled(0.1, mo.moe_partition(optax.adamw, LABELS), weight_decay=0.01),
    ),
    "skip_spikes around": (
        lambda: optax.adamw(**ADAMW),
        lambda: mo.skip_spikes(_injected(**ADAMW)),
    ),
    "skip_spikes on both sides": (
        lambda: mo.skip_spikes(optax.adamw(**ADAMW)),
        lambda: mo.skip_spikes(_injected(**ADAMW)),
    ),
    "MultiSteps on both sides": (
        lambda: optax.MultiSteps(optax.adamw(**ADAMW), 2),
        lambda: optax.MultiSteps(_injected(**ADAMW), 2),
    ),
    "apply_if_finite around": (
        lambda: optax.adamw(COSINE),
        lambda: optax.apply_if_finite(_injected(learning_rate=COSINE), 3),
    ),
    "apply_if_finite on both sides": (
        lambda: optax.apply_if_finite(optax.adamw(COSINE), 3),
        lambda: optax.apply_if_finite(mo.skip_spikes(_injected(learning_rate=COSINE)), 3),
    ),
    "masked on both sides": (
        lambda: optax.masked(
            optax.adamw(**ADAMW), {"dense": True, "experts": True, "router": False}
        ),
        lambda: optax.masked(_injected(**ADAMW), {"dense": True, "experts": True, "router": False}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_as_it_would_have_gone(name):
    """To the bit: operation by operation, as XLA fuses a constant and a scalar differently."""
    old, new = (make() for make in CASES[name])
    p, state = _run(old, params(), old.init(params()), 0, BEFORE, value=jnp.float32(1.0))
    before = jax.tree.map(np.array, state)
    adopted = mo.adopt(state, new, p)
    chex.assert_trees_all_equal(before, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(adopted, new.init(p))
    expected, _ = _run(old, p, state, BEFORE, AFTER, value=jnp.float32(1.0))
    got, _ = _run(new, p, adopted, BEFORE, AFTER, value=jnp.float32(1.0))
    chex.assert_trees_all_equal(got, expected)


def _trained(tx, steps=BEFORE):
    return _run(tx, params(), tx.init(params()), 0, steps, value=jnp.float32(1.0))


class TestCounts:
    def test_schedules_go_on_and_a_warm_up_that_is_past_does_not_start_again(self):
        warm = mo.advanced_plateau(warmup_steps=4, patience=100)
        tx = mo.inject_meta_hyperparams(optax.adamw, warm)(learning_rate=COSINE)
        p, state = _trained(optax.adamw(COSINE))
        adopted = mo.adopt(state, tx, p)
        assert int(adopted.count) == BEFORE
        _, new = tx.update(p, adopted, p, value=jnp.float32(1.0))
        np.testing.assert_allclose(new.hyperparams["learning_rate"], COSINE(BEFORE), rtol=1e-6)

    def test_the_highest_count_counts(self):
        old = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(COSINE))
        p, (adam, scheduled) = _trained(old)
        state = (adam._replace(count=jnp.int32(2)), scheduled)
        tx = optax.chain(old, mo.scale_by_meta(_idle()))
        assert int(mo.adopt(state, tx, p)[1].count) == BEFORE

    def test_without_any_it_is_none(self):
        p = params()
        adopted = mo.adopt(
            optax.sgd(0.1, momentum=0.9).init(p),
            _injected(optax.sgd, (), learning_rate=0.1, momentum=0.9),
            p,
        )
        assert int(adopted.count) == 0

    def test_a_rate_that_becomes_a_schedule_starts_where_the_run_is(self):
        p, state = _trained(optax.adamw(0.1))
        tx = optax.chain(optax.adamw(COSINE), mo.scale_by_meta(_idle()))
        assert int(mo.adopt(state, tx, p)[0][2].count) == BEFORE

    def test_wrappers_around_start_afresh_but_for_the_steps(self):
        p, state = _trained(optax.adamw(0.1))
        tx = optax.MultiSteps(mo.skip_spikes(_injected(learning_rate=0.1)), 2)
        adopted = mo.adopt(state, tx, p)
        assert (int(adopted.mini_step), int(adopted.gradient_step)) == (0, BEFORE)
        chex.assert_trees_all_equal(adopted.inner_opt_state.watch, tx.init(p).inner_opt_state.watch)
        assert int(adopted.inner_opt_state.inner_state.count) == BEFORE

    def test_what_skip_spikes_has_seen_is_no_step(self):
        p, state = _trained(mo.skip_spikes(optax.sgd(0.1, momentum=0.9)), steps=3)
        tx = mo.skip_spikes(_injected(optax.sgd, (), learning_rate=0.1, momentum=0.9))
        adopted = mo.adopt(state, tx, p)
        assert int(adopted.inner_state.count) == 0
        assert int(adopted.watch.windows["value"].count) == 3

    def test_a_wrapper_within_an_accumulation_stays_there(self):
        p, state = _trained(optax.MultiSteps(optax.adamw(0.1), 2))  # five half steps
        tx = optax.MultiSteps(_injected(learning_rate=0.1), 2)
        adopted = mo.adopt(state, tx, p)
        assert (int(adopted.mini_step), int(adopted.gradient_step)) == (1, 2)
        assert int(adopted.inner_opt_state.count) == 2
        chex.assert_trees_all_equal(adopted.acc_grads, state.acc_grads)


class Ramp(optax.schedules.StatefulSchedule):
    """A stateful schedule of a user's own."""

    def init(self):
        return {"seen": jnp.zeros([], jnp.float32)}

    def update(self, state, **extra_args):
        return {"seen": state["seen"] + 1.0}

    def __call__(self, state, **extra_args):
        return 0.1 / (1.0 + state["seen"])


def test_a_stateful_schedule_goes_on():
    p, state = _trained(optax.inject_hyperparams(optax.adamw)(learning_rate=Ramp()))
    adopted = mo.adopt(state, _injected(learning_rate=Ramp()), p)
    assert float(adopted.schedule_states["schedule_learning_rate"]["seen"]) == BEFORE
    plain = mo.adopt(_trained(optax.adamw(0.1))[1], _injected(learning_rate=Ramp()), p)
    assert float(plain.schedule_states["schedule_learning_rate"]["seen"]) == 0


def test_hyperparams_are_those_of_the_new_transformation():
    p, state = _trained(INJECTED(learning_rate=0.1, weight_decay=0.5))
    adopted = mo.adopt(state, _injected(learning_rate=0.2, weight_decay=0.01), p)
    assert mo.read_hyperparams(adopted) == pytest.approx(
        {"learning_rate": 0.2, "weight_decay": 0.01}
    )


def test_moments_are_split_by_group_and_a_balance_bias_starts_afresh():
    labels = {"dense": "dense", "experts": "expert", "router": "gate", "bias": "balance_bias"}
    p = params() | {"bias": jnp.zeros(4)}
    old = optax.adamw(0.1)
    p, state = _run(old, p, old.init(p), 0, BEFORE)
    tx = _injected(
        mo.moe_partition(optax.adamw, labels), learning_rate=0.1, balance_update_rate=1e-3
    )
    adopted = mo.adopt(state, tx, p)
    chex.assert_trees_all_equal_shapes_and_dtypes(adopted, tx.init(p))
    groups = adopted.inner_state.inner_states
    own = {"gate": "router", "expert": "experts", "dense": "dense"}
    for group, name in own.items():
        adam = groups[group].inner_state[0]
        assert adam.mu[name] is state[0].mu[name]
        assert int(adam.count) == BEFORE
        assert all(isinstance(adam.nu[k], optax.MaskedNode) for k in p if k != name)
    assert int(groups["balance_bias"].inner_state.count) == BEFORE


@pytest.mark.parametrize("name", ["groups, inject and schedule", "skip_spikes around"])
def test_no_buffer_stands_in_the_state_twice(name):
    old, tx = (make() for make in CASES[name])
    p, state = _trained(old)
    adopted = mo.adopt(state, tx, p)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(adopted)]
    assert len(set(buffers)) == len(buffers)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(p, state):
        return tx.update(p, state, p, value=jnp.float32(1.0))

    step(p, adopted)  # JAX refuses to donate one twice
    assert adopted.layout_version.is_deleted()


def test_sharded_moments_and_fresh_decisions_go_into_one_step():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    p = {k: jax.device_put(jnp.ones([16]), split) for k in params()}
    old = optax.adamw(0.1)
    state = jax.jit(
        old.init, out_shardings=jax.tree.map(lambda s: s.sharding, mo.checkpoint_template(old, p))
    )(p)
    tx = _injected(learning_rate=0.1)
    adopted = mo.adopt(state, tx, p)
    assert adopted.count.sharding == adopted.meta_state.best.sharding == whole
    assert adopted.inner_state[0].mu["dense"] is state[0].mu["dense"]
    step = jax.jit(lambda p, s: tx.update(p, s, p, value=1.0))
    for _ in range(2):
        _, adopted = step(p, adopted)
    assert step._cache_size() == 1


def test_a_bfloat16_run_keeps_its_dtypes():
    p = params(jnp.bfloat16)
    old = optax.adamw(0.1)
    _, state = old.update(p, old.init(p), p)
    adopted = mo.adopt(state, _injected(learning_rate=0.1), p)
    assert adopted.inner_state[0].mu["dense"].dtype == jnp.bfloat16
    assert adopted.meta_state.best.dtype == jnp.float32


class TestErrors:
    @pytest.mark.parametrize(
        "controlled",
        [
            lambda: _injected(learning_rate=0.1),
            lambda: mo.skip_spikes(_injected(learning_rate=0.1)),
            lambda: optax.chain(optax.adamw(0.1), mo.scale_by_meta(_idle())),
            lambda: _scheduled(0.1),
        ],
    )
    def test_a_state_under_control_is_refused(self, controlled):
        state = controlled().init(params())
        with pytest.raises(ValueError, match=r"already under control.*migrate.*reset"):
            mo.adopt(state, _injected(learning_rate=0.1), params())

    @pytest.mark.parametrize(
        ("old", "words"),
        [
            (optax.lion(0.1), r"\[0\].*ScaleByAdamState\(count, mu, nu\).*LionState\(count, mu\)"),
            (
                optax.adamw(0.1, mu_dtype=jnp.bfloat16),
                r"mu\['dense'\].*float32\[4\].*bfloat16\[4\]",
            ),
            (optax.chain(optax.clip(1.0), optax.adamw(0.1)), r"tuple\(0, 1, 2\).*tuple\(0, 1\)"),
            (optax.MultiSteps(optax.adamw(0.1), 2), r"tuple\(0, 1, 2\).*MultiStepsState\("),
        ],
    )
    def test_another_optimizers_state_is_refused_with_the_path(self, old, words):
        with pytest.raises(ValueError, match=words):
            mo.adopt(old.init(params()), _injected(learning_rate=0.1), params())

    def test_other_params_are_refused_with_the_path(self):
        state = optax.adamw(0.1).init({k: jnp.ones(3) for k in params()})
        with pytest.raises(ValueError, match=r"\.inner_state\[0\]\.mu\['dense'\].*\[4\].*\[3\]"):
            mo.adopt(state, _injected(learning_rate=0.1), params())

    def test_a_chain_with_other_links_is_refused(self):
        state = _clipped(optax.adamw(0.1)).init(params())
        tx = optax.chain(optax.adamw(0.1), mo.scale_by_meta(_idle()))
        with pytest.raises(ValueError, match="does not fit"):
            mo.adopt(state, tx, params())


class TestMultiSteps:
    def test_a_schedule_goes_on_from_the_updates_of_optax_multi_steps(self):
        """160 micro-batches are 80 updates, and the schedule goes on at the 81st."""
        p = jnp.ones(2)
        old = optax.MultiSteps(optax.sgd(1.0, momentum=0.9), 2)
        state = old.init(p)
        for _ in range(160):
            _, state = old.update(p, state, p)
        schedule = optax.linear_schedule(1.0, 0.0, 100)
        inject = mo.inject_meta_hyperparams(optax.sgd, mo.plateau())
        tx = optax.MultiSteps(inject(schedule, momentum=0.9), 2)
        adopted = mo.adopt(state, tx, p)
        for _ in range(2):
            _, adopted = tx.update(p, adopted, p, value=1.0)
        rate = adopted.inner_opt_state.hyperparams["learning_rate"]
        np.testing.assert_allclose(rate, 0.2, rtol=1e-6)

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_into_ours(self, wrapped):
        p = jnp.ones(2)
        old: Any = optax.MultiSteps(optax.adam(0.1), 2) if wrapped else optax.adam(0.1)
        state = old.init(p)
        for _ in range(4):
            _, state = old.update(p, state, p)
        inject = mo.inject_meta_hyperparams(optax.adam, mo.plateau())
        tx = mo.multi_steps(inject(learning_rate=0.1), 2)
        adopted = mo.adopt(state, tx, p)
        inner = state.inner_opt_state if wrapped else state
        own = adopted.multi_steps_state.inner_opt_state
        np.testing.assert_array_equal(own.inner_state[0].mu, inner[0].mu)
        assert int(own.count) == (2 if wrapped else 4)
        tx.update(p, adopted, p, value=1.0)


def test_free_params_stay_free():
    """A state bound to a device would bind them at the first step: a second compile."""
    p = jnp.ones(2)
    old = optax.adamw(0.1)
    tx = mo.inject_meta_hyperparams(optax.adamw, mo.plateau())(learning_rate=0.1)
    state = mo.adopt(old.init(p), tx, p)
    assert not any(leaf.committed for leaf in jax.tree.leaves(state))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(p, state):
        updates, state = tx.update(p, state, p, value=jnp.float32(1.0))
        return optax.apply_updates(p, updates), state

    for _ in range(3):
        p, state = step(p, state)
    assert step._cache_size() == 1
