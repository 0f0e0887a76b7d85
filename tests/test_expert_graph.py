"""The expert graph: its equations on small cases, its groups, and the example as a user runs it."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from as_run import assert_picture, interrupt_example, read_log, read_summary, run_example
from figure_artists import assert_apart, by_label, lines_of_axes

import meta_optax as mo
from meta_optax import analysis

nnx = pytest.importorskip("flax.nnx", exc_type=Exception)
pytest.importorskip("sklearn")
model = pytest.importorskip("expert_graph_model", exc_type=ImportError)
digits = pytest.importorskip("digits", exc_type=ImportError)

EXAMPLE = "expert_graph.py"
SMALL = model.GraphConfig(features=6, classes=4, experts=5, selected=3, hidden=7, width=8)


def _build(config, seed=0):
    """A model whose graph has edges, on the diagonal as well."""
    built = model.ExpertGraph(config, nnx.Rngs(seed))
    shape = (config.experts, config.experts)
    built.adjacency[...] = 2.0 * jax.random.normal(jax.random.key(seed + 1), shape)
    return built


def _samples(config, count=9, seed=3):
    return jax.random.normal(jax.random.key(seed), (count, config.features))


def _gelu(x):
    return np.asarray(jax.nn.gelu(jnp.asarray(x)))


def _softmax(x):
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def _one_sample(built, x):
    """Weights and logits by the module docstring's equations, one sample and edge at a time."""
    config, experts = built.config, built.experts
    adjacency = np.asarray(built.adjacency[...])
    probs = _softmax(x @ np.asarray(built.router.kernel[...]))
    picked = np.argsort(-probs)[: config.selected]
    w_in, b_in, w_out, b_out = (
        np.asarray(p[...]) for p in (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
    )
    said = {i: _gelu(x @ w_in[i] + b_in[i]) @ w_out[i] + b_out[i] for i in picked}
    weights, told = [], []
    for i in picked:
        others = [j for j in picked if j != i]
        influence = np.mean([adjacency[j, i] for j in others]) if others else 0.0
        weights.append(probs[i] / (1.0 + np.exp(-influence)))
        told.append(said[i])
        if config.messages and others:
            shares = _softmax(np.array([adjacency[j, i] for j in others]))
            heard = sum(share * said[j] for share, j in zip(shares, others, strict=True))
            told[-1] = said[i] + _gelu(heard)
    weights = np.array(weights) / np.sum(weights)
    mixed = sum(weight * row for weight, row in zip(weights, told, strict=True))
    readout = experts.readout
    return weights, mixed @ np.asarray(readout.kernel[...]) + np.asarray(readout.bias[...])


class TestEquations:
    @pytest.mark.parametrize("messages", [False, True])
    @pytest.mark.parametrize("selected", [1, 2, 3, 5])
    def test_equals_a_loop_over_samples_and_edges(self, messages, selected):
        built = _build(SMALL._replace(messages=messages, selected=selected))
        samples = _samples(SMALL)
        output = built(samples)
        for row, x in enumerate(np.asarray(samples)):
            weights, logits = _one_sample(built, x)
            np.testing.assert_allclose(output.weights[row], weights, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(output.logits[row], logits, rtol=1e-4, atol=1e-5)

    def test_weights_by_hand(self):
        gate = jnp.array([[0.5, 0.25]])
        edges = jnp.array([[[9.0, np.log(3.0)], [0.0, -9.0]]])  # from the first to the second
        # Influences 0 and log 3 have the sigmoids 1/2 and 3/4; the diagonal has no say.
        np.testing.assert_allclose(
            model.modulate(gate, edges), [[0.25 / 0.4375, 0.1875 / 0.4375]], rtol=1e-6
        )

    def test_weights_sum_to_one_and_are_the_routers_own_without_edges(self):
        built = _build(SMALL)
        samples = _samples(SMALL, count=50)
        np.testing.assert_allclose(built(samples).weights.sum(axis=1), 1.0, rtol=1e-5)
        built.adjacency[...] = jnp.zeros((SMALL.experts, SMALL.experts))
        output = built(samples)
        gate = jnp.take_along_axis(output.routing.probs, output.routing.selected, axis=1)
        np.testing.assert_allclose(
            output.weights, gate / gate.sum(axis=1, keepdims=True), rtol=1e-5
        )

    @pytest.mark.parametrize("edge", [-3.0, 3.0])
    def test_an_edge_moves_the_weight_of_the_expert_it_points_to(self, edge):
        gate = jnp.full((1, 3), 0.3)
        edges = jnp.zeros((1, 3, 3)).at[0, 0, 2].set(edge)
        weights = model.modulate(gate, edges)[0]
        assert float(weights[0]) == pytest.approx(float(weights[1]))
        assert (float(weights[2]) > float(weights[0])) == (edge > 0)

    @pytest.mark.parametrize("messages", [False, True])
    def test_the_diagonal_is_never_read(self, messages):
        built = _build(SMALL._replace(messages=messages))
        samples = _samples(SMALL)
        before = built(samples).logits
        built.adjacency[...] = built.adjacency[...] + 50.0 * jnp.eye(SMALL.experts)
        np.testing.assert_array_equal(built(samples).logits, before)

    @pytest.mark.parametrize("messages", [False, True])
    def test_the_experts_numbering_does_not_matter(self, messages):
        built = _build(SMALL._replace(messages=messages))
        samples = _samples(SMALL)
        before = built(samples)
        order = jnp.array([3, 0, 4, 1, 2])
        for name in ("w_in", "b_in", "w_out", "b_out"):
            param = getattr(built.experts, name)
            param[...] = param[...][order]
        built.router.kernel[...] = built.router.kernel[...][:, order]
        built.adjacency[...] = built.adjacency[...][order][:, order]
        after = built(samples)
        np.testing.assert_array_equal(order[after.routing.selected], before.routing.selected)
        np.testing.assert_allclose(after.logits, before.logits, rtol=1e-4, atol=1e-5)

    def test_a_samples_output_hangs_on_no_other_sample(self):
        built = _build(SMALL._replace(messages=True))
        samples = _samples(SMALL)
        np.testing.assert_allclose(
            built(samples[4:6]).logits, built(samples).logits[4:6], rtol=1e-4, atol=1e-6
        )

    def test_one_sender_is_heard_whole(self):
        outputs = jnp.array([[[1.0, -2.0], [3.0, 0.5]]])
        edges = 7.0 * jnp.ones((1, 2, 2))
        told = model.exchange(outputs, edges)
        np.testing.assert_allclose(told, outputs + jax.nn.gelu(outputs[:, ::-1]), rtol=1e-6)


class TestLosses:
    def test_sparsity_by_hand(self):
        adjacency = jnp.array([[9.0, -1.0], [3.0, 9.0]])
        assert float(model.sparsity_loss(adjacency)) == 2.0

    def test_diversity_by_hand(self):
        same, apart, slanted = [[1.0, 0.0], [-2.0, 0.0]], [[1.0, 0.0], [0.0, 3.0]], [[1, 0], [1, 1]]
        outputs = jnp.array([same, apart, slanted], jnp.float32)
        for row, squared_cosine in zip(outputs, (1.0, 0.0, 0.5), strict=True):
            assert float(model.diversity_loss(row[None])) == pytest.approx(squared_cosine, abs=1e-6)
        assert float(model.diversity_loss(outputs)) == pytest.approx(0.5)

    def test_diversity_of_outputs_of_zeros_has_a_finite_gradient(self):
        grad = jax.grad(model.diversity_loss)(jnp.zeros((2, 3, 4)))
        assert np.isfinite(grad).all()


class TestGroups:
    def test_the_graph_is_alone_in_the_plain_group(self):
        params = nnx.split(model.ExpertGraph(SMALL, nnx.Rngs(0)), nnx.Param)[1]
        labels = jax.tree.leaves(mo.label_moe_params(params))
        shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
        members = {
            group: [s for s, label in zip(shapes, labels, strict=True) if label == group]
            for group in ("gate", "expert", "dense")
        }
        assert members["gate"] == [(6, 5)]
        assert members["dense"] == [(5, 5)]
        assert len(members["expert"]) == 4 + 2

    def test_the_plain_rate_is_the_graphs_own(self):
        params = nnx.split(_build(SMALL), nnx.Param)[1]
        tx = mo.moe_partition(optax.sgd, mo.label_moe_params)(
            1.0, gate_learning_rate=0.0, expert_learning_rate=0
        )
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        moved = [leaf.shape for leaf in jax.tree.leaves(updates) if np.any(leaf)]
        assert moved == [(5, 5)]

    def test_every_part_learns_except_the_diagonal(self):
        graphdef, params = nnx.split(_build(SMALL._replace(messages=True)), nnx.Param)

        def loss(params):
            logits = nnx.merge(graphdef, params)(_samples(SMALL, count=64)).logits
            return optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, jnp.arange(64) % SMALL.classes
            ).mean()

        grads = jax.grad(loss)(params)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
        (graph,) = (leaf for leaf in jax.tree.leaves(grads) if leaf.shape == (5, 5))
        np.testing.assert_array_equal(np.diag(graph), 0.0)
        assert np.count_nonzero(graph) == 20


class TestDigits:
    def test_split_is_fixed_and_shares_no_image(self):
        one, other = digits.load_split(0.2), digits.load_split(0.2)
        np.testing.assert_array_equal(one.test["pixels"], other.test["pixels"])
        sizes = [len(part["digit"]) for part in one]
        assert sizes == [1438, 359]
        train, test = ({row.tobytes() for row in part["pixels"]} for part in one)
        assert not train & test
        assert set(one.test["digit"].tolist()) == set(range(10))
        assert one.train["pixels"].dtype == np.float32
        assert (one.train["pixels"].min(), one.train["pixels"].max()) == (0.0, 1.0)

    def test_a_pass_shows_each_image_once_and_the_seed_decides_the_order(self):
        train = digits.load_split(0.2).train
        batches = digits.TrainingBatches(train, 64, seed=5)
        again = digits.TrainingBatches(train, 64, seed=5)
        rows = [next(batches)["pixels"] for _ in range(22)]
        assert len({row.tobytes() for row in np.concatenate(rows)}) == 22 * 64
        np.testing.assert_array_equal(rows[0], next(again)["pixels"])
        assert not np.array_equal(rows[0], next(batches)["pixels"])


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("expert_graph")
    return out, run_example(EXAMPLE, "--steps", 120, "--seed", 1, "--out", out, "--plain")


class TestShortRun:
    def test_ends_well_and_says_what_it_found(self, short_run):
        _, run = short_run
        assert run.returncode == 0, run.stderr
        assert "Traceback" not in run.stderr
        for said in ("120 steps, ", "told right", "Which expert serves which digit"):
            assert said in run.stdout
        assert "advanced_plateau: warm-up" in run.stdout
        assert "smart_expert_gate: " in run.stdout

    def test_log_and_rates_of_the_groups(self, short_run):
        log = read_log(short_run[0])
        assert [record["step"] for record in log] == [*range(0, 120, 10), 119]
        for record in log:
            assert sum(record["expert_usage"]) == pytest.approx(1.0, abs=1e-4)
            assert 0.0 <= record["gate_entropy"] <= np.log(8) + 1e-4
            assert 0.0 <= record["test_accuracy"] <= 1.0
        rates = {log[-1][f"{form}learning_rate"] for form in ("", "gate_", "expert_")}
        assert len(rates) == 3
        assert log[-1]["loss"] < 0.5 * log[0]["loss"]
        assert log[-1]["test_accuracy"] > 0.85

    def test_analysis_reads_and_draws_it(self, short_run):
        out, rows = short_run[0], read_log(short_run[0])
        log = analysis.load_log(out)
        assert log.path == out / "log.jsonl"
        assert log.steps.tolist() == [row["step"] for row in rows]
        assert set(log.values) == set(rows[0]) - {"step"}
        for name, values in log.values.items():
            np.testing.assert_array_equal(values, [row[name] for row in rows])
        told = [decision._asdict() for decision in log.decisions]
        assert told == read_summary(out)["decisions"]
        hyperparams = analysis.plot_hyperparameters(log)
        assert list(by_label(hyperparams)) == ["loss", "learning rate", "weight decay"]
        assert set(lines_of_axes(hyperparams.axes[0])) == {"loss", "smoothed_loss"}
        assert "aux_loss_weight=0.03" in hyperparams.axes[-1].get_xlabel()
        routing = analysis.plot_routing(log)
        assert "Expert usage" in [axes.get_title() for axes in routing.axes]
        assert_apart(hyperparams)
        assert_apart(routing)

    def test_summary_and_picture(self, short_run):
        out, _ = short_run
        summary = read_summary(out)
        assert summary["steps"] == 120
        assert summary["messages"] is False
        assert summary["test_accuracy"] == pytest.approx(read_log(out)[-1]["test_accuracy"])
        adjacency = np.array(summary["adjacency"])
        assert adjacency.shape == (8, 8)
        assert np.count_nonzero(adjacency) > 0
        np.testing.assert_array_equal(np.diag(adjacency), 0.0)
        np.testing.assert_allclose(np.sum(summary["digit_usage"], axis=-1), 1.0, rtol=1e-4)
        assert summary["decisions"]
        assert "scikit-learn" in summary["versions"]
        assert_picture(out / "expert_graph.png")

    def test_the_same_seed_gives_the_same_run(self, short_run, tmp_path):
        run_example(EXAMPLE, "--steps", 21, "--seed", 1, "--out", tmp_path, "--plain")
        for one, other in zip(read_log(short_run[0]), read_log(tmp_path), strict=False):
            assert one["step"] == other["step"]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)

    def test_messages_make_another_run(self, short_run, tmp_path):
        run = run_example(
            EXAMPLE, "--steps", 21, "--seed", 1, "--messages", "--out", tmp_path, "--plain"
        )
        assert run.returncode == 0, run.stderr
        assert read_summary(tmp_path)["messages"] is True
        assert read_log(tmp_path)[2]["loss"] != pytest.approx(
            read_log(short_run[0])[2]["loss"], rel=1e-3
        )


def test_interrupt_ends_cleanly_with_everything_written(tmp_path):
    interrupt_example(EXAMPLE, tmp_path)
    summary = read_summary(tmp_path)
    assert summary["steps"] == read_log(tmp_path)[-1]["step"] + 1 < summary["steps_asked_for"]
    assert_picture(tmp_path / "expert_graph.png")


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--message"], "--message"), (["--steps", "0"], "--steps"), (["--out", __file__], "--out")],
)
def test_bad_input_ends_with_one_clear_line(options, named):
    run = run_example(EXAMPLE, *options)
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1
    assert named in run.stderr
    assert "Traceback" not in run.stderr + run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("variant", [[], ["--messages"]])
def test_full_length(variant, seed, tmp_path):
    """At the defaults: under a minute and a half, and nearly all test images told right."""
    start = time.monotonic()
    run = run_example(EXAMPLE, "--seed", seed, *variant, "--out", tmp_path, "--plain")
    assert run.returncode == 0, run.stderr
    assert time.monotonic() - start < 90
    assert read_summary(tmp_path)["test_accuracy"] >= 0.96
