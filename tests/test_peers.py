"""The peers' rules against recordings of the peers themselves, and by hand."""

import functools
import inspect
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peers import greedy_lr_cuts, torch_cuts

import meta_optax as mo
from meta_optax.compare._peers import greedy_lr, random_policy, torch_plateau

TRACES = json.loads((pathlib.Path(__file__).parent / "data/peer_traces.json").read_text())
SEQUENCES = {name: np.float32(values) for name, values in TRACES["sequences"].items()}
RULES = {"torch_plateau": torch_plateau, "greedy_lr": greedy_lr}
# Sequences on which ours holds, where the originals do what they do.
HELD = ("not finite", "minus infinity")
# Settings that decide what is computed; all others are traced.
STATIC = ("threshold_mode", "smooth", "window_size")


def _settings_of(rule):
    records = [record for record in TRACES["records"] if record["rule"] == rule]
    return {json.dumps(record["arguments"]): record["arguments"] for record in records}


EACH_SETTING = [
    pytest.param(rule, arguments, id=f"{rule}-{name}")
    for rule in RULES
    for name, arguments in _settings_of(rule).items()
]


def _scan(meta, rate, values):
    """The rate that each row's update used."""
    tx = mo.inject_meta_hyperparams(optax.sgd, meta)(learning_rate=rate)
    params = jnp.ones([])

    def step(state, value):
        _, state = tx.update(params, state, params, value=value)
        return state, state.hyperparams["learning_rate"]

    return jax.lax.scan(step, tx.init(params), values)


@functools.cache
def _runner(rule, static):
    def run(rate, values, traced):
        return _scan(RULES[rule](**dict(static), **traced), rate, values)[1]

    return jax.jit(run)


def _rates(rule, arguments, rate, values):
    """All sequences are of 300 rows, so that one program serves them all."""
    defaults = {k: p.default for k, p in inspect.signature(RULES[rule]).parameters.items()}
    static = tuple((k, v) for k, v in arguments.items() if k in STATIC)
    # All that can be, so that few programs serve all settings.
    traced = {k: v for k, v in (defaults | arguments).items() if k not in STATIC}
    padded = np.concatenate([values, np.full(300 - len(values), values[-1])])
    return np.asarray(_runner(rule, static)(rate, padded, traced))[: len(values)]


def _recorded(record, size):
    rates = np.full(size, record["initial"])
    for row, rate in record["changes"]:
        rates[row:] = rate
    return rates


def _records(rule, arguments, names):
    return [
        record
        for record in TRACES["records"]
        if (record["rule"], record["arguments"]) == (rule, arguments)
        and record["sequence"] in names
    ]


def _record(rule, arguments, name):
    return _records(rule, arguments, [name])[0]


def _assert_same_rates(rates, recorded):
    """Within 1e-6, and one rounding of float32 for each move so far."""
    moves = np.cumsum(np.diff(recorded, prepend=recorded[0]) != 0)
    np.testing.assert_array_less(np.abs(rates / recorded - 1.0), 1e-6 + 6e-8 * moves)


class TestRecordings:
    def test_there_are_240_records_of_the_pinned_versions(self):
        assert TRACES["versions"] == {"torch": "2.13.0+cpu", "transformers": "5.23.0"}
        assert len(TRACES["records"]) == 240
        assert len(SEQUENCES) == 16

    @pytest.mark.parametrize(("rule", "arguments"), EACH_SETTING)
    def test_each_row_is_as_recorded(self, rule, arguments):
        records = _records(rule, arguments, SEQUENCES.keys() - set(HELD))
        assert len(records) == 14 * (1 if arguments else 2)
        for record in records:
            values = SEQUENCES[record["sequence"]]
            rates = _rates(rule, arguments, record["initial"], values)
            _assert_same_rates(rates, _recorded(record, len(values)))

    @pytest.mark.parametrize("rule", RULES)
    def test_defaults_that_are_not_traced(self, rule):
        record = _record(rule, {}, "long")
        meta = RULES[rule]()
        rates = jax.jit(lambda x: _scan(meta, record["initial"], x)[1])(SEQUENCES["long"])
        _assert_same_rates(np.asarray(rates), _recorded(record, 300))

    @pytest.mark.parametrize(("rule", "arguments"), EACH_SETTING)
    def test_block_of_rows_is_judged_by_its_mean_at_its_end(self, rule, arguments):
        values = SEQUENCES["noisy fall"][:100]
        rows = np.stack([values - 0.25, values, values + 0.25], axis=1).ravel()
        record = _record(rule, arguments, "noisy fall")
        rates = _rates(rule, {**arguments, "accumulation": 3}, record["initial"], rows)
        expected = _recorded(record, 120)[:100]
        _assert_same_rates(rates[2::3], expected)
        before = np.concatenate([[record["initial"]], expected[:-1]])
        for first in (0, 1):
            _assert_same_rates(rates[first::3], before)


