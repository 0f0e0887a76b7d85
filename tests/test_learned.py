"""The policy that was trained beforehand: its file, what it sees, what it does and never does."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import meta_optax as mo
from meta_optax import _learned, _policy_file
from meta_optax._learned import DECISIONS, FEATURES, MAX_CUT, MAX_RAISE, move_of
from meta_optax._policy import Policy
from meta_optax._policy_file import SHIPPED, load_policy, policy_content

PACKAGE = pathlib.Path(_policy_file.__file__).parent


def _policy(bias=0.0, **weights):
    """A policy whose output is a bias and the features that are named."""
    kernel = np.zeros([len(FEATURES), 1], np.float32)
    for name, weight in weights.items():
        kernel[FEATURES.index(name.replace("_", " "))] = weight
    arrays = kernel, np.zeros(1, np.float32), np.ones([1, 1], np.float32), np.float32([bias])
    return Policy(*arrays)


def _saved(folder, policy, **changes):
    content = policy_content(policy, FEATURES, {"command": "by hand"}) | changes
    path = folder / "policy.json"
    path.write_text(json.dumps(content))
    return path


def _observe(meta, state, step, value, grad_norm=1.0, param_norm=1.0):
    row = {"value": value, "grad_norm": grad_norm, "param_norm": param_norm}
    return meta.observe(state, {"step": step, **row})


def _scales(meta, losses, **norms):
    """What the base is multiplied by after each row."""
    state, seen = meta.init(), []
    for step, loss in enumerate(losses):
        state = _observe(meta, state, step, loss, **{k: v[step] for k, v in norms.items()})
        seen.append(float(meta.apply(state, {"learning_rate": 1.0})["learning_rate"]))
    return np.array(seen)


class TestFile:
    def test_the_shipped_one_is_small_sound_and_says_how_it_was_made(self):
        path = PACKAGE / SHIPPED
        assert path.stat().st_size < 8 * 1024
        policy = load_policy(path, FEATURES)
        assert all(np.isfinite(w).all() and w.dtype == np.float32 for w in policy)
        made = json.loads(path.read_text())["made"]
        assert made["command"] == "python -m meta_optax.metatrain"
        assert made["iterations_done"] == made["settings"]["iterations"]

    def test_what_is_saved_is_what_is_read(self, tmp_path):
        generator = np.random.default_rng(0)
        shapes = [(len(FEATURES), 3), (3,), (3, 1), (1,)]
        policy = Policy(*(generator.normal(size=s).astype(np.float32) for s in shapes))
        read = load_policy(_saved(tmp_path, policy), FEATURES)
        for wanted, got in zip(policy, read, strict=True):
            np.testing.assert_array_equal(wanted, got)

    def test_a_digit_that_changed_is_found(self, tmp_path):
        path = _saved(tmp_path, _policy(0.25))
        path.write_text(path.read_text().replace("0.25", "0.26"))
        with pytest.raises(ValueError, match=r"policy\.json: wrong checksum"):
            mo.learned(weights=path)

    @pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", '{"format": "other"}', "\udcff"])
    def test_another_file_is_named(self, tmp_path, text):
        path = tmp_path / "policy.json"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"policy\.json: no file of policy weights"):
            mo.learned(weights=str(path))

    def test_another_version_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"policy\.json: policy weights of version 7"):
            mo.learned(weights=_saved(tmp_path, _policy(), version=7))

    @pytest.mark.parametrize(
        ("features", "weights", "said"),
        [
            (("one", "two"), _policy(), "sees \\['one', 'two'\\]"),
            (FEATURES, _policy()._replace(bias=np.zeros(2, np.float32)), "shapes"),
            (FEATURES, _policy()._replace(kernel=np.float32([[np.inf]])), "no weights of a policy"),
            (FEATURES, _policy()._replace(hidden_kernel=np.zeros([2, 1])), "2 rows of weights"),
        ],
    )
    def test_weights_for_something_else_are_refused(self, tmp_path, features, weights, said):
        path = tmp_path / "policy.json"
        path.write_text(json.dumps(policy_content(weights, features, {})))
        with pytest.raises(ValueError, match=rf"policy\.json: .*{said}"):
            mo.learned(weights=path)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(OSError, match="nowhere"):
            mo.learned(weights=tmp_path / "nowhere.json")

    def test_weights_of_another_kind(self):
        with pytest.raises(ValueError, match="weights must be a path or None, got 3"):
            mo.learned(weights=3)


class TestMoves:
    def test_by_hand(self):
        features = jnp.zeros(len(FEATURES))
        for bias, wanted in ((0.05, 0.0), (-0.09, 0.0), (2.0, MAX_RAISE), (-2.0, MAX_CUT)):
            wish = math.tanh(bias)
            expected = math.copysign(max(abs(wish) - 0.1, 0.0), wish) * wanted
            assert float(move_of(_policy(bias), features)) == pytest.approx(expected, rel=1e-5)

    def test_what_it_sees_is_in_its_order(self):
        """The slope's score alone: below 0 while the loss falls."""
        meta = mo.learned(update_frequency=1, weights=_policy(slope_score=-3.0))
        falling = _scales(meta, [2.0 * 0.9**k for k in range(20)])
        rising = _scales(meta, [2.0 / 0.9**k for k in range(20)])
        assert (falling[10:] > 1.0).all()
        assert (rising[3:] < 1.0).all()

    def test_raises_wait_and_fade_and_all_ends_at_the_horizon(self):
        steps = np.arange(25)
        shares = np.where((steps > 8) & (steps < 20), (1.0 - steps / 20) ** 2, 0.0)
        meta = mo.learned(horizon=20, update_frequency=1, weights=_policy(9.0))
        moves = np.diff(np.log(_scales(meta, [1.0] * 25)), prepend=0.0)
        np.testing.assert_allclose(moves, 0.9 * MAX_RAISE * shares, atol=1e-5)
        cuts = mo.learned(horizon=20, update_frequency=1, weights=_policy(-0.2), min_scale=1e-9)
        moves = np.diff(np.log(_scales(cuts, [1.0] * 25)), prepend=0.0)
        np.testing.assert_allclose(moves[1:20], moves[1], rtol=1e-4)
        assert moves[1] < 0.0
        np.testing.assert_allclose(moves[20:], 0.0, atol=1e-6)

    def test_without_a_horizon_raises_do_not_fade(self):
        meta = mo.learned(update_frequency=1, weights=_policy(9.0), max_scale=1e9)
        moves = np.diff(np.log(_scales(meta, [1.0] * 40)), prepend=0.0)
        np.testing.assert_allclose(moves[9:], 0.9 * MAX_RAISE, rtol=1e-4)

    def test_scales_stay_within_their_bounds_and_owe_nothing(self):
        down = mo.learned(update_frequency=1, weights=_policy(-2.0), min_scale=0.25)
        assert _scales(down, [1.0] * 6)[-1] == pytest.approx(0.25)
        up = mo.learned(update_frequency=1, weights=_policy(2.0), max_scale=3.0)
        assert _scales(up, [1.0] * 30)[-1] == pytest.approx(3.0)

    @pytest.mark.parametrize(
        ("arguments", "steps"),
        [({}, [10, 20]), ({"horizon": 350}, [3, 6, 9]), ({"horizon": 7}, [1, 2, 3, 4, 5, 6]),
         ({"horizon": 350, "update_frequency": 5}, [5, 10, 15])],
    )  # fmt: skip
    def test_it_decides_at_hundredths_of_the_horizon(self, arguments, steps):
        meta = mo.learned(weights=_policy(-1.0), min_scale=1e-9, **arguments)
        moves = np.diff(_scales(meta, [1.0] * 25), prepend=1.0)
        assert np.flatnonzero(moves)[: len(steps)].tolist() == steps

    def test_a_traced_horizon_is_the_same(self):
        def run(horizon):
            meta = mo.learned(horizon=horizon, weights=_policy(0.5, progress=-1.0))
            step = lambda state, k: (_observe(meta, state, k, 1.0), state.log_scale)  # noqa: E731
            return jax.lax.scan(step, meta.init(), jnp.arange(300))[1]

        together = jax.jit(jax.vmap(run))(jnp.array([100, 250]))
        for horizon, scales in zip((100, 250), together, strict=True):
            np.testing.assert_allclose(scales, run(horizon), rtol=1e-5)

    def test_decisions_are_a_hundred(self):
        assert DECISIONS == 100


