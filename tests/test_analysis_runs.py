"""The picture of routers, and runs side by side."""

import builtins
import importlib.util
import sys

import jax
import numpy as np
import pytest
from figure_artists import assert_apart, lines_of_axes, texts_of_legend
from hypothesis import given
from hypothesis import strategies as st
from log_files import make_log, make_writer
from routing import routing
from scipy import stats

import meta_optax as mo
from meta_optax import analysis

pytest.importorskip("matplotlib")

# Titles of panels, and what each draws.
PANELS = {
    "Gate entropy, nats": {"gate_entropy"},
    "Entropies over their maximum, and sparsity": {
        "gate_entropy_normalized",
        "load_entropy_normalized",
        "gate_sparsity",
    },
    "Unevenness of the load": {"max_violation", "load_cv"},
    "Shares of experts dead, of slots dropped": {"dead_experts", "drop_fraction"},
}


def _log_routing(folder, experts, layers=3, **options):
    """Logs the metrics of three random batches, and returns them."""
    logged = []
    with make_writer(folder, **options) as writer:
        for step in range(3):
            probs, index, mask, dropped = routing(step, layers, 40, experts, 2)
            logged.append(mo.router_metrics(probs, index, mask=mask, dropped=dropped))
            writer.write(10 * step, logged[-1])
    return jax.device_get(logged)


class TestPlotRouting:
    def test_all_that_router_metrics_says(self, tmp_path):
        logged = _log_routing(tmp_path, experts=5)
        figure = analysis.plot_routing(tmp_path, tmp_path / "routing.svg")
        assert (tmp_path / "routing.svg").read_text().startswith("<?xml")
        panels = {axes.get_title(): axes for axes in figure.axes}
        for title, names in PANELS.items():
            lines = lines_of_axes(panels[title])
            assert set(lines) == names
            for name, line in lines.items():
                assert line.get_xdata().tolist() == [0, 10, 20]
                np.testing.assert_allclose(line.get_ydata(), [row[name] for row in logged])
        (mesh,) = panels["Expert usage"].collections
        usage = np.stack([row["expert_usage"] for row in logged])
        np.testing.assert_allclose(np.reshape(mesh.get_array(), (5, 3)), usage.T)
        assert panels["Expert usage"].yaxis_inverted()
        assert_apart(figure)

    def test_bands_reach_over_the_layers(self, tmp_path):
        logged = _log_routing(tmp_path, experts=5)
        figure = analysis.plot_routing(tmp_path)
        (band,) = figure.axes[0].collections
        heights = band.get_paths()[0].vertices[:, 1]
        layers = np.stack([row["gate_entropy_per_layer"] for row in logged])
        np.testing.assert_allclose([heights.min(), heights.max()], [layers.min(), layers.max()])

    def test_more_experts_and_layers_than_have_keys(self, tmp_path):
        logged = _log_routing(tmp_path, experts=5, max_layers=2)
        figure = analysis.plot_routing(tmp_path)
        axes = figure.axes[-1]
        assert axes.get_title() == "Expert usage"
        np.testing.assert_allclose(axes.lines[0].get_ydata(), 1 / 5, rtol=1e-6)
        heights = axes.collections[0].get_paths()[0].vertices[:, 1]
        usage = np.stack([row["expert_usage"] for row in logged])
        np.testing.assert_allclose([heights.min(), heights.max()], [usage.min(), usage.max()])
        assert figure.axes[0].collections  # the band of three layers, by their extents
        assert_apart(figure)

    @pytest.mark.parametrize("title", PANELS)
    def test_whatever_is_there(self, title):
        for name in PANELS[title]:
            (axes,) = analysis.plot_routing(make_log(**{name: [0.5, 0.25]})).axes
            assert axes.get_title() == title
            assert set(lines_of_axes(axes)) == {name}

    @pytest.mark.parametrize("experts", [1, 16, 17, 64])
    def test_no_more_than_sixteen_experts_are_named(self, experts):
        usage = np.full((3, experts), 1 / experts)
        figure = analysis.plot_routing(make_log(expert_usage=usage))
        ticks = figure.axes[0].get_yticks()
        assert 1 <= len(ticks) <= 16
        assert set(ticks) <= set(range(experts))

    def test_usage_by_layer_is_averaged(self):
        usage = [[[0.0, 1.0], [0.5, 0.5]]]
        figure = analysis.plot_routing(make_log(expert_usage=usage, steps=[7]))
        (mesh,) = figure.axes[0].collections
        np.testing.assert_allclose(np.ravel(mesh.get_array()), [0.25, 0.75])

    def test_what_is_logged_in_part_is_no_reason_to_fail(self):
        log = make_log(expert_usage=[0.5, 0.25], gate_entropy__mean=[1.0, 1.0])
        (axes,) = analysis.plot_routing(log).axes
        assert axes.lines[0].get_ydata().tolist() == [0.5, 0.25]

    def test_nan_is_left_blank(self):
        usage = [[0.5, 0.5], [np.nan, np.nan]]
        figure = analysis.plot_routing(make_log(expert_usage=usage, max_violation=[np.nan, 1.0]))
        (mesh,) = figure.axes[1].collections
        np.testing.assert_array_equal(
            np.ma.getmaskarray(mesh.get_array()).reshape(2, 2), [[False, True], [False, True]]
        )
        assert figure.axes[0].lines[0].get_xdata().tolist() == [1]
        all_nan = make_log(expert_usage=[[np.nan, np.nan]])
        assert analysis.plot_routing(all_nan).axes[0].collections[0].get_array().mask.all()

    def test_nothing_of_routing(self):
        with pytest.raises(ValueError, match=r"nothing of routing.*gate_entropy.*expert_usage"):
            analysis.plot_routing(make_log(loss=[1.0]))


