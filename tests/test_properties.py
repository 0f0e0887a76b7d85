"""Random metric sequences, non-finite values among them, through each strategy."""

import math

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table import FREE, SHAPES, STRATEGIES, finite_nonnegative, injected, params

import meta_optax as mo

STEPS = 12
GROUP_RATES = {"gate_learning_rate": 0.5, "expert_learning_rate": 2.0}
anything = st.one_of(
    st.floats(width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0, 3e38, -3e38, 1e-40]),
    st.floats(-2.0, 2.0, width=32),
)
sequences = st.fixed_dictionaries(
    {
        name: hnp.arrays(np.float32, (STEPS, *shape), elements=anything)
        for name, shape in SHAPES.items()
    }
    # For the row of `every` by a signal.
    | {"is_validation": hnp.arrays(np.bool_, STEPS)}
)
bases = st.fixed_dictionaries(
    {
        "learning_rate": st.floats(0.0, 10.0, width=32),
        "weight_decay": st.floats(0.0, 10.0, width=32),
    }
)


def _scan(strategy):
    def advance(carry, rows):
        state, step, base = carry
        seen = {**rows, **strategy.apply(state, base), "step": step}
        state = strategy.observe(state, seen)
        return (state, step + 1, base), strategy.apply(state, base)

    def run(rows, base):
        return jax.lax.scan(advance, (strategy.init(), jnp.int32(0), base), rows)[1]

    return jax.jit(run)


def _in_range(used, base, name):
    """The bounds that each strategy's arguments set, at their defaults."""
    tiny = 1e-30
    for key, values in used.items():
        values = np.asarray(values)
        assert np.isfinite(values).all(), (name, key, values)
        assert (values >= 0).all(), (name, key, values)
    if name.startswith(("policy_gradient", "learned")):
        _in_scales(used, base)
        return
    rate, decay = np.asarray(used["learning_rate"]), np.asarray(used["weight_decay"])
    assert (rate <= base["learning_rate"] + tiny).all()
    assert (decay >= base["weight_decay"] - tiny).all()
    assert (decay <= 10.0 * max(base["weight_decay"], 1e-6) * (1 + 1e-6)).all()


def _in_scales(used, base):
    """Within the shares of the base that are the default of those that may also raise it."""
    for key, values in used.items():
        # A group's rate is multiplied by the common scale and by its own.
        scales = 2 if key in GROUP_RATES else 1
        low, high = 1e-3**scales * (1 - 1e-5), 30.0**scales * (1 + 1e-5)
        # Products of what is this small are rounded to no fixed share.
        start, tiny = np.float64((base | FREE | GROUP_RATES)[key]), 1e-30
        assert (values >= low * start - tiny).all(), (key, values)
        assert (values <= high * start + tiny).all(), (key, values)


@pytest.mark.usefixtures("strict_numerics")
@pytest.mark.parametrize("name", [n for n in STRATEGIES if n not in ("custom", "bounded")])
def test_no_sequence_leads_outside_the_bounds(name):
    run = _scan(STRATEGIES[name].eager())
    # Heads of groups move rates that are there.
    more = GROUP_RATES if name == "policy_gradient[groups]" else {}

    @given(rows=sequences, base=bases)
    def holds(rows, base):
        arrays = {k: jnp.float32(v) for k, v in (base | FREE | more).items()}
        _in_range(run(rows, arrays), base, name)

    holds()


def test_bounded_stays_in_its_bounds():
    run = _scan(mo.bounded(mo.plateau(patience=1), learning_rate=(1e-3, 0.5)))

    @given(rows=sequences, base=bases)
    def holds(rows, base):
        rates = np.asarray(run(rows, {k: jnp.float32(v) for k, v in base.items()})["learning_rate"])
        assert ((rates >= np.float32(1e-3)) & (rates <= 0.5)).all()

    holds()


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_sequence_reaches_the_optimizer_unsafe(name):
    """Through the injection, a careless strategy of a user's own too."""
    tx = injected(STRATEGIES[name])
    p = params()

    @jax.jit
    def run(rows):
        def step(state, metrics):
            _, state = tx.update(p, state, p, **metrics)
            return state, state.hyperparams

        return jax.lax.scan(step, tx.init(p), rows)[1]

    @given(rows=sequences)
    def holds(rows):
        used = run(rows)
        for i in range(STEPS):
            assert finite_nonnegative({k: v[i] for k, v in used.items()})

    holds()


@given(
    values=hnp.arrays(np.float32, 20, elements=st.floats(-5.0, 5.0, width=32)),
    shift=st.floats(-10.0, 10.0, width=32),
)
def test_patience_depends_on_order_alone(values, shift):
    """Where the loss lies, above zero or below, is nothing to the test of patience."""
    ranks = np.unique(values, return_inverse=True)[1].astype(np.float32)
    run = _scan(mo.plateau(patience=2, wd_increase_factor=1.0))
    base = {"learning_rate": jnp.float32(1.0)}
    moved = ranks + np.float32(round(shift))
    np.testing.assert_array_equal(
        run({"value": ranks}, base)["learning_rate"], run({"value": moved}, base)["learning_rate"]
    )