class TestShipped:
    """What the weights in the package do; `benchmarks/learned.py` measures what that is worth."""

    falling = 2.5 * np.arange(1, 80) ** -0.3

    @pytest.mark.parametrize("scale", [1e-3, 1e4])
    def test_no_unit_of_the_loss_moves_a_decision(self, scale):
        noisy = self.falling * np.exp(0.05 * np.random.default_rng(0).normal(size=79))
        norms = np.linspace(2.0, 1.0, 79), np.linspace(8.0, 9.0, 79)
        meta = mo.learned(horizon=100)
        plain = _scales(meta, noisy, grad_norm=norms[0], param_norm=norms[1])
        other = _scales(meta, scale * noisy, grad_norm=scale * norms[0], param_norm=norms[1])
        np.testing.assert_allclose(plain, other, rtol=2e-3)

    def test_a_run_that_blows_up_is_cut_within_three_decisions(self):
        losses = [2.3, 4.0, 9.0, 15.0]
        meta = mo.learned(horizon=100)
        scales = _scales(meta, losses, param_norm=[8.0, 20.0, 60.0, 100.0])
        assert scales[-1] < 0.1

    def test_a_run_that_hardly_moves_is_raised(self):
        losses = 2.3 - 1e-3 * np.arange(30)
        meta = mo.learned(horizon=100)
        scales = _scales(meta, losses, param_norm=8.0 + 1e-4 * np.arange(30))
        assert scales[-1] > 2.0

    @pytest.mark.parametrize(
        "values",
        [
            [0.0] * 40,
            [-3.0] * 40,
            [1e30, -1e30] * 20,
            [1e-30] * 40,
            [1.0, 1.0] + [1.8446745e16] * 9,
        ],
    )
    def test_no_loss_leads_outside_the_bounds(self, values):
        scales = _scales(mo.learned(update_frequency=1), values)
        assert np.isfinite(scales).all()
        assert (scales > 0.999e-3).all()
        assert (scales < 30.01).all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", ["value", "grad_norm", "param_norm"])
    def test_what_is_not_finite_is_counted_and_changes_nothing(self, name, bad):
        meta = mo.learned(update_frequency=1)
        state = meta.init()
        for step in range(5):
            state = _observe(meta, state, step, 3.0 / (step + 1))
        row = {"value": 1.0, "grad_norm": 1.0, "param_norm": 1.0, name: bad}
        held = meta.observe(state, {"step": 5, **row})
        assert int(held.nonfinite_count) == 1
        assert float(held.log_scale) == float(state.log_scale)


