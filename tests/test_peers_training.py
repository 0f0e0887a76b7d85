"""The hypergradient rule by hand and by autodiff; all peers in compiled training loops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import meta_optax as mo
from meta_optax.compare._peers import (
    adamw_with_hypergradient,
    greedy_lr,
    random_policy,
    torch_plateau,
)


def _quadratic(params):
    return 0.5 * jnp.sum(jnp.asarray([3.0, 0.5, 1.0]) * params["w"] ** 2) + params["b"] ** 2


PARAMS = {"w": jnp.asarray([1.0, -2.0, 0.3]), "b": jnp.float32(0.7)}


class TestHypergradient:
    def test_by_hand(self):
        """On x**2 / 2 from 1: a first step of 1, then a gradient of 0.9 in the same direction."""
        for rule, beta, second in (("multiplicative", 0.02, 0.102), ("additive", 0.01, 0.109)):
            tx = adamw_with_hypergradient(0.1, 0.0, hypergradient_rate=beta, rule=rule)
            x = jnp.asarray(1.0)
            state = tx.init(x)
            for rate in (0.1, second):
                updates, state = tx.update(x, state, x)
                x = optax.apply_updates(x, updates)
                assert float(state.hyperparams["learning_rate"]) == pytest.approx(rate, rel=1e-6)
        assert float(state.direction) == pytest.approx(0.9958777, rel=2e-5)

    @pytest.mark.parametrize("decay", [0.0, 0.1])
    def test_is_what_autodiff_gives(self, decay):
        """The derivative of the loss after a step with respect to the rate of that step."""
        beta, tx = 1e-3, optax.adamw

        def loss_after(rate, params, state, grads):
            updates, _ = tx(rate, weight_decay=decay).update(grads, state, params)
            return _quadratic(optax.apply_updates(params, updates))

        ours = adamw_with_hypergradient(0.05, decay, hypergradient_rate=beta, rule="additive")
        params, state, plain = PARAMS, ours.init(PARAMS), tx(0.05).init(PARAMS)
        slopes = []
        for _ in range(4):
            grads = jax.grad(_quadratic)(params)
            before = state.hyperparams["learning_rate"]
            updates, state = ours.update(grads, state, params)
            rate = state.hyperparams["learning_rate"]
            if slopes:
                assert float(rate - before) == pytest.approx(-beta * slopes[-1], rel=1e-4)
            slopes.append(float(jax.grad(loss_after)(rate, params, plain, grads)))
            _, plain = tx(rate, weight_decay=decay).update(grads, plain, params)
            params = optax.apply_updates(params, updates)
        assert slopes[0] < 0.0

    @pytest.mark.parametrize("rule", ["multiplicative", "additive"])
    def test_rate_of_zero_is_adamw(self, rule):
        ours = adamw_with_hypergradient(0.05, 0.1, hypergradient_rate=0.0, rule=rule)
        theirs = optax.adamw(0.05, weight_decay=0.1)
        for _, (a, b) in zip(range(5), _paths(ours, theirs), strict=False):
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), a, b)

    def test_multiplicative_rule_knows_no_scale_of_the_loss(self):
        tx = adamw_with_hypergradient(0.05, eps=0.0)
        rates = [_train(tx, lambda p, c=c: c * _quadratic(p))[1] for c in (1.0, 1024.0)]
        np.testing.assert_allclose(*rates, rtol=1e-5)
        assert rates[0][-1] != rates[0][0]

    def test_raises_a_low_rate_and_cuts_a_high_one(self):
        for rule, beta in (("multiplicative", 0.02), ("additive", 1e-3)):
            make = functools.partial(adamw_with_hypergradient, hypergradient_rate=beta, rule=rule)
            assert _train(make(1e-4), _quadratic)[1][-1] > 5e-4
            assert _train(make(5.0), _quadratic)[1][-1] < 4.97

    @pytest.mark.parametrize("rule", ["multiplicative", "additive"])
    def test_rate_is_never_negative(self, rule):
        tx = adamw_with_hypergradient(1.0, hypergradient_rate=1.0, rule=rule)
        signs = iter([1.0, -1.0, -1.0, 1.0])
        state = tx.init(PARAMS)
        for sign in signs:
            _, state = tx.update(jax.tree.map(lambda p, s=sign: s + 0 * p, PARAMS), state, PARAMS)
            assert 0.0 <= float(state.hyperparams["learning_rate"]) < math.inf

    @pytest.mark.parametrize("rule", ["multiplicative", "additive"])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("row", [0, 2])
    def test_holds_where_a_gradient_is_not_finite(self, rule, bad, row):
        init, update = _updater(rule)
        good = jax.grad(_quadratic)(PARAMS)
        state = clean = init(PARAMS)
        for step in range(4):
            if step != row:
                clean = update(good, clean)
                state = update(good, state)
                continue
            held = update({**good, "w": good["w"].at[1].set(bad)}, state)
            assert int(held.nonfinite_count) == 1
            assert float(held.hyperparams["learning_rate"]) == float(
                state.hyperparams["learning_rate"]
            )
            # Its moments are spoilt for good, so the rate stays where it is.
            after = update(good, held)
            assert int(after.nonfinite_count) == 2
            jax.tree.map(np.testing.assert_array_equal, after.hyperparams, held.hyperparams)
        assert float(state.hyperparams["learning_rate"]) > 0.05
        jax.tree.map(np.testing.assert_array_equal, state, clean)

    def test_goes_on_where_the_step_is_left_out(self):
        tx = optax.apply_if_finite(adamw_with_hypergradient(0.05), 3)
        # Of one size, so that Adam's direction is the gradient's own and the cosine 1.
        good, bad = (jax.tree.map(lambda p, g=g: g + 0.0 * p, PARAMS) for g in (0.3, jnp.nan))
        state = tx.init(PARAMS)
        for grads in (good, bad, good):
            _, state = tx.update(grads, state, PARAMS)
        assert float(optax.tree.get(state, "learning_rate")) == pytest.approx(0.05 * 1.02, rel=1e-4)

    def test_dtypes_stay(self):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
        tx = adamw_with_hypergradient(0.05)
        state = tx.init(params)
        updates, new = tx.update(params, state, params, value=jnp.float32(1.0))
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        for leaf in new.hyperparams.values():
            assert leaf.dtype == jnp.float32
            assert not leaf.weak_type

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("learning_rate", -1.0),
            ("weight_decay", math.inf),
            ("b1", 1.0),
            ("hypergradient_rate", 2.0),
            ("rule", "sum"),
        ],
    )
    def test_bad_argument_is_named(self, argument, value):
        with pytest.raises(ValueError, match=f"{argument} must be .* got {value!r}"):
            adamw_with_hypergradient(**{"learning_rate": 0.1, argument: value})


@functools.cache
def _updater(rule):
    tx = adamw_with_hypergradient(0.05, hypergradient_rate=1e-3, rule=rule)
    return tx.init, jax.jit(lambda grads, state: tx.update(grads, state, PARAMS)[1])


def _paths(*optimizers):
    """The parameters of each under the gradients of its own path, step by step."""
    runs = [[PARAMS, tx.init(PARAMS)] for tx in optimizers]
    while True:
        for run, tx in zip(runs, optimizers, strict=True):
            params, state = run
            updates, state = tx.update(jax.grad(_quadratic)(params), state, params)
            run[:] = optax.apply_updates(params, updates), state
        yield [params for params, _ in runs]


def _train(tx, loss, steps=150):
    """The last parameters and the rate of each step, of one scan that shows the loss."""

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        rate = optax.tree.get(state, "learning_rate")
        return (optax.apply_updates(params, updates), state), rate

    (params, _), rates = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=steps)
    return params, rates


def _peers_of(rate, seed):
    """All four at a rate and a seed that may be traced."""
    inject = functools.partial(mo.inject_meta_hyperparams, optax.adamw)
    return {
        "torch_plateau": inject(torch_plateau(patience=1, factor=0.5))(learning_rate=rate),
        "greedy_lr": inject(greedy_lr(patience=1))(learning_rate=rate),
        "random_policy": inject(random_policy(seed))(learning_rate=rate),
        "adamw_with_hypergradient": adamw_with_hypergradient(rate, weight_decay=0.1 * rate),
    }


class TestCompiledLoops:
    @pytest.mark.parametrize("name", _peers_of(0.1, 0))
    def test_jit_vmap_and_scan_equal_one_run_at_a_time(self, name):
        rates = jnp.asarray([1e-3, 0.05, 2.0])
        seeds = jnp.arange(3, dtype=jnp.uint32)

        def run(rate, seed):
            return _train(_peers_of(rate, seed)[name], _quadratic, steps=40)

        params, used = jax.jit(jax.vmap(run))(rates, seeds)
        one_run = jax.jit(run)
        for i in range(3):
            alone, one = one_run(rates[i], seeds[i])
            np.testing.assert_allclose(used[i], one, rtol=2e-5)
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-3, atol=1e-4),
                params,
                alone,
            )
        assert len({float(row[-1]) for row in used}) == 3

    @pytest.mark.parametrize("name", _peers_of(0.1, 0))
    def test_one_trace_and_strong_arrays(self, name):
        tx = _peers_of(0.1, 0)[name]
        traces = []

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, value):
            traces.append(name)
            return tx.update(PARAMS, state, PARAMS, value=value)[1]

        state = step(step(tx.init(PARAMS), jnp.float32(1.0)), jnp.float32(2.0))
        assert len(traces) == 1
        for leaf in jax.tree.leaves(state):
            assert isinstance(leaf, jax.Array)
            assert not getattr(jax.typeof(leaf), "weak_type", False)