class TestNonFinite:
    """Where ours must differ: the originals take NaN and inf for bad rows, and -inf for a best."""

    @pytest.mark.parametrize(("rule", "arguments"), EACH_SETTING)
    @pytest.mark.parametrize("name", HELD)
    def test_rows_are_as_if_they_had_not_been(self, rule, arguments, name):
        values = SEQUENCES[name]
        rates = _rates(rule, arguments, 0.1, values)
        finite = np.isfinite(values)
        dropped = _recorded(_record(rule, arguments, "not finite, dropped"), 60)
        _assert_same_rates(rates[finite], dropped)
        for row in np.flatnonzero(~finite):
            assert rates[row] == rates[row - 1]

    def test_originals_take_them_for_bad_rows(self):
        record = _record("torch_plateau", {"patience": 0}, "not finite")
        assert record["cuts"] == [7, 21, 22, 38]
        assert np.flatnonzero(~np.isfinite(SEQUENCES["not finite"])).tolist() == [7, 21, 22, 38]
        assert _record("torch_plateau", {"patience": 0}, "not finite, dropped")["cuts"] == []

    @pytest.mark.parametrize("rule", RULES)
    def test_originals_are_stuck_after_minus_infinity(self, rule):
        record = _record(rule, {"patience": 0}, "minus infinity")
        assert record["cuts"] == list(range(21, 61))

    def test_smoothing_original_is_stuck_after_nan(self):
        """The mean is NaN from row 7 on; two rows may pass, the third is cut."""
        arguments = {"patience": 2, "smooth": True, "window_size": 5}
        assert _record("greedy_lr", arguments, "not finite")["cuts"] == list(range(9, 64, 3))

    @pytest.mark.parametrize("make", RULES.values(), ids=RULES)
    def test_they_are_counted(self, make):
        values = jnp.asarray([math.nan, 1.0, math.inf, -math.inf, 1.0])
        state, rates = _scan(make(), 0.1, values)
        assert int(state.nonfinite_count) == 3
        assert not np.isnan(rates).any()


class TestOracles:
    """The rules in NumPy of `benchmarks/peers.py` against the same recordings."""

    @pytest.mark.parametrize("arguments", [{}, {"patience": 0}], ids=str)
    @pytest.mark.parametrize("name", SEQUENCES)
    def test_torch(self, arguments, name):
        cuts = torch_cuts(SEQUENCES[name].astype(float)[None], **arguments)[0]
        assert np.flatnonzero(cuts).tolist() == _record("torch_plateau", arguments, name)["cuts"]

    @pytest.mark.parametrize(
        "arguments",
        [{}, {"patience": 0}, {"patience": 2, "smooth": True, "window_size": 5}],
        ids=str,
    )
    @pytest.mark.parametrize("name", SEQUENCES)
    def test_greedy_lr(self, arguments, name):
        settings = {k: v for k, v in arguments.items() if k != "smooth"}
        cuts = greedy_lr_cuts(SEQUENCES[name].astype(float)[None], **settings)[0]
        assert np.flatnonzero(cuts).tolist() == _record("greedy_lr", arguments, name)["cuts"]