def _features(losses, param_norm=1.0):
    """All features of each decision, as the strategy computes them."""
    meta = mo.learned(horizon=len(losses), update_frequency=1)
    state, seen = meta.init(), []
    for step, loss in enumerate(losses):
        state = _observe(meta, state, step, loss, param_norm=param_norm)
        reading = _learned.read_signals(_learned.end_interval(state.signals, 1e-3))
        share = jnp.float32(step / len(losses))
        seen.append(_learned.read_features(reading, state, jnp.array(True), share))
    return np.stack(seen)


def test_features_are_bounded_whatever_comes():
    losses = [1e30, -1e30, 0.0, 1e-30, 5.0, 5.0, -2.0, 1e-3]
    for norm in (0.0, 1e-30, 1e30):
        seen = _features(losses, norm)
        assert np.isfinite(seen).all()
        assert (np.abs(seen) <= 1.0).all()
        assert seen.shape == (len(losses), len(FEATURES))


def test_in_a_real_optimizer_it_says_why_and_finds_a_rate():
    """Least squares of the digits' pixels, with a rate a thousand times too low."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    inputs, targets = jnp.asarray(images[:512] / 16.0), jax.nn.one_hot(labels[:512], 10)

    @functools.partial(jax.jit, static_argnums=0)
    def train(is_controlled):
        strategy = mo.with_decisions(mo.learned(horizon=300))
        strategy = strategy if is_controlled else mo.log_only(strategy)
        tx = mo.inject_meta_hyperparams(optax.adamw, strategy)(learning_rate=1e-5)
        params = 0.1 * jax.random.normal(jax.random.key(0), (64, 10))

        def loss_fn(params):
            return jnp.square(inputs @ params - targets).mean()

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        (params, state), losses = jax.lax.scan(step, (params, tx.init(params)), length=300)
        return state, losses

    state, losses = train(True)
    _, alone = train(False)
    assert float(losses[-1]) < 0.8 * float(alone[-1])
    made = mo.read_decisions(state)
    assert made
    assert {d.reason for d in made} == {"learned: policy"}
    assert {d.hyperparam for d in made} == {"learning_rate"}
