"""Logs of real runs, read, drawn and compared; pictures are checked through their artists."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from figure_artists import assert_apart, by_label, lines_of_axes, marks_of_axes, texts_of_legend
from log_files import make_log, make_writer

import meta_optax as mo
from meta_optax import analysis

pytest.importorskip("matplotlib")
tiny_moe = pytest.importorskip("tiny_moe", exc_type=ImportError)

STEPS = 60


def _write_run(folder, seed, **options):
    """A small mixture trained under four strategies, logged every five steps."""
    strategies = (
        mo.advanced_plateau(warmup_steps=10, patience=5),
        mo.smart_expert_gate(gate_lr_factor=0.5),
        mo.adapt_aux_loss(),
    )
    strategy = mo.with_decisions(mo.chain(*strategies), capacity=256)
    arm = tiny_moe.Arm(strategy, gate_learning_rate=3e-2, aux_loss_weight=0.01)
    result = tiny_moe.train(arm, jnp.array([seed]), STEPS)
    history = jax.device_get(jax.tree.map(lambda x: x[0], result.history))
    state = jax.tree.map(lambda x: x[0], result.opt_state)
    with make_writer(folder, **options) as writer:
        for step in range(0, STEPS, 5):
            # A state's hyperparameters as they were then, under the names that a state has.
            row = {
                name if name in ("value", *ROUTING) else f"hyperparams/{name}": values[step]
                for name, values in history.items()
            }
            writer.write(step, row)
        writer.write(STEPS, {"value": history["value"][-1]}, state)
    return history, mo.read_decisions(state)


ROUTING = (
    "gate_entropy",
    "gate_entropy_normalized",
    "gate_sparsity",
    "expert_usage",
    "load_entropy_normalized",
    "max_violation",
    "load_cv",
    "dead_experts",
    "drop_fraction",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a log, the history it was made of, and the decisions of the run."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, *_write_run(folder, 0)


def _write(path, *rows):
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return path


class TestLoadLog:
    def test_all_that_the_writer_wrote_comes_back(self, trained):
        folder, history, decisions = trained
        log = analysis.load_log(folder)
        assert log.path == folder / "metrics.jsonl"
        np.testing.assert_array_equal(log.steps, range(0, STEPS + 1, 5))
        for name in ("value", *ROUTING):
            np.testing.assert_allclose(log.values[name][:-1], history[name][::5], err_msg=name)
        assert log.values["expert_usage"].shape == (len(log.steps), tiny_moe.EXPERTS)
        assert np.isnan(log.values["expert_usage"][-1]).all()  # The last row has none.
        assert log.decisions == decisions
        assert len(decisions) > 20

    def test_a_file_is_as_good_as_its_folder(self, trained):
        whole, file = (
            analysis.load_log(trained[0]),
            analysis.load_log(trained[0] / "metrics.jsonl"),
        )
        np.testing.assert_array_equal(whole.values["value"], file.values["value"])
        assert whole.path == file.path

    def test_more_layers_than_have_keys_are_extents(self, tmp_path):
        with make_writer(tmp_path, max_layers=2) as writer:
            writer.write(0, {"few": [[1.0, 3.0], [5.0, 9.0]], "many": [1.0, 2.0, 6.0]})
        values = analysis.load_log(tmp_path).values
        assert {name: one.tolist() for name, one in values.items()} == {
            "many/min": [1.0],
            "many/mean": [3.0],
            "many/max": [6.0],
            "few/min": [[1.0, 5.0]],
            "few/mean": [[2.0, 7.0]],
            "few/max": [[3.0, 9.0]],
        }

    def test_null_and_what_a_row_lacks_are_nan(self, tmp_path):
        rows = ({"step": 0, "a": 1, "b": [1, None]}, {"step": 1, "a": None}, {"step": 2, "c": True})
        log = analysis.load_log(_write(tmp_path / "x.jsonl", *rows))
        values = log.values
        assert {key: steps.tolist() for key, steps in log.absent.items()} == {
            "a": [2],
            "b": [1, 2],
            "c": [0, 1],
        }
        np.testing.assert_array_equal(values["a"], [1, np.nan, np.nan])
        np.testing.assert_array_equal(values["b"], [[1, np.nan], [np.nan] * 2, [np.nan] * 2])
        np.testing.assert_array_equal(values["c"], [np.nan, np.nan, 1])

    def test_texts_and_objects_are_left_out(self, tmp_path):
        row = {"step": 0, "host": "a", "config": {"b": 1}, "loss": 2}
        assert set(analysis.load_log(_write(tmp_path / "x.jsonl", row)).values) == {"loss"}

    def test_numbers_with_a_gap_are_no_vector(self, tmp_path):
        row = {"step": 0, "a/00": 1, "a/02": 2, "b": 1, "b/00": 3}
        values = analysis.load_log(_write(tmp_path / "x.jsonl", row)).values
        assert set(values) == set(row) - {"step"}

    def test_a_part_that_was_run_again_replaces_the_first_try(self, tmp_path):
        cut = {"hyperparam": "learning_rate", "old": 2, "new": None, "reason": "plateau: patience"}
        rows = [{"step": step, "loss": step} for step in (0, 10, 20, 30)]
        rows[1]["decisions"] = [{"step": 4, **cut}]
        rows[2]["decisions"] = [{"step": 15, **cut}]
        again = [
            {"step": 15, "loss": -1, "decisions": [{"step": 4, **cut}]},
            {"step": 25, "loss": -2},
        ]
        log = analysis.load_log(_write(tmp_path / "x.jsonl", *rows, *again))
        assert log.steps.tolist() == [0, 10, 15, 25]
        assert log.values["loss"].tolist() == [0, 10, -1, -2]
        (decision,) = log.decisions
        assert decision[:3] == (4, "learning_rate", 2.0)
        assert math.isnan(decision.new)

    def test_a_run_that_the_writer_went_on_with(self, tmp_path):
        tx = mo.inject_meta_hyperparams(
            optax.sgd, mo.with_decisions(mo.plateau(patience=1), capacity=32)
        )(learning_rate=0.5)
        p = {"w": jnp.ones(2)}
        states, update = [tx.init(p)], jax.jit(tx.update)
        for _ in range(8):
            states.append(update(p, states[-1], p, value=1.0)[1])
        with make_writer(tmp_path) as writer:
            for step in range(6):
                writer.write(step, {"loss": 1.0}, states[step + 1])
        with make_writer(tmp_path, resume_step=4) as writer:
            for step in range(4, 8):
                writer.write(step, {"loss": 2.0}, states[step + 1])
        log = analysis.load_log(tmp_path)
        assert log.values["loss"].tolist() == [1.0] * 4 + [2.0] * 4
        assert log.decisions == mo.read_decisions(states[-1])
        assert len(log.decisions) > 4

    def test_one_row(self, tmp_path):
        log = analysis.load_log(_write(tmp_path / "x.jsonl", {"step": 7, "loss": 1.5}))
        assert (log.steps.tolist(), log.values["loss"].tolist(), log.decisions) == ([7], [1.5], [])

    @pytest.mark.parametrize("end", ['{"step": 1, "lo', '{"step": 1}\0\0', "\0\0\0", '{"\xff'])
    def test_a_last_line_that_is_cut_off_is_dropped(self, tmp_path, end):
        path = tmp_path / "x.jsonl"
        path.write_bytes(b'{"step": 0, "loss": 1}\n\n' + end.encode("latin1"))
        with pytest.warns(UserWarning, match=r"x\.jsonl, line 3, is cut off"):
            log = analysis.load_log(path)
        assert log.steps.tolist() == [0]


class TestBadLogs:
    @pytest.mark.parametrize("name", ["none.jsonl", "folder"])
    def test_nothing_there(self, tmp_path, name):
        (tmp_path / "folder").mkdir()
        with pytest.raises(FileNotFoundError, match=name):
            analysis.load_log(tmp_path / name)

    def test_two_logs_in_a_folder(self, tmp_path):
        for name in ("metrics.jsonl", "log.jsonl"):
            _write(tmp_path / name, {"step": 0})
        with pytest.raises(ValueError, match=r"both metrics\.jsonl and log\.jsonl"):
            analysis.load_log(tmp_path)

    @pytest.mark.parametrize("text", ["", "\n\n"])
    def test_an_empty_file(self, tmp_path, text):
        path = tmp_path / "x.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.jsonl has no row"):
            analysis.load_log(path)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (['{"step": 0', {"step": 1}], "line 1, is no JSON"),
            ([{"step": 0}, [1], {"step": 1}], "line 2, is no row of a log"),
            ([{"step": 0}, {"loss": 1}], "line 2, is no row of a log"),
            ([{"step": 0}, {"step": 1.5}], "line 2, is no row of a log"),
            ([{"step": True}], "line 1, is no row of a log"),
            ([{"step": 0, "a": 1}, {"step": 1, "a": [1]}], r"line 2: 'a' has shape \(1,\)"),
            ([{"step": 0, "a": [1, [2]]}], "line 1: 'a' must be a number or an array"),
            (
                [{"step": 0}, {"step": 1, "a": 10**400}],
                "line 2: 'a' must be .* none larger than a float",
            ),
            ([{"step": 10**20}], "a step that is no 64-bit integer"),
            ([{"step": 0, "decisions": [{"step": 0}]}], "a decision must have step, hyperparam"),
            ([{"step": 0, "decisions": 3}], "a decision must have .* got 3"),
        ],
    )
    def test_a_row_that_is_none(self, tmp_path, rows, message):
        with pytest.raises(ValueError, match=message) as error:
            analysis.load_log(_write(tmp_path / "x.jsonl", *rows))
        assert "x.jsonl" in str(error.value)

    @pytest.mark.parametrize("text", ["[1]", "{"])
    def test_a_broken_summary(self, tmp_path, text):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(ValueError, match=r"summary\.json is no JSON object"):
            analysis.load_log(_write(tmp_path / "log.jsonl", {"step": 0}))


class TestPlotHyperparameters:
    def test_a_real_run(self, trained, tmp_path):
        log = analysis.load_log(trained[0])
        figure = analysis.plot_hyperparameters(log, tmp_path / "new" / "a.png")
        assert (tmp_path / "new" / "a.png").stat().st_size > 1000
        panels = by_label(figure)
        assert list(panels) == ["value", "learning rate", "weight decay", "aux loss weight"]
        rates = panels["learning rate"]
        assert rates.get_yscale() == "log"
        assert set(lines_of_axes(rates)) == {
            "learning_rate", "gate_learning_rate", "expert_learning_rate"
        }  # fmt: skip
        line = lines_of_axes(rates)["gate_learning_rate"]
        np.testing.assert_array_equal(line.get_xdata(), log.steps)
        np.testing.assert_array_equal(
            line.get_ydata(), log.values["hyperparams/gate_learning_rate"]
        )
        assert "b1=0.9" in figure.axes[-1].get_xlabel()

    def test_each_decision_is_marked_and_counted(self, trained):
        log = analysis.load_log(trained[0])
        figure = analysis.plot_hyperparameters(log)
        marked = [
            (step, value)
            for axes in figure.axes
            for line in marks_of_axes(axes)
            for step, value in zip(line.get_xdata(), line.get_ydata(), strict=True)
        ]
        assert sorted(marked) == sorted((d.step, d.new) for d in log.decisions)
        reasons = {d.reason for d in log.decisions}
        assert len(reasons) > 1
        assert set(texts_of_legend(figure.legends[0])) == {
            f"{reason} ({sum(d.reason == reason for d in log.decisions)})" for reason in reasons
        }

    def test_no_text_lies_on_another(self, trained):
        assert_apart(analysis.plot_hyperparameters(trained[0]))

    def test_layers_are_a_mean_in_a_band(self):
        by_layer = {f"hyperparams__gate_{i}_learning_rate": [0.1 * (i + 1)] * 3 for i in range(3)}
        decision = mo.Decision(1, "gate_1_learning_rate", 0.3, 0.2, "expert_gate: entropy")
        whole = {f"hyperparams__{form}learning_rate": [1, 1, 1] for form in ("", "gate_")}
        log = make_log(decisions=[decision], **whole, **by_layer)
        (axes,) = analysis.plot_hyperparameters(log).axes
        names = {"learning_rate", "gate_learning_rate", "gate_*_learning_rate"}
        assert set(lines_of_axes(axes)) == names
        np.testing.assert_allclose(lines_of_axes(axes)["gate_*_learning_rate"].get_ydata(), 0.2)
        looks = {(line.get_color(), line.get_linestyle()) for line in lines_of_axes(axes).values()}
        assert len(looks) == 3
        (band,) = axes.collections
        heights = band.get_paths()[0].vertices[:, 1]
        np.testing.assert_allclose([heights.min(), heights.max()], [0.1, 0.3])
        (mark,) = marks_of_axes(axes)
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (1, 0.2)

    def test_extents_of_many_layers(self):
        name = "hyperparams__gate_*_learning_rate"
        parts = {f"{name}__min": [1, 1], f"{name}__mean": [2, 2], f"{name}__max": [4, 4]}
        (axes,) = analysis.plot_hyperparameters(make_log(**parts)).axes
        assert lines_of_axes(axes)["gate_*_learning_rate"].get_ydata().tolist() == [2, 2]
        assert axes.collections[0].get_paths()[0].vertices[:, 1].max() == 4

    def test_what_was_decided_is_shown_though_it_was_not_logged(self):
        decision = mo.Decision(1, "momentum", 0.9, 0.8, "own: rule")
        (_, axes) = analysis.plot_hyperparameters(make_log(loss=[2, 1], decisions=[decision])).axes
        assert axes.get_ylabel() == "momentum"
        assert marks_of_axes(axes)[0].get_ydata()[0] == 0.8

    def test_many_reasons_are_named_in_part(self):
        decisions = [mo.Decision(i, "learning_rate", 1.0, 2.0, f"rule {i:02d}") for i in range(20)]
        figure = analysis.plot_hyperparameters(make_log(learning_rate=[1, 2], decisions=decisions))
        texts = texts_of_legend(figure.legends[0])
        assert len(texts) == 13
        assert texts[-1] == "8 other reasons (8)"
        assert_apart(figure)

    def test_what_never_changed_is_told_though_not_in_each_row(self):
        log = make_log(hyperparams__b1=[np.nan, 0.9], hyperparams__learning_rate=[1, 2])
        assert "unchanged: b1=0.9" in analysis.plot_hyperparameters(log).axes[-1].get_xlabel()

    def test_nan_rows_are_counted(self):
        figure = analysis.plot_hyperparameters(
            make_log(loss=[9, np.nan, np.inf, 1], learning_rate=[1, 1, np.nan, 0])
        )
        (line,) = lines_of_axes(figure.axes[0]).values()
        assert line.get_label() == "loss (not finite in 2 rows)"
        assert line.get_xdata().tolist() == [0, 3]

    def test_one_row_is_a_point(self):
        figure = analysis.plot_hyperparameters(make_log(loss=[2], learning_rate=[0.1]))
        for axes in figure.axes:
            assert [line.get_marker() for line in axes.lines] == ["o"]

    @pytest.mark.parametrize("values", [{"learning_rate": [0, 0]}, {"b1": [0.9, 0.9]}])
    def test_values_that_no_logarithm_has_or_that_never_change(self, values):
        log = make_log(**{f"hyperparams__{name}": one for name, one in values.items()})
        (axes,) = analysis.plot_hyperparameters(log).axes
        assert axes.get_yscale() == "linear"
        assert len(axes.lines) == 1

    def test_a_loss_that_is_no_number_a_row_is_left_out(self):
        log = make_log(value=[[1, 2]], loss=[3], smoothed_loss=[[1, 2]], learning_rate=[1])
        assert list(by_label(analysis.plot_hyperparameters(log))) == ["loss", "learning rate"]

    def test_a_log_without_hyperparameters(self):
        with pytest.raises(ValueError, match=r"run.log\.jsonl has no hyperparameters"):
            analysis.plot_hyperparameters(make_log(loss=[1.0]))
