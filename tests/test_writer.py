"""Rows of metrics, hyperparameters and decisions, and going on after a crash."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from log_files import events_of, lines_of, make_writer, scalars_of, texts_of
from table import STRATEGIES, injected, params, row

import meta_optax as mo
from meta_optax import _files

pytest.importorskip("tensorboardX")


def _logged(**kwargs):
    strategy = mo.with_decisions(mo.plateau(patience=1, **kwargs), capacity=4)
    return mo.inject_meta_hyperparams(optax.sgd, strategy)(learning_rate=0.5)


def _states(tx, losses):
    """The state after each loss."""
    p, states = params(), [tx.init(params())]
    for loss in losses:
        states.append(tx.update(p, states[-1], p, value=loss)[1])
    return states[1:]


class TestRows:
    def test_keys_of_a_mixture_of_48_layers_and_64_experts(self, tmp_path):
        probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), [48, 32, 64]))
        metrics = mo.router_metrics(probs, num_selected=2)
        strategy = mo.expert_gate(per_layer=True, num_layers=48)
        labels = {"gate": "gate", "experts": "expert"}
        p = {"gate": jnp.ones([48, 4, 64]), "experts": jnp.ones([48, 64, 4])}
        factory = mo.moe_partition(optax.sgd, labels, num_layers=48, layer_axis=0)
        tx = mo.inject_meta_hyperparams(factory, strategy)(learning_rate=0.5)
        state = tx.update(p, tx.init(p), p, value=1.0, **metrics)[1]
        assert len(mo.read_hyperparams(state)) > 48
        with make_writer(tmp_path) as writer:
            writer.write(0, metrics, state)
        (got,) = lines_of(tmp_path)
        arrays = {name for name, value in metrics.items() if np.ndim(value)}
        assert len(arrays) > 3
        for name in metrics:
            assert sum(key.startswith(f"{name}/") for key in got) == 3 * (name in arrays), name
        assert "hyperparams/gate_*_learning_rate/mean" in got
        assert not any("gate_0_" in key for key in got)
        assert len(got) <= 1 + 3 * (len(metrics) + 4) + 1

    def test_a_pair_is_written_where_it_arrived(self, tmp_path):
        with make_writer(tmp_path) as writer:
            writer.write(0, {"value": (jnp.float32(7.0), jnp.array(True)), "b": 1})
            writer.write(1, {"value": (jnp.float32(9.0), jnp.array(False)), "b": 1})
            with pytest.raises(ValueError, match=r"'value' is a pair whose flag is of type float"):
                writer.write(2, {"value": (1.0, 2.0)})
        assert lines_of(tmp_path) == [{"step": 0, "value": 7.0, "b": 1}, {"step": 1, "b": 1}]

    def test_what_two_logs_lost(self, tmp_path):
        """Each holds as many as it can; what is missing is counted over both."""

        def moving(name):
            def observe(state, metrics):
                return state + 1.0

            def apply(state, hyperparams):
                return {**hyperparams, name: hyperparams[name] / (1.0 + state)}

            return mo.MetaOptimizer(name, lambda: jnp.float32(0.0), observe, apply, ())

        strategy = mo.chain(
            mo.with_decisions(moving("learning_rate"), 2), mo.with_decisions(moving("b1"), 8)
        )
        tx = mo.inject_meta_hyperparams(optax.adam, strategy)(learning_rate=0.5)
        p = jnp.ones(2)
        state = tx.init(p)
        with make_writer(tmp_path) as writer:
            writer.write(0, {}, state)
            for _ in range(5):
                _, state = tx.update(p, state, p)
            writer.write(5, {}, state)
            _, state = tx.update(p, state, p)
            writer.write(6, {}, state)
        _, first, second = lines_of(tmp_path)
        # Five and five were made, two and five are held.
        assert (len(first["decisions"]), first["decisions_lost"]) == (7, 3)
        assert len(second["decisions"]) == 2
        assert "decisions_lost" not in second

    def test_both_files_say_the_same(self, tmp_path):
        tx = mo.skip_spikes(_logged())
        with make_writer(tmp_path, tensorboard=True) as writer:
            for step, state in enumerate(_states(tx, [2.0, 2.0, jnp.nan])):
                writer.write(step, {"loss": jnp.float32(step), "b": [1, jnp.int32(2)]}, state)
                # Everything is there already, before the files are closed.
                assert len(lines_of(tmp_path)) == step + 1
        lines = lines_of(tmp_path)
        assert lines[1] == {
            "step": 1,
            "loss": 1.0,
            "b/00": 1,
            "b/01": 2,
            "hyperparams/learning_rate": 0.25,
            "skipped_count": 0,
            "nonfinite_count": 0,
            "decisions": [
                {
                    "step": 1,
                    "hyperparam": "learning_rate",
                    "old": 0.5,
                    "new": 0.25,
                    "reason": "plateau: patience",
                }
            ],
        }
        assert [line["decisions"] for line in lines[::2]] == [[], []]
        assert (lines[2]["skipped_count"], lines[2]["nonfinite_count"]) == (1, 1)
        numbers = {
            (line["step"], key): value
            for line in lines
            for key, value in line.items()
            if key not in ("step", "decisions")
        }
        assert scalars_of(tmp_path) == pytest.approx(numbers)
        assert texts_of(tmp_path) == [
            (1, "- step 1: learning_rate 0.5 -> 0.25 (plateau: patience, value=2)")
        ]

    def test_what_json_does_not_have_is_null(self, tmp_path):
        with make_writer(tmp_path, tensorboard=True) as writer:
            writer.write(0, {"a": jnp.nan, "b": np.array([np.inf, 1.0]), "c": 1e300})
        assert lines_of(tmp_path) == [{"step": 0, "a": None, "b/00": None, "b/01": 1.0, "c": 1e300}]
        got = scalars_of(tmp_path)
        assert math.isnan(got[0, "a"])
        assert got[0, "c"] == math.inf

    @pytest.mark.parametrize("name", STRATEGIES)
    def test_counts_are_those_of_the_states(self, name, tmp_path):
        p = params()
        tx = injected(STRATEGIES[name])
        state = tx.init(p)
        for step in range(2):
            bad = {k: jnp.full_like(v, jnp.nan) for k, v in row(step).items()}
            state = tx.update(p, state, p, **bad)[1]
        with make_writer(tmp_path) as writer:
            writer.write(0, {}, state)
        assert lines_of(tmp_path)[0]["nonfinite_count"] == int(state.nonfinite_count) > 0

    def test_hidden_spikes_are_counted(self, tmp_path):
        tx = mo.inject_meta_hyperparams(optax.sgd, mo.hold_spikes(mo.plateau(), window=8))(0.5)
        state = _states(tx, [1.0 + 0.01 * (i % 3) for i in range(9)] + [100.0, jnp.nan])[-1]
        with make_writer(tmp_path) as writer:
            writer.write(0, {}, state)
        (got,) = lines_of(tmp_path)
        assert (got["spike_count"], got["nonfinite_count"]) == (1, int(state.nonfinite_count))

    def test_decisions_that_the_log_no_longer_held(self, tmp_path):
        states = _states(_logged(min_lr=0.0), [1.0] * 8)
        with make_writer(tmp_path, tensorboard=True) as writer:
            writer.write(1, {}, states[1])
            writer.write(7, {}, states[7])
        first, last = lines_of(tmp_path)
        assert "decisions_lost" not in first
        assert [d["step"] for d in last["decisions"]] == [4, 5, 6, 7]
        assert last["decisions_lost"] == 2
        assert "- 2 more that the log no longer held" in texts_of(tmp_path)[-1][1]

    def test_state_without_moments_tells_as_much(self, tmp_path):
        tx = mo.inject_meta_hyperparams(optax.adam, mo.with_decisions(mo.plateau(patience=1)))(0.5)
        state = _states(tx, [1.0, 1.0])[-1]
        for name, told in (("a", state), ("b", state._replace(inner_state=()))):
            with make_writer(tmp_path / name) as writer:
                writer.write(0, {}, told)
        assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")

    def test_two_things_of_one_key(self, tmp_path):
        state = _states(_logged(), [1.0])[-1]
        with make_writer(tmp_path) as writer:
            for metrics in (
                {"a": np.zeros(20), "a/min": 1.0},
                {"step": 1},
                {"decisions": 1},
                {"hyperparams/learning_rate": 1.0},
            ):
                with pytest.raises(ValueError, match="would stand twice"):
                    writer.write(0, metrics, state)
        assert lines_of(tmp_path) == []

    def test_state_with_nothing_to_tell(self, tmp_path):
        with make_writer(tmp_path) as writer:
            with pytest.raises(ValueError, match="leave opt_state out"):
                writer.write(0, {}, optax.adam(0.1).init(params()))
            writer.write(0, {}, mo.skip_spikes(optax.adam(0.1)).init(params()))
        assert lines_of(tmp_path) == [{"step": 0, "skipped_count": 0, "nonfinite_count": 0}]


class TestTransfer:
    def test_one_fetch_and_nothing_else_leaves_the_device(self, tmp_path, monkeypatch):
        p = params()
        tx = mo.skip_spikes(
            mo.inject_meta_hyperparams(
                optax.adam, mo.with_decisions(mo.chain(mo.plateau(patience=1), mo.plateau()))
            )(0.5)
        )
        state = _states(tx, [1.0, 1.0])[-1]
        calls = []
        fetch, array_type = jax.device_get, type(jnp.zeros([]))
        to_host = array_type._value

        def counted(tree):
            calls.append(len(jax.tree.leaves(tree)))
            monkeypatch.setattr(array_type, "_value", to_host)
            try:
                return fetch(tree)
            finally:
                monkeypatch.setattr(array_type, "_value", property(refuse))

        def refuse(array):
            raise AssertionError("a value leaves the device outside of device_get")

        metrics = {"loss": jnp.float32(1.0), "usage": jnp.ones([2, 4])}
        step = jnp.int32(3)
        jax.block_until_ready((state, metrics, step, p))
        with make_writer(tmp_path, tensorboard=True) as writer:
            monkeypatch.setattr(jax, "device_get", counted)
            monkeypatch.setattr(array_type, "_value", property(refuse))
            with pytest.raises(AssertionError, match="leaves the device"):
                float(metrics["loss"] + 0)
            writer.write(step, metrics, state)
            monkeypatch.undo()
        assert len(calls) == 1
        # Neither moments nor windows go along.
        assert calls[0] < 30
        assert lines_of(tmp_path)[0]["hyperparams/learning_rate"] == 0.25

    def test_arrays_over_eight_devices(self, tmp_path):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        along = jax.NamedSharding(mesh, jax.P("data"))
        everywhere = jax.NamedSharding(mesh, jax.P())
        x = jnp.arange(8.0)
        with make_writer(tmp_path) as writer:
            writer.write(0, {"a": jax.device_put(x, along), "b": jax.device_put(x[3], everywhere)})
        assert lines_of(tmp_path)[0] == {
            "step": 0,
            **{f"a/0{i}": float(i) for i in range(8)},
            "b": 3,
        }


class TestSteps:
    def test_not_greater_than_the_last(self, tmp_path):
        with make_writer(tmp_path) as writer:
            writer.write(7, {"a": 1.0})
            for step in (7, 3):
                with pytest.raises(ValueError, match=f"step {step} is not greater than 7"):
                    writer.write(step, {"a": 1.0})
            writer.write(np.int64(8), {"a": 1.0})
            writer.write(jnp.int32(9), {"a": 1.0})
        assert [line["step"] for line in lines_of(tmp_path)] == [7, 8, 9]

    @pytest.mark.parametrize("step", [1.0, "1", None, np.array([1, 2])])
    def test_no_integer(self, step, tmp_path):
        with make_writer(tmp_path) as writer, pytest.raises(ValueError, match="step must be"):
            writer.write(step, {})

    def test_before_the_first(self, tmp_path):
        with make_writer(tmp_path) as writer, pytest.raises(ValueError, match="before 0"):
            writer.write(-1, {})
        with make_writer(tmp_path, resume_step=5) as writer:
            with pytest.raises(ValueError, match="step 4 comes before 5"):
                writer.write(4, {})
            writer.write(5, {})


class TestResume:
    def test_goes_on_as_if_there_had_been_no_crash(self, tmp_path):
        states = _states(_logged(min_lr=0.0), [1.0] * 8)

        def run(folder, start, stop, **kwargs):
            with make_writer(folder, tensorboard=True, **kwargs) as writer:
                for step in range(start, stop, 2):
                    writer.write(step, {"loss": float(step)}, states[step])

        run(tmp_path / "whole", 0, 8)
        run(tmp_path / "cut", 0, 8)
        with open(tmp_path / "cut/metrics.jsonl", "a") as file:
            file.write('{"step": 8, "los')
        run(tmp_path / "cut", 4, 8, resume_step=4)
        text = (tmp_path / "whole/metrics.jsonl").read_bytes()
        assert (tmp_path / "cut/metrics.jsonl").read_bytes() == text
        assert text.count(b"\n") == 4
        starts = [
            (event.step, event.session_log.status)
            for event in events_of(tmp_path / "cut")
            if event.HasField("session_log")
        ]
        assert starts == [(4, 1)]
        assert not (tmp_path / "cut/metrics.jsonl.tmp").exists()

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            ("", []),
            ('{"step": 1}', [1]),
            ('{"step": 1}\n{"step": 2}\n{"ste', [1, 2]),
            ('{"step": 1}\n\0\0\0\0', [1]),
            ('{"step": 9}\n{"step": 1}\n', [1]),
            ('{"step": 7}\n', []),
        ],
    )
    def test_what_is_kept(self, text, kept, tmp_path):
        (tmp_path / "metrics.jsonl").write_text(text)
        with make_writer(tmp_path, resume_step=7) as writer:
            writer.write(7, {})
        assert [line["step"] for line in lines_of(tmp_path)] == [*kept, 7]

    @pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "1"}', "7"])
    def test_a_file_of_something_else_is_left_alone(self, line, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"metrics.jsonl has something else.*line 2"):
            make_writer(tmp_path, resume_step=7)
        assert path.read_bytes() == before

    def test_killed_in_between(self, tmp_path, monkeypatch):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"step": 8}\n')
        before = path.read_bytes()

        def kill(*args):
            raise KeyboardInterrupt

        for name in ("replace", "fsync"):
            with monkeypatch.context() as patch:
                patch.setattr(_files.os, name, kill)
                with pytest.raises(KeyboardInterrupt):
                    make_writer(tmp_path, resume_step=7)
            assert path.read_bytes() == before
        make_writer(tmp_path, resume_step=7).close()
        assert path.read_bytes() == b'{"step": 1}\n'

    def test_a_log_is_never_overwritten(self, tmp_path):
        with make_writer(tmp_path, tensorboard=True) as writer:
            writer.write(0, {"a": 1.0})
        files = sorted(tmp_path.iterdir())
        with pytest.raises(FileExistsError, match=r"metrics.jsonl has a log.*resume_step"):
            make_writer(tmp_path, tensorboard=True)
        assert sorted(tmp_path.iterdir()) == files
        assert len(lines_of(tmp_path)) == 1