class TestSummaries:
    def test_by_hand(self):
        decision = mo.Decision(3, "learning_rate", 1.0, 0.5, "plateau: patience")
        fixed = make_log(loss=[8] * 20 + [3.0, 4.0, 6.0], steps=range(0, 230, 10))
        ours = make_log(loss=[8, 1, np.nan, 2.6], decisions=[decision])
        one, two = analysis.compare_runs({"fixed": fixed, "ours": ours}).runs
        # The last tenth of 23 rows is three, of four rows one.
        assert one == ("fixed", 1, 13 / 3, None, 1.0, 3.0, 200, 0, 0, 0, None)
        assert two == ("ours", 1, 2.6, None, 2.6 / (13 / 3), 1.0, 1, 1, 1, 0, None)

    def test_seeds_are_one_run(self):
        losses = ([5.0, 1.0], [3.0, 2.0], [4.0, 6.0], [1.0, 9.0])
        seeds = [make_log(loss=loss) for loss in losses]
        (run,) = analysis.compare_runs({"ours": seeds}).runs
        assert run[:3] == ("ours", 4, 4.0)
        assert (run.best, run.best_step) == (3.5, 0)
        # Widened for four seeds, as the intervals of the comparison are.
        expected = stats.bootstrap(
            ([1.0, 2.0, 6.0, 9.0],),
            np.median,
            confidence_level=1 - 2 * stats.norm.cdf((4 / 3) ** 0.5 * stats.t.ppf(0.025, 3)),
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        assert run.interval == pytest.approx((expected.low, expected.high))
        assert run.interval[0] < 4.0 < run.interval[1]

    @pytest.mark.parametrize(("seeds", "there"), [(1, False), (2, False), (3, True)])
    def test_an_interval_needs_three_seeds(self, seeds, there):
        logs = [make_log(loss=[1.0, 1.0 + seed]) for seed in range(seeds)]
        comparison = analysis.compare_runs({"ours": logs})
        assert (comparison.runs[0].interval is not None) == there
        assert ("No interval: fewer than 3 seeds" in str(comparison)) != there

    def test_seeds_that_broke_are_counted_and_not_averaged(self):
        broken = make_log(loss=[1.0, np.nan, np.inf])
        seeds = [make_log(loss=[3.0, 2.0, 2.0]), broken, make_log(loss=[3.0, 2.0, 4.0])]
        fixed, ours = analysis.compare_runs({"broken": broken, "ours": seeds}).runs
        assert (ours.final, ours.nonfinite, ours.lost, ours.interval) == (3.0, 2, 1, None)
        assert np.isnan(fixed.final)
        assert np.isnan(ours.ratio)
        assert (fixed.best, fixed.best_step, fixed.lost) == (1.0, 0, 1)

    def test_only_rows_that_have_the_metric_count(self, tmp_path):
        now_and_then = {0: 4.0, 50: None, 60: 2.0, 90: 3.0}
        for name, every in (("sparse", 1), ("plain", 10)):
            with make_writer(tmp_path / name) as writer:
                for step in range(0, 100, every):
                    entry = {"validation": now_and_then[step]} if step in now_and_then else {}
                    if entry.get("validation", 0) is None:
                        entry = {"validation": np.nan}
                    writer.write(step, {"loss": 1.0, **entry})
        logs = {name: tmp_path / name for name in ("sparse", "plain")}
        runs = analysis.compare_runs(logs, "validation", target=3.0).runs
        for run in runs:
            assert run[1:] == (1, 3.0, None, 1.0, 2.0, 60, 0, 1, 0, 60)
        (run,) = analysis.compare_runs({"both": list(logs.values())}, "validation").runs
        assert (run.final, run.nonfinite, run.lost) == (3.0, 2, 0)

    @pytest.mark.parametrize(
        ("mode", "target", "step"),
        [("min", 2.0, 2), ("min", 5.0, 0), ("min", 1.0, None), ("max", 4.5, 3), ("max", 6.0, None)],
    )
    def test_the_first_step_at_a_target(self, mode, target, step):
        seeds = [make_log(loss=[4, np.nan, 2, 5]), make_log(loss=[4, np.nan, 2, 4])]
        comparison = analysis.compare_runs({"a": seeds}, mode=mode, target=target)
        assert comparison.runs[0].target_step == step
        heading, row, _ = str(comparison).splitlines()[:3]
        assert heading.endswith(f"to {target:g}")
        assert row.endswith("-" if step is None else str(step))

    def test_nothing_finite(self):
        comparison = analysis.compare_runs({"a": make_log(loss=[np.nan])})
        assert comparison.runs[0].best_step is None
        assert np.isnan(comparison.runs[0].best)
        assert "nan" in str(comparison)

    def test_the_most_is_best_for_max(self):
        log = make_log(accuracy=[0.5, 0.9, 0.7])
        comparison = analysis.compare_runs({"a": log}, "accuracy", mode="max")
        assert (comparison.runs[0].best, comparison.runs[0].best_step) == (0.9, 1)

    def test_no_ratio_to_what_is_not_above_zero(self):
        runs = analysis.compare_runs({"a": make_log(loss=[-1.0]), "b": make_log(loss=[2.0])}).runs
        assert np.isnan([run.ratio for run in runs]).all()

    @given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40), st.floats(0.5, 2))
    def test_scaling_a_run_scales_its_ratio(self, losses, factor):
        runs = {"a": make_log(loss=losses), "b": make_log(loss=np.array(losses) * factor)}
        one, two = analysis.compare_runs(runs).runs
        assert two.ratio == pytest.approx(factor)
        assert two.best == pytest.approx(factor * one.best)
        assert min(losses) <= one.final <= max(losses)

    def test_logs_by_their_paths(self, tmp_path):
        for seed in range(2):
            with make_writer(tmp_path / str(seed)) as writer:
                writer.write(0, {"value": 1.0 + seed, "loss": 9.0})
        comparison = analysis.compare_runs({"a": [tmp_path / "0", str(tmp_path / "1")]})
        assert comparison.metric == "value"
        assert comparison.runs[0].final == 1.5

    def test_the_metric_is_one_that_all_have(self):
        logs = {"a": make_log(value=[1.0], loss=[2.0]), "b": make_log(loss=[3.0])}
        assert analysis.compare_runs(logs).metric == "loss"

    def test_the_table(self):
        decision = mo.Decision(1, "learning_rate", 1.0, 0.5, "plateau: patience")
        logs = {
            "fixed rate": make_log(loss=[2.0, 1.0]),
            "ours": [make_log(loss=[2.0, 0.5 + seed], decisions=[decision]) for seed in range(3)],
        }
        heading, one, two, rule = str(analysis.compare_runs(logs)).splitlines()
        assert (
            heading.split()
            == (
                "run seeds final 95 % interval ratio best at step decisions not finite lost seeds"
            ).split()
        )
        assert one.split() == "fixed rate 1 1 none 1.000 1 1 0 0 0".split()
        assert two.split() == "ours 3 1.5 [0.5, 2.5] 1.500 1.5 1 3 0 0".split()
        assert len(one) == len(two) == len(heading)
        assert rule.startswith("loss. final: mean over the last tenth of the rows")


