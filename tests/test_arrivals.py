"""Metrics that do not come at every step: pairs of a value and a flag, and `every` by a signal."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import BASE, FREE, SHAPES, STRATEGIES, custom, injected, params, row

import meta_optax as mo

each_strategy = pytest.mark.parametrize("name", STRATEGIES)

# A validation loss every fifth step: 1, 2, 2, 1.5, 3, 3. With patience 2, cuts at the third row
# (two without a better one) and at the sixth.
LOSSES = {0: 1.0, 5: 2.0, 10: 2.0, 15: 0.5, 20: 3.0, 25: 3.0}
CUTS = [10, 25]


def _decisions(state):
    return [(d.step, d.hyperparam, d.old, d.new, d.reason) for d in mo.read_decisions(state)]


def _validation(n):
    """What a plateau of the validation loss makes of a row, by the way that it is told."""
    inner = mo.plateau(patience=2, wd_increase_factor=1.0)

    def observe(state, metrics):
        return inner.observe(state, {**metrics, "value": metrics["validation_loss"]})

    of_validation = inner._replace(observe=observe, metrics=("validation_loss",))
    return of_validation if n is None else mo.every(n, of_validation)


@pytest.mark.parametrize("way", ["pair", "signal"])
def test_a_validation_loss_every_fifth_step_decides_as_one_that_is_alone(way):
    """Beside a plateau of the train loss, which decides as if it were alone, too."""
    train = mo.trend_plateau(window=8, min_evidence=8, significance=0.5)
    both = mo.chain(train, _validation("is_new" if way == "signal" else None))
    tx = mo.inject_meta_hyperparams(optax.sgd, mo.with_decisions(both))(1.0)
    alone = mo.inject_meta_hyperparams(optax.sgd, mo.with_decisions(train))(1.0)
    p = jnp.ones(2)
    state, state_alone = tx.init(p), alone.init(p)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, train_loss, loss, is_new):
        extra = {"validation_loss": (loss, is_new)}
        if way == "signal":
            extra = {"validation_loss": loss, "is_new": is_new}
        return tx.update(p, state, p, value=train_loss, **extra)[1]

    for i in range(30):
        train_loss = jnp.float32(max(1.0 - 0.1 * i, 0.0))
        state = step(state, train_loss, jnp.float32(LOSSES.get(i, jnp.nan)), i in LOSSES)
        _, state_alone = alone.update(p, state_alone, p, value=train_loss)
    assert int(state.nonfinite_count) == 0
    found = _decisions(state)
    assert [d[0] for d in found if d[-1] == "plateau: patience"] == CUTS
    ratios = [d[3] / d[2] for d in found if d[-1] == "plateau: patience"]
    assert ratios == pytest.approx([0.5, 0.5])

    # The state of the validation's strategy is that of one which is called on those steps alone.
    called = mo.plateau(patience=2, wd_increase_factor=1.0)
    expected = called.init()
    for value in LOSSES.values():
        expected = called.observe(expected, {"value": value})
    chex.assert_trees_all_equal(state.meta_state.inner.states[1], expected)
    # And the one of the train loss has seen nothing of it.
    chex.assert_trees_all_equal(state.meta_state.inner.states[0], state_alone.meta_state.inner)
    assert [d for d in found if "trend" in d[-1]], "the case must have decisions of both"


@each_strategy
def test_what_did_not_arrive_leaves_the_state_and_the_count(name):
    """For each metric by itself, whatever stands in its place; where it came, it is plain."""
    strategy = STRATEGIES[name].eager()
    base = {k: jnp.float32(v) for k, v in (BASE | FREE).items()}

    def seen(state, step, **values):
        prefixed = {f"base_{k}": v for k, v in base.items()}
        current = strategy.apply(state, base)
        return {**row(step), **current, **prefixed, "step": jnp.int32(step), **values}

    state = strategy.init()
    for step in range(4):
        state = strategy.observe(state, seen(state, step))
    if name == "hold_spikes":  # which has metrics that it can judge without the others
        strategy, state = mo.plateau(patience=1), state.inner
    observe = jax.jit(strategy.observe)
    for metric in strategy.metrics:
        bad = jnp.full(SHAPES[metric], jnp.nan)
        held = observe(state, seen(state, 6, **{metric: (bad, jnp.array(False))}))
        if name in ("chain", "with_decisions"):  # others of the chain go on
            assert int(held.nonfinite_count) == int(state.nonfinite_count)
            chex.assert_tree_all_finite(strategy.apply(held, base))
            continue
        chex.assert_trees_all_equal(held, state)
    pairs = {metric: (row(6)[metric], jnp.array(True)) for metric in strategy.metrics}
    chex.assert_trees_all_equal(
        observe(state, seen(state, 6, **pairs)), observe(state, seen(state, 6))
    )


def test_a_pair_that_came_and_is_not_finite_is_counted():
    meta = mo.plateau(wd_increase_factor=1.0)
    state = meta.observe(meta.init(), {"value": (jnp.nan, True)})
    assert int(state.nonfinite_count) == 1
    assert int(meta.observe(state, {"value": (jnp.nan, False)}).nonfinite_count) == 1


@pytest.mark.parametrize("flag", [1.0, 1, jnp.float32(1.0), jnp.array([True]), None, "yes"])
@pytest.mark.parametrize("make", [lambda: mo.plateau(), custom], ids=["plateau", "custom"])
def test_a_malformed_pair_is_an_error_that_says_what_to_write(make, flag):
    tx = mo.inject_meta_hyperparams(optax.sgd, make())(1.0)
    p = jnp.ones(2)
    with pytest.raises(TypeError, match=r"'value' as a pair .*Write value=\(value, flag\)"):
        tx.update(p, tx.init(p), p, value=(1.0, flag))


def test_the_warm_up_goes_on_where_the_loss_did_not_arrive():
    """By the step count, as with an update frequency, and the rest of the state stays."""
    meta = mo.advanced_plateau(warmup_steps=4, patience=2)
    by_frequency = mo.advanced_plateau(warmup_steps=4, patience=2, update_frequency=3)
    state, other = meta.init(), by_frequency.init()
    shares = []
    for step in range(9):
        plain = {"step": step, "grad_norm": 1.0, "param_norm": 1.0, "learning_rate": 1.0}
        value = 1.0 if step % 3 == 0 else float("nan")
        state = meta.observe(state, {**plain, "value": (value, step % 3 == 0)})
        other = by_frequency.observe(other, {**plain, "value": 1.0})
        chex.assert_trees_all_equal(state, other)
        shares.append(float(state.warmup))
    assert shares == [0.25, 0.5, 0.75] + [1.0] * 6


def test_hold_spikes_judges_what_arrived_and_no_more():
    meta = mo.hold_spikes(mo.plateau(), window=8, max_consecutive=2)
    plain = {"step": 0, "grad_norm": 1.0, "learning_rate": 1.0, "weight_decay": 0.1}
    state = meta.init()
    for i in range(8):
        state = meta.observe(state, {**plain, "value": 1.0 + 0.01 * i})
    unjudged = meta.observe(state, {**plain, "value": (jnp.nan, False)})
    assert int(unjudged.nonfinite_count) == 0
    chex.assert_trees_all_equal(unjudged.watch.windows["value"], state.watch.windows["value"])
    assert float(unjudged.watch.windows["grad_norm"].values[-1]) == 1.0
    chex.assert_trees_all_equal(unjudged.inner, state.inner)
    # A norm that stands out is a spike where no loss arrived, too.
    norm = {**plain, "grad_norm": 1e4}
    assert int(meta.observe(state, {**norm, "value": (1e9, False)}).spike_count) == 1
    # Losses that stand out at every arrival become the new normal, whatever is between them.
    for value, arrives in [(9.0, True), (1.0, False), (9.0, True), (1.0, False), (9.0, True)]:
        state = meta.observe(state, {**plain, "value": (value, arrives)})
    assert int(state.spike_count) == 2
    assert float(state.watch.windows["value"].values[-1]) == 9.0
    assert int(state.watch.streak) == 0


def test_skip_spikes_drops_nothing_for_a_loss_that_did_not_arrive():
    tx = mo.skip_spikes(optax.sgd(1.0), window=8, max_consecutive=2)
    p = jnp.ones(2)
    state = tx.init(p)
    step = jax.jit(lambda g, s, v, f: tx.update(g, s, p, value=(v, f)))
    for i in range(8):
        _, state = step(p, state, 1.0 + 0.01 * i, True)
    for value in (jnp.nan, jnp.inf, 1e9):
        updates, new = step(p, state, value, False)
        np.testing.assert_array_equal(updates, -p)
        assert (int(new.skipped_count), int(new.nonfinite_count)) == (0, 0)
        chex.assert_trees_all_equal(new.watch.windows["value"], state.watch.windows["value"])
    # Gradients are judged all the same.
    for grads in (1e4 * p, jnp.nan * p):
        updates, new = step(grads, state, jnp.nan, False)
        np.testing.assert_array_equal(updates, 0 * p)
        assert int(new.skipped_count) == 1
    # Losses in a row that are not finite are those that arrived.
    for arrives in (True, False, True, False, True):
        updates, state = step(p, state, jnp.nan, arrives)
    assert int(state.skipped_count) == 2
    np.testing.assert_array_equal(updates, -p)
    assert step._cache_size() == 1


def test_skip_spikes_hands_a_passed_norm_on_as_it_came():
    inner = mo.inject_meta_hyperparams(optax.adamw, mo.plateau())(1.0)
    tx = mo.skip_spikes(inner, window=8)
    p = jnp.ones(2)
    state = tx.init(p)
    updates, state = tx.update(p, state, p, value=1.0, grad_norm=(jnp.nan, False))
    assert int(state.skipped_count) == 0
    assert float(updates[0]) != 0
    # The strategy inside needs the norm: it waits for it.
    assert not np.isfinite(state.inner_state.meta_state.best)
    updates, state = tx.update(p, state, p, value=1.0, grad_norm=(jnp.nan, True))
    assert int(state.skipped_count) == 1


def test_the_note_beside_a_decision_is_the_value_that_arrived():
    meta = mo.with_decisions(mo.plateau(patience=1, wd_increase_factor=1.0))
    tx = mo.inject_meta_hyperparams(optax.sgd, meta)(1.0)
    p = jnp.ones(2)
    state = tx.init(p)
    for value in ((1.0, True), (7.0, False), (2.0, True)):
        _, state = tx.update(p, state, p, value=value)
    (decision,) = mo.read_decisions(state)
    assert (decision.step, decision.value) == (2, 2.0)
    warm_up = mo.with_decisions(mo.advanced_plateau(warmup_steps=4, weight_decay_factor=1.0))
    state = warm_up.init()
    for step in range(3):
        seen = {"step": step, "base_learning_rate": 1.0, "value": (7.0, False)}
        state = warm_up.observe(state, seen)
    # Each rests on the step count, of which there is one at each.
    assert [d.value for d in mo.read_decisions(state)] == [1.0, 2.0]


def test_balance_waits_for_a_load():
    tx = mo.balance_router_bias(0.5)
    bias = jnp.zeros(2)
    state = tx.init(bias)
    for name, load in (
        ("expert_usage", jnp.array([1.0, 0.0])),
        ("expert_usage_per_layer", jnp.array([[1.0, 0.0]])),
    ):
        updates, new = tx.update(bias, state, **{name: (load * jnp.nan, False)})
        np.testing.assert_array_equal(updates, 0 * bias)
        assert int(new.nonfinite_count) == 0
        updates, new = tx.update(bias, state, **{name: (load, True)})
        np.testing.assert_array_equal(updates, [-0.5, 0.5])


def test_a_schedule_waits_for_a_loss():
    rate = mo.as_schedule(mo.plateau(patience=1, wd_increase_factor=1.0), 1.0)
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    p = jnp.ones(2)
    state = tx.init(p)
    rates = []
    for value in ((1.0, True), (2.0, False), (2.0, True)):
        _, state = tx.update(p, state, p, value=value)
        rates.append(float(state.hyperparams["learning_rate"]))
    assert rates == [1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.MultiSteps(tx, 1, should_skip_update_fn=optax.skip_not_finite),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.masked(tx, dict.fromkeys(params(), True)),
        lambda tx: optax.chain(optax.clip(1.0), tx),
        lambda tx: mo.skip_spikes(tx, window=8),
    ],
    ids=["MultiSteps", "MultiSteps[skip]", "apply_if_finite", "masked", "chain", "skip_spikes"],
)
def test_wrappers_scan_and_vmap_carry_a_pair(wrap):
    tx = wrap(injected(STRATEGIES["plateau"]))
    p = params()
    losses = jnp.array([1.0, jnp.nan, 2.0, 9.0, 3.0])
    flags = jnp.array([True, False, True, False, True])

    def run(p, losses, flags):
        def step(state, pair):
            return tx.update(p, state, p, value=pair)[1], None

        return jax.lax.scan(step, tx.init(p), (losses, flags))[0]

    def cuts(state):
        return [
            float(leaf.rate_scale)
            for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "rate_scale"))
            if hasattr(leaf, "rate_scale")
        ]

    state = jax.jit(run)(p, losses, flags)
    # The first loss is the best; of the two that came after it, each is worse: patience 1.
    assert cuts(state) == [0.25]
    batched = jax.vmap(functools.partial(run, p))(
        jnp.stack([losses, losses]), jnp.stack([flags, ~flags])
    )
    # The other seed saw a NaN, which is held, and a 9, its best.
    assert cuts(jax.tree.map(lambda x: x[0], batched)) == [0.25]
    assert cuts(jax.tree.map(lambda x: x[1], batched)) == [1.0]


class TestEveryBySignal:
    def test_it_stays_in_between(self):
        meta = mo.every("is_new", mo.plateau(patience=1, wd_increase_factor=1.0))
        assert meta.name == "every('is_new', plateau)"
        state = meta.observe(meta.init(), {"value": 1.0, "is_new": True})
        stays = meta.observe(state, {"value": jnp.nan, "is_new": jnp.array(False)})
        chex.assert_trees_all_equal(stays, state)
        bad = meta.observe(state, {"value": jnp.nan, "is_new": True})
        assert int(bad.nonfinite_count) == 1

    def test_a_missing_signal_is_an_error_that_says_what_to_write(self):
        tx = mo.inject_meta_hyperparams(optax.sgd, mo.every("is_new", mo.plateau()))(1.0)
        p = jnp.ones(2)
        with pytest.raises(
            TypeError, match=r"plateau\) needs the signal 'is_new'.*is_new=is_new\)"
        ):
            tx.update(p, tx.init(p), p, value=1.0)

    @pytest.mark.parametrize("flag", [1, 0.0, jnp.ones(2, bool), jnp.int32(1), None, (True, True)])
    def test_a_signal_of_another_kind_is_an_error(self, flag):
        meta = mo.every("is_new", mo.plateau())
        with pytest.raises(TypeError, match=r"'is_new' as true or false"):
            meta.observe(meta.init(), {"value": 1.0, "is_new": flag})

    @pytest.mark.parametrize("n", ["", "not a name", "1st"])
    def test_a_string_that_is_no_name_is_an_error(self, n):
        with pytest.raises(ValueError, match="n must be an integer >= 1, or the name"):
            mo.every(n, mo.plateau())

    @pytest.mark.parametrize("n", [None, True, ["is_new"], b"is_new"])
    def test_other_kinds_are_errors(self, n):
        with pytest.raises(ValueError, match="n must be an integer >= 1"):
            mo.every(n, mo.plateau())
