"""The comparison: its protocol, its arms, its tasks, and how runs are trained together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("statsmodels", exc_type=ImportError)

from meta_optax.compare import _data, _protocol, _results
from meta_optax.compare._arms import ARMS, BASELINE, Setting
from meta_optax.compare._protocol import (
    MULTIPLES,
    Configuration,
    PlanError,
    by_seed,
    choose,
    has_diverged,
    make_plan,
    trials,
)
from meta_optax.compare._tasks import TASKS, why_missing
from meta_optax.compare._train import EVALUATIONS, Curves, Lanes, Trainer, schedule_of

SETTING = Setting(0.5, 0.1, 0, steps=1000, interval=20, has_experts=False)


def _curves(last, first=2.0):
    held_out = np.array([[first, value] for value in last], np.float32)
    empty = np.zeros(len(last))
    return Curves(held_out, empty[:, None], {}, [[] for _ in last], empty.astype(int), 0.0, 0.0)


def _lanes(rates, seeds=(0,)):
    count = len(rates) * len(seeds)
    return Lanes(
        seed=np.repeat(np.int32(seeds), len(rates)),
        learning_rate=np.tile(np.float32(rates), len(seeds)),
        weight_decay=np.full(count, 1e-3, np.float32),
    )


class TestPlan:
    def test_baseline_is_always_there_and_the_order_is_fixed(self):
        plan = make_plan("quick", ["photo", "mlp_digits"], ["plateau", "constant"])
        assert plan.arms == ("constant", BASELINE, "plateau")
        assert plan.tasks == ("mlp_digits", "photo")

    @pytest.mark.parametrize(
        ("what", "options"),
        [
            ("task", {"tasks": ["mnist"]}),
            ("arm", {"arms": ["adam"]}),
            ("budget", {"budget": "huge"}),
        ],
    )
    def test_unknown_names_are_told_the_known(self, what, options):
        with pytest.raises(PlanError, match=f"unknown {what} '[a-z]+'; known are: ") as error:
            make_plan(**options)
        known = {"task": TASKS, "arm": ARMS, "budget": _protocol.BUDGETS}[what]
        assert all(name in str(error.value) for name in known)

    @pytest.mark.parametrize("options", [{"tasks": []}, {"arms": []}, {"seeds": 0}])
    def test_nothing_to_run_is_an_error(self, options):
        with pytest.raises(PlanError):
            make_plan(**options)

    def test_missing_data(self, monkeypatch, tmp_path):
        monkeypatch.setattr(_data, "FASHION_FOLDER", tmp_path)
        assert "dataset-fashion-mnist" in why_missing("mlp_fashion")
        with pytest.raises(PlanError, match="mlp_fashion"):
            make_plan(tasks=["mlp_fashion"])
        assert "mlp_fashion" not in make_plan("full").tasks

    def test_gate_strategies_take_part_where_there_are_gates(self):
        plan = make_plan("quick", ["mlp_digits", "moe_digits"], ["expert_gate"])
        assert plan.pairs() == [
            (BASELINE, "mlp_digits"),
            (BASELINE, "moe_digits"),
            ("expert_gate", "moe_digits"),
        ]


class TestTuning:
    def test_all_arms_have_the_same_points(self):
        points = {}
        for name, arm in ARMS.items():
            low, high = np.log(arm.space)
            rates = np.log([c.learning_rate for c in trials(name, 16)])
            points[name] = (rates - low) / (high - low)
            assert ((points[name] >= 0) & (points[name] <= 1)).all()
        for values in points.values():
            np.testing.assert_allclose(values, points[BASELINE], atol=1e-6)

    def test_points_fill_the_range_evenly(self):
        rates = np.log10([c.learning_rate for c in trials(BASELINE, 16)])
        assert np.histogram(rates, 4, (-4, -1))[0].tolist() == [4, 4, 4, 4]

    def test_tuning_seeds_are_not_used_again(self):
        plan = make_plan("full")
        tuned = _protocol.tuning_lanes(plan, trials(BASELINE, 4)).seed
        final = _protocol.final_lanes(plan, Configuration(0.1, 0.1)).seed
        assert not set(tuned) & set(final)

    def test_final_lanes_are_paired_by_seed(self):
        lanes = _protocol.final_lanes(make_plan("quick"), Configuration(0.1, 0.2))
        assert by_seed(lanes.seed, 5).tolist() == [[s] * 5 for s in range(5)]
        np.testing.assert_allclose(
            by_seed(lanes.learning_rate, 5), 0.1 * np.array([MULTIPLES] * 5), rtol=1e-6
        )

    def test_least_mean_rank_wins(self):
        # Three trials of two seeds each; the medians are 1, 0.5 and 0.9, then 0.2, 1.5 and 0.1.
        results = {
            "a": _curves([1.0, 0.4, 0.9, 1.0, 0.6, 0.9]),
            "b": _curves([0.2, 1.5, 0.1, 0.2, 1.5, 0.1]),
        }
        # Ranks 3, 1, 2 and 2, 3, 1: means 2.5, 2 and 1.5.
        assert choose(results, 3) == 2

    def test_who_diverges_comes_last(self):
        results = {
            "a": _curves([0.1, 0.9, 0.1, 0.9]),
            "b": _curves([0.1, 0.9, np.nan, 0.9]),
        }
        assert choose(results, 2) == 1

    def test_a_run_that_ends_above_its_start_has_diverged(self):
        found = has_diverged(_curves([1.0, np.nan, np.inf, 2.5, 2.0]).held_out)
        assert found.tolist() == [False, True, True, True, False]


class TestArms:
    @pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
    def test_schedules(self, name):
        """Warm-up in 50 steps, the base rate, and zero at the end but for the constant."""
        rates = [
            float(ARMS[name].read(None, SETTING, jnp.int32(i))["learning_rate"])
            for i in (0, 24, 50, 1000)
        ]
        assert rates[:3] == pytest.approx([0.01, 0.25, 0.5])
        assert rates[3] == pytest.approx(0.5 if name == "constant" else 0.0)
        middle = float(ARMS[name].read(None, SETTING, jnp.int32(525))["learning_rate"])
        # Half-way between warm-up and end.
        expected = {"constant": 0.5, "linear": 0.25, "cosine": 0.25, "wsd": 0.5}[name]
        assert middle == pytest.approx(expected)

    @pytest.mark.parametrize("name", ARMS)
    def test_every_arm_learns_and_says_its_hyperparameters(self, name):
        task = TASKS["moe_digits" if ARMS[name].needs_experts else "noisy_quadratic"]()
        rate = 1.0 if ARMS[name].space[1] > 1 else 1e-2
        curves = Trainer(task, ARMS[name], 75)(_lanes([rate]), 1)
        assert curves.held_out.shape == (1, EVALUATIONS + 1)
        # Learning rates that are found from nothing take longer.
        finds = name in ("mechanic", "prodigy", "dog")
        assert curves.held_out[0, -1] < (1.01 if finds else 1.0) * curves.held_out[0, 0]
        for values in curves.hyperparams.values():
            assert values.shape == (1, EVALUATIONS)
            assert np.isfinite(values).all()

    def test_the_linear_arm_is_optax_own(self):
        task = TASKS["logistic_digits"]()
        curves = Trainer(task, ARMS["linear"], 50)(_lanes([0.01]), 1)
        first, data = jax.random.split(jax.random.key(jnp.int32(0)))
        params = task.init(first)
        warm = optax.linear_schedule(0.01 / 2, 0.01, 1)
        rates = optax.join_schedules([warm, optax.linear_schedule(0.01, 0.0, 48)], [2])
        tx = optax.adamw(rates, weight_decay=1e-3)
        state = tx.init(params)

        @jax.jit
        def step(params, state, count):
            batch = task.sample(jax.random.fold_in(data, count), count / 50)
            grads = jax.grad(lambda p: task.loss(p, batch)[0])(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for count in range(50):
            params, state = step(params, state, count)
        np.testing.assert_allclose(task.held_out(params), curves.held_out[0, -1], rtol=1e-5)

    def test_interval_arms_are_shown_means(self):
        """`plateau` in its own words: patience 3 at looks, not at steps."""
        task = TASKS["noisy_quadratic"]()
        curves = Trainer(task, ARMS["plateau"], 500)(_lanes([1e-4]), 1)
        steps = [decision.step for decision in curves.decisions[0]]
        assert steps
        assert all((step + 1) % schedule_of(500).interval == 0 for step in steps)


class TestTraining:
    def test_lanes_are_runs_of_their_own(self):
        """Whatever else is in the batch, and however it is cut."""
        make = lambda: Trainer(TASKS["logistic_digits"](), ARMS["constant"], 50)  # noqa: E731
        many = make()(_lanes([1e-3, 1e-2, 1e30], seeds=(0, 1)), 6)
        cut = make()(_lanes([1e-3, 1e-2, 1e30], seeds=(0, 1)), 4)
        alone = make()(_lanes([1e-2], seeds=(1,)), 1)
        np.testing.assert_allclose(many.held_out, cut.held_out, rtol=1e-4)
        np.testing.assert_allclose(many.held_out[4], alone.held_out[0], rtol=1e-4)
        assert has_diverged(many.held_out).tolist() == [False, False, True] * 2

    def test_a_seed_is_the_same_start_and_data_for_all(self):
        task = TASKS["mlp_digits"]()
        runs = [Trainer(task, ARMS[name], 25)(_lanes([0.0], (7,)), 1) for name in ("linear", "dog")]
        assert runs[0].held_out[0, 0] == runs[1].held_out[0, 0]
        # At a rate of zero the training losses are those of the same weights on the same batches.
        np.testing.assert_array_equal(runs[0].train, runs[1].train)


class TestTasks:
    @pytest.mark.parametrize("name", TASKS)
    def test_loss_falls_and_experts_are_found(self, name):
        if why_missing(name):
            pytest.skip(why_missing(name))
        task = TASKS[name]()
        tx = optax.adam(1e-2)
        params = start = task.init(jax.random.key(0))
        state = tx.init(params)

        @jax.jit
        def step(params, state, key):
            batch = task.sample(key, jnp.float32(0.9))
            (_, routing), grads = jax.value_and_grad(task.loss, has_aux=True)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, routing

        routing = None
        for key in jax.random.split(jax.random.key(1), 20):
            params, state, routing = step(params, state, key)
        assert task.held_out(params) < task.held_out(start)
        assert (routing is not None) == task.has_experts

    def test_trouble_is_planted_where_it_is_said(self):
        task = TASKS["moe_trouble"]()
        batches = [
            np.asarray(task.sample(jax.random.key(0), jnp.float32(at)).inputs)
            for at in (0.0, 0.305, 0.4, 0.5)
        ]
        np.testing.assert_allclose(batches[1], 30 * batches[0], rtol=1e-6)
        np.testing.assert_array_equal(batches[2], batches[0])
        np.testing.assert_allclose(batches[3], 0.8 - batches[0], rtol=1e-5, atol=1e-6)
        assert batches[3].min() >= -0.6 - 1e-6
        assert batches[3].max() <= 1.4 + 1e-6

    def test_expert_graph_is_the_examples(self):
        model = pytest.importorskip("expert_graph_model", exc_type=ImportError)
        from meta_optax.compare import _models

        params = _models.init_graph(jax.random.key(0), 64, 32, 10, experts=8)
        params["adjacency"] = jax.random.normal(jax.random.key(1), (8, 8))
        x = jax.random.normal(jax.random.key(2), (5, 64))
        logits, routing = _models.expert_graph(params, x, selected=3)
        gate = jnp.take_along_axis(routing.probs, routing.selected, axis=1)
        edges = model.picked_edges(params["adjacency"], routing.selected)
        weights = model.modulate(gate, edges)
        experts = params["moe"]["experts"]
        for sample in range(5):
            mixed = sum(
                weights[sample, k]
                * (jax.nn.gelu(x[sample] @ experts["w_in"][e]) @ experts["w_out"][e])
                for k, e in enumerate(routing.selected[sample])
            )
            expected = mixed @ params["readout"]["kernel"]
            np.testing.assert_allclose(logits[sample], expected, rtol=1e-3, atol=1e-4)


def test_a_run_that_diverges_is_counted_and_never_averaged():
    lost = _curves([np.nan, 1.0, 1.0, 1.0, np.inf, 0.5, 0.5, 0.5, 0.5, 1e30])
    found = _results.plain({"a": np.where(has_diverged(lost.held_out), np.nan, 1.0)})
    assert found["a"] == [None, 1.0, 1.0, 1.0, None, 1.0, 1.0, 1.0, 1.0, None]
    from meta_optax.compare._run import ArmResult

    whole = _curves([1.0] * 10)
    both = [
        ArmResult([Configuration(0.1, 0.1)], Configuration(0.1, 0.1), {}, {"photo": curves})
        for curves in (lost, whole)
    ]
    runs = [_results.runs_of(result) for result in both]
    table = _results._compare(dict(zip(("plateau", BASELINE), runs, strict=True)), (0, 4))
    entry = table["arms"]["plateau"]
    assert entry["diverged"] == {"count": 3, "total": 4, "by_task": {"photo": 3}}
    assert entry["ratio_to_baseline"]["value"] == np.inf
    assert _results.plain(entry)["ratio_to_baseline"]["value"] is None
