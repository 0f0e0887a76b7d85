"""The recorded runs of the reference, and the defects of it that ours must not have."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import meta_optax as mo

RECORDS = [
    record
    for record in json.loads((pathlib.Path(__file__).parent / "data/traces.json").read_text())
    if record["meta_optimizer"] != "reinforce_features"
]
NAMES = {"loss": "value", "weight_norm": "param_norm"}
# What makes ours the recorded behaviour.
OFF = {
    "plateau": {"max_weight_decay_growth": math.inf},
    "advanced_plateau": {"rearm_trend": False, "max_weight_decay_growth": math.inf},
}
LABELS = {"router": "gate", "experts": "expert", "rest": "dense"}
PARAMS = {name: jnp.ones([2]) for name in LABELS}


def _strategy(record):
    kind = record["meta_optimizer"]
    return getattr(mo, kind)(**record["arguments"], **OFF.get(kind, {}))


def _run(tx, rows):
    """The hyperparameters that each row's update used, from one scan."""

    def step(carry, row):
        params, state = carry
        updates, state = tx.update(params, state, params, **row)
        return (optax.apply_updates(params, updates), state), state.hyperparams

    return jax.jit(lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), rows))()[1]


def _columns(rows):
    return {
        NAMES.get(name, name): jnp.asarray([row[name] for row in rows], jnp.float32)
        for name in rows[0]
    }


def test_there_are_48_records():
    assert len(RECORDS) == 48


@pytest.mark.parametrize(
    "record",
    [pytest.param(r, id=f"{r['meta_optimizer']}-{i}") for i, r in enumerate(RECORDS)],
)
def test_record_through_injection_in_scan(record):
    grouped = "gate" in record["meta_optimizer"]
    factory = mo.moe_partition(optax.adamw, LABELS) if grouped else optax.adamw
    tx = mo.inject_meta_hyperparams(factory, _strategy(record))(**record["initial"])
    used = _run(tx, _columns(record["metrics"]))
    for name in record["expected"][0]:
        expected = np.array([row[name] for row in record["expected"]])
        np.testing.assert_allclose(used[name.replace("/", "_")], expected, rtol=1e-4, err_msg=name)


def test_table_of_the_reference():
    losses = [1.0023, 0.9760, 0.9261, 0.88, 0.84] + [0.8] * 5
    strategy = mo.advanced_plateau(patience=2, lr_factor=0.8, warmup_steps=3, rearm_trend=False)
    tx = mo.inject_meta_hyperparams(optax.adamw, strategy)(learning_rate=0.01)
    rates = _run(tx, {"value": jnp.array(losses)})["learning_rate"]
    expected = {0: 0.01 / 3, 1: 0.02 / 3, 2: 0.01, 5: 0.01, 7: 0.008, 9: 0.0064}
    for step, rate in expected.items():
        assert float(rates[step]) == pytest.approx(rate, rel=1e-4)


def test_table_of_the_reference_holds_with_the_defaults_too():
    losses = [1.0023, 0.9760, 0.9261, 0.88, 0.84] + [0.8] * 5
    strategy = mo.advanced_plateau(patience=2, lr_factor=0.8, warmup_steps=3)
    tx = mo.inject_meta_hyperparams(optax.adamw, strategy)(learning_rate=0.01)
    rates = _run(tx, {"value": jnp.array(losses)})["learning_rate"]
    np.testing.assert_allclose(rates[jnp.array([5, 7, 9])], [0.01, 0.008, 0.0064], rtol=1e-6)


def _cuts(strategy, losses):
    tx = mo.inject_meta_hyperparams(optax.adamw, strategy)(learning_rate=0.1)
    rates = np.asarray(_run(tx, {"value": jnp.asarray(losses)})["learning_rate"])
    return int(np.sum(rates[1:] < 0.999 * rates[:-1]))


def test_trend_does_not_fire_at_every_step_of_a_plateau():
    flat = [1.0] * 40
    arguments = {"warmup_steps": 0, "patience": 10, "trend_window": 5}
    recorded = _cuts(mo.advanced_plateau(**arguments, rearm_trend=False), flat)
    ours = _cuts(mo.advanced_plateau(**arguments), flat)
    assert recorded > 15  # the defect, which a switch keeps
    assert ours == 40 // 5


def test_weight_decay_growth_is_bounded():
    rows = {"value": jnp.ones([100]), "grad_norm": jnp.full([100], 50.0)}
    for strategy in (mo.plateau(), mo.advanced_plateau(warmup_steps=0)):
        tx = mo.inject_meta_hyperparams(optax.adamw, strategy)(learning_rate=0.1, weight_decay=0.01)
        assert float(_run(tx, rows)["weight_decay"].max()) == pytest.approx(0.1)


def test_warmup_reaches_the_full_rate_with_an_update_frequency():
    strategy = mo.advanced_plateau(warmup_steps=7, update_frequency=5)
    tx = mo.inject_meta_hyperparams(optax.adamw, strategy)(learning_rate=0.7)
    rates = _run(tx, {"value": jnp.linspace(2.0, 1.0, 20)})["learning_rate"]
    np.testing.assert_allclose(rates[:7], 0.1 * np.arange(1, 8), rtol=1e-6)
    np.testing.assert_allclose(rates[7:], 0.7, rtol=1e-6)


@pytest.mark.parametrize("strategy", [mo.plateau, mo.advanced_plateau])
def test_what_is_not_finite_on_a_step_in_between_is_not_seen(strategy):
    tx = mo.inject_meta_hyperparams(optax.sgd, strategy(update_frequency=4))(0.1)
    state = tx.init(PARAMS)
    for value in (1.0, jnp.nan, jnp.inf, 1.0, jnp.nan):
        _, state = tx.update(PARAMS, state, PARAMS, value=value)
    assert int(state.nonfinite_count) == 1


def test_warmup_moves_on_steps_in_between_that_are_not_finite():
    strategy = mo.advanced_plateau(warmup_steps=4, update_frequency=4)
    tx = mo.inject_meta_hyperparams(optax.sgd, strategy)(0.1)
    rates = _run(tx, {"value": jnp.array([1.0, jnp.nan, jnp.nan, jnp.nan])})["learning_rate"]
    np.testing.assert_allclose(rates, [0.025, 0.05, 0.075, 0.1], rtol=1e-6)


def test_nonfinite_loss_is_not_a_bad_step():
    values = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf, jnp.nan, 0.9])
    tx = mo.inject_meta_hyperparams(optax.sgd, mo.plateau(patience=2))(learning_rate=0.1)
    np.testing.assert_allclose(_run(tx, {"value": values})["learning_rate"], 0.1)