class TestCurves:
    def test_median_and_middle_half(self, tmp_path):
        seeds = [make_log(loss=[10.0, 1.0 + seed]) for seed in range(5)]
        logs = {"fixed": make_log(loss=[10.0, 2.0]), "ours": seeds}
        figure = analysis.compare_runs(logs, path=tmp_path / "new" / "a.png").figure
        assert (tmp_path / "new" / "a.png").stat().st_size > 1000
        (axes,) = figure.axes
        assert axes.get_yscale() == "log"
        assert texts_of_legend(axes.get_legend()) == ["fixed", "ours (5 seeds)"]
        lines = lines_of_axes(axes)
        np.testing.assert_allclose(lines["ours (5 seeds)"].get_ydata(), [10, 3])
        assert lines["fixed"].get_color() != lines["ours (5 seeds)"].get_color()
        (band,) = axes.collections  # one seed has none
        heights = band.get_paths()[0].vertices
        assert set(heights[heights[:, 0] == 1][:, 1]) == {2.0, 4.0}
        assert_apart(figure)

    def test_seeds_share_the_steps_that_all_have(self):
        seeds = [make_log(loss=[4, 3, 2], steps=[0, 5, 10]), make_log(loss=[2, 0], steps=[0, 10])]
        figure = analysis.compare_runs({"a": seeds}).figure
        (line,) = figure.axes[0].lines
        assert line.get_xdata().tolist() == [0, 10]
        assert line.get_ydata().tolist() == [3, 1]

    def test_more_runs_than_colours_stay_apart(self):
        logs = {f"a long name of run {i}": make_log(loss=[2.0, 1.0 + i]) for i in range(18)}
        figure = analysis.compare_runs(logs).figure
        (axes,) = figure.axes
        looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
        assert len(looks) == 18
        assert_apart(figure)


