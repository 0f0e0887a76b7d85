"""Steps to a target and performance profiles, on arrays."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from meta_optax.compare._profiles import (
    Steps,
    performance_profile,
    profile_score,
    steps_to_target,
)

INF = np.inf
STEPS = [10, 20, 40]


def _steps(values, tasks=None):
    values = np.asarray(values, float)
    return Steps(tasks=tuple(tasks or [f"task{i}" for i in range(len(values))]), steps=values)


def _arms(**rows):
    """Arms of one task and one rate."""
    return {name: _steps(np.array(row, float)[None, :, None]) for name, row in rows.items()}


@st.composite
def _races(draw):
    """Three arms, some of whose runs miss the target."""
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3)))
    values = st.sampled_from([0.0, 10.0, 20.0, 30.0, 70.0, 1000.0, INF])
    return [draw(hnp.arrays(float, shape, elements=values)) for _ in range(3)]


class TestStepsToTarget:
    def test_first_evaluation_at_or_below_its_tasks_target(self):
        losses = [
            [[[3.0, 2.0, 1.0], [1.9, 5.0, 5.0]]],
            [[[0.6, np.nan, 0.5], [0.9, 0.8, 0.7]]],
        ]
        found = steps_to_target(
            ["a", "b"],
            losses,
            np.zeros((2, 1, 2), bool),
            targets={"b": 0.5, "a": 2.0, "unused": 0.0},
            steps=STEPS,
        )
        assert found.tasks == ("a", "b")
        assert found.steps.tolist() == [[[20.0, 10.0]], [[40.0, INF]]]

    def test_diverged_run_is_a_miss_though_it_came_by(self):
        losses = [[[[1.0, 9.0, np.nan]], [[1.0, 9.0, 9.0]]]]
        diverged = [[[True], [False]]]
        found = steps_to_target(["a"], losses, diverged, targets={"a": 2.0}, steps=STEPS)
        assert found.steps.tolist() == [[[INF], [10.0]]]

    @hypothesis.given(
        hnp.arrays(float, (2, 3, 1, 3), elements=st.floats(0, 5)), st.floats(0, 5), st.floats(0, 5)
    )
    def test_harder_target_is_never_reached_sooner(self, losses, one, other):
        found = [
            steps_to_target(
                ["a", "b"],
                losses,
                np.zeros((2, 3, 1), bool),
                targets={"a": target, "b": target},
                steps=STEPS,
            ).steps
            for target in sorted([one, other])
        ]
        assert (found[0] >= found[1]).all()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"targets": {}}, r"not so for \['a'\]"),
            ({"targets": {"a": np.nan}}, r"not so for \['a'\]"),
            ({"steps": [10, 40, 20]}, r"steps must rise, got \[10.0, 40.0, 20.0\]"),
            ({"steps": [10, 20]}, r"got \(1, 2, 1, 3\), \(1, 2, 1\) and \(2,\)"),
            ({"diverged": np.zeros((1, 3, 1), bool)}, r"\(1, 3, 1\) and \(3,\)"),
            ({"tasks": ["a", "b"]}, "with 2 tasks"),
        ],
    )
    def test_bad_input_is_refused(self, changes, message):
        given = {
            "tasks": ["a"],
            "losses_by_step": np.ones((1, 2, 1, 3)),
            "diverged": np.zeros((1, 2, 1), bool),
            "targets": {"a": 1.0},
            "steps": STEPS,
        }
        with pytest.raises(ValueError, match=message):
            steps_to_target(**(given | changes))


class TestProfile:
    arms = _arms(fast=[10, 20, 40, INF], slow=[20, 10, 41, INF])

    def test_hand_computed(self):
        found = performance_profile(self.arms, [1.0, 1.024, 1.025, 2.0, 1e9, INF])
        assert found["fast"].tolist() == [0.5, 0.5, 0.5, 0.75, 0.75, 0.75]
        assert found["slow"].tolist() == [0.25, 0.25, 0.5, 0.75, 0.75, 0.75]

    def test_score_is_the_area_by_hand(self):
        found = profile_score(self.arms)
        assert found["fast"] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
        assert found["slow"] == pytest.approx((2 / 3 + 1 + 2.975 / 3 + 0) / 4)
        tight = profile_score(self.arms, largest_ratio=1.5)
        assert tight["fast"] == pytest.approx(2 / 4)

    def test_target_reached_before_training_is_reached(self):
        found = performance_profile(_arms(one=[0, 0], other=[0, 10]), [1.0, 100.0])
        assert found["one"].tolist() == [1.0, 1.0]
        assert found["other"].tolist() == [0.5, 0.5]

    def test_arm_is_judged_on_the_tasks_it_ran(self):
        arms = {
            "all": _steps([[[10.0]], [[10.0]]], ["digits", "moe"]),
            "gates": _steps([[[5.0]]], ["moe"]),
        }
        found = performance_profile(arms, [1.0, 2.0])
        assert found["all"].tolist() == [0.5, 1.0]
        assert found["gates"].tolist() == [1.0, 1.0]

    def test_nobody_reaches_the_target(self):
        arms = _arms(one=[INF], other=[INF])
        assert performance_profile(arms, [1.0, INF])["one"].tolist() == [0.0, 0.0]
        assert profile_score(arms) == {"one": 0.0, "other": 0.0}

    def test_bad_input_is_refused(self):
        for ratios in ([1.0, 0.5], [np.nan]):
            with pytest.raises(ValueError, match="ratios must each be at least 1"):
                performance_profile(self.arms, ratios)
        for largest in (1.0, INF, np.nan):
            with pytest.raises(ValueError, match="finite and above 1"):
                profile_score(self.arms, largest_ratio=largest)
        with pytest.raises(ValueError, match=r"same seeds and rates, got \[\(1, 1\), \(2, 1\)\]"):
            profile_score(_arms(one=[1, 2], other=[1]))

    @hypothesis.given(_races())
    def test_rises_to_the_share_of_runs_that_reached_the_target(self, race):
        arms = {str(i): _steps(steps) for i, steps in enumerate(race)}
        ratios = [1.0, 1.5, 2.0, 3.0, 7.0, INF]
        found = performance_profile(arms, ratios)
        for name, steps in zip(arms, race, strict=True):
            assert (np.diff(found[name]) >= 0).all()
            expected = np.isfinite(steps) & ((steps == 0) | (np.min(race, axis=0) > 0))
            assert found[name][-1] == expected.mean()
        best = sum(found[name][0] for name in arms)
        assert best >= np.isfinite(race).any(axis=0).mean() - 1e-12

    @hypothesis.given(_races())
    def test_score_is_the_integral_of_the_profile(self, race):
        arms = {str(i): _steps(steps) for i, steps in enumerate(race)}
        middles = 1 + 3 * (np.arange(3000) + 0.5) / 3000
        profiles = performance_profile(arms, middles.tolist())
        for name, score in profile_score(arms).items():
            assert score == pytest.approx(profiles[name].mean(), abs=1e-3)