class TestByHand:
    def test_greedy_lr_starts_again_from_its_first_rate(self):
        """Cut at rows 1 and 2, at the floor at 2 and 3: the second of them starts it again."""
        meta = greedy_lr(factor=0.5, patience=0, min_lr=0.25, max_lr=4.0, reset_start=2)
        _, rates = _scan(meta, 0.5, jnp.asarray([2.0, 3.0, 3.0, 3.0, 2.5, 2.4]))
        assert rates.tolist() == [1.0, 0.5, 0.25, 0.5, 1.0, 2.0]

    @pytest.mark.parametrize("make", RULES.values(), ids=RULES)
    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("factor", 1.0),
            ("patience", -1),
            ("threshold", -0.1),
            ("threshold_mode", "relative"),
            ("cooldown", 0.5),
            ("min_lr", -1.0),
            ("eps", math.nan),
            ("accumulation", 0),
        ],
    )
    def test_bad_argument_is_named(self, make, argument, value):
        with pytest.raises(ValueError, match=f"{argument} must be .* got {value!r}"):
            make(**{argument: value})

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (torch_plateau(patience=0, factor=0.5), "torch_plateau: patience"),
            (greedy_lr(patience=0, factor=0.5), "greedy_lr: does not improve"),
            (greedy_lr(patience=0, factor=0.5, min_lr=0.1, reset_start=1), "greedy_lr: reset"),
        ],
        ids=["torch_plateau", "greedy_lr", "reset"],
    )
    def test_decisions_name_the_rule(self, make, reason):
        state, _ = _scan(mo.with_decisions(make), 0.1, jnp.asarray([1.0, 1.0]))
        assert mo.read_decisions(state)[-1].reason == reason

    @pytest.mark.parametrize("make", RULES.values(), ids=RULES)
    def test_schedule_is_followed_up_to_the_first_block(self, make):
        schedule = optax.linear_schedule(1.0, 0.0, 10)
        _, rates = _scan(make(accumulation=3), schedule, jnp.ones([6]))
        np.testing.assert_allclose(rates, [1.0, 0.9, 0.8, 0.8, 0.8, 0.8], rtol=1e-6)

    @pytest.mark.usefixtures("strict_numerics")
    @pytest.mark.parametrize(
        "make", [torch_plateau, greedy_lr, functools.partial(greedy_lr, smooth=True), random_policy]
    )
    def test_strict_numerics_and_fixed_states(self, make):
        meta, base = make(), {"learning_rate": jnp.float32(0.5)}
        state = meta.init()
        row = {"value": jnp.float32(1.0), "step": jnp.int32(0), "base_learning_rate": 0.5}
        new = meta.observe(state, row)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        assert not jax.typeof(meta.apply(new, base)["learning_rate"]).weak_type


class TestRandomPolicy:
    def _walk(self, seed, rows=300, **arguments):
        return _scan(random_policy(seed, **arguments), 1e-3, jnp.zeros([rows]))[1]

    def test_factors_are_each_as_likely(self):
        """Of 3000 draws a share of a third has a standard deviation of 0.0086."""
        walks = jax.vmap(lambda seed: self._walk(seed, 100, min_lr=1e-37, max_lr=1e37))(
            jnp.arange(30, dtype=jnp.uint32)
        )
        ratios = np.log2(walks[:, 1:] / walks[:, :-1])
        np.testing.assert_allclose(ratios, np.round(ratios), atol=1e-5)
        shares = [np.mean(np.round(ratios) == power) for power in (-1, 0, 1)]
        assert sum(shares) == 1.0
        np.testing.assert_allclose(shares, 1 / 3, atol=0.035)

    def test_stays_in_its_bounds_and_leaves_them_again(self):
        walks = np.asarray(
            jax.vmap(lambda seed: self._walk(seed, 1000))(jnp.arange(16, dtype=jnp.int32))
        )
        assert walks.min() == np.float32(1e-7)
        assert walks.max() == 1.0
        at_bound = (walks[:, :-1] == 1.0) | (walks[:, :-1] == np.float32(1e-7))
        assert (walks[:, 1:] != walks[:, :-1])[at_bound].any()

    def test_same_seed_same_walk_traced_or_not(self):
        walks = jax.vmap(self._walk)(jnp.asarray([7, 8, 7, 2**31 + 1], jnp.uint32))
        np.testing.assert_array_equal(walks[0], walks[2])
        np.testing.assert_array_equal(walks[0], self._walk(7))
        assert len({tuple(walk.tolist()) for walk in walks}) == 3

    def test_draws_at_every_nth_step_from_the_first(self):
        walk = np.asarray(self._walk(3, 90, update_frequency=9))
        moves = np.flatnonzero(np.diff(walk, prepend=np.float32(1e-3)))
        assert len(moves) > 2
        assert set(moves % 9) == {0}
        np.testing.assert_array_equal(walk[::9], self._walk(3, 10))

    @pytest.mark.parametrize(
        ("argument", "value"), [("seed", -1), ("update_frequency", 0), ("max_lr", -1.0)]
    )
    def test_bad_argument_is_named(self, argument, value):
        with pytest.raises(ValueError, match=f"{argument} must be .* got {value!r}"):
            random_policy(**{argument: value})