class TestBadInput:
    @pytest.mark.parametrize(
        ("logs", "options", "message"),
        [
            ({}, {}, "needs a run"),
            ({"a": []}, {}, "run 'a' has no log"),
            ({"a": make_log(other=[1.0])}, {}, "no value and no loss .* but other"),
            ({"a": make_log(loss=[1.0])}, {"metric": "lost"}, "no lost .* but loss"),
            ({"a": make_log(loss=[[1.0, 2.0]])}, {}, "but nothing"),
            ({"a": make_log(loss=[1.0])}, {"target": np.nan}, "target must be finite, got nan"),
            (
                {
                    "a": make_log(loss=[1.0, 2.0], absent={"loss": [1]}, steps=[0, 1]),
                    "b": [make_log(loss=[1.0, 2.0], absent={"loss": [i]}) for i in (0, 1)],
                },
                {},
                "seeds of 'b' have loss at no step in common",
            ),
            ({"a": make_log(loss=[1.0])}, {"mode": "least"}, "mode must be 'min' or 'max'"),
            (
                {"a": [make_log(loss=[1.0]), make_log(loss=[1.0], steps=[5])]},
                {},
                "seeds of 'a' have loss at no step in common",
            ),
        ],
    )
    def test_is_told_what_is_wrong(self, logs, options, message):
        with pytest.raises(ValueError, match=message):
            analysis.compare_runs(logs, **options)

    def test_without_matplotlib(self, monkeypatch, tmp_path):
        find_spec, real_import = importlib.util.find_spec, builtins.__import__

        def refuse(name, *rest):
            if name.startswith("matplotlib"):
                raise ImportError(name)
            return real_import(name, *rest)

        for name in [name for name in sys.modules if name.startswith("matplotlib")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(builtins, "__import__", refuse)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: name != "matplotlib" and find_spec(name)
        )
        log = make_log(loss=[2.0, 1.0], learning_rate=[1.0, 1.0], gate_entropy=[1.0, 1.0])
        comparison = analysis.compare_runs({"a": log})
        assert comparison.figure is None
        assert comparison.runs[0].final == 1.0
        for draw in (
            analysis.plot_hyperparameters,
            analysis.plot_routing,
            lambda log: analysis.compare_runs({"a": log}, path=tmp_path / "a.png"),
        ):
            with pytest.raises(ImportError, match=r"meta-optax\[compare\]"):
                draw(log)
