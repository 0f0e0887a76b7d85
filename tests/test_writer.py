"""Files of metrics, hyperparameters and decisions, and what they are read back as."""

import json
import math
import pathlib
import resource
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import STRATEGIES, injected, params, row

import meta_optax as mo
from meta_optax import _files
from meta_optax._summaries import summarise, summarise_layers

tensorboardX = pytest.importorskip("tensorboardX")


def _lines(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (pathlib.Path(folder) / "metrics.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _events(folder):
    """The events of all files, each record checked against its sums."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    events = []
    for path in sorted(pathlib.Path(folder).glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,), (crc,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
            body, (body_crc,) = data[12 : 12 + size], struct.unpack("<I", data[12 + size :][:4])
            assert (crc, body_crc) == (masked_crc32c(data[:8]), masked_crc32c(body))
            events.append(event_pb2.Event.FromString(body))
            data = data[16 + size :]
    return events


def _scalars(folder):
    return {
        (event.step, value.tag): value.simple_value
        for event in _events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    }


def _texts(folder):
    return [
        (event.step, value.tensor.string_val[0].decode())
        for event in _events(folder)
        for value in event.summary.value
        if value.tag == "decisions/text_summary"
    ]


def _writer(folder, **kwargs):
    return mo.MetricsWriter(folder, **{"tensorboard": False, **kwargs})


def _logged(**kwargs):
    strategy = mo.with_decisions(mo.plateau(patience=1, **kwargs), capacity=4)
    return mo.inject_meta_hyperparams(optax.sgd, strategy)(learning_rate=0.5)


def _states(tx, losses):
    """The state after each loss."""
    p, states = params(), [tx.init(params())]
    for loss in losses:
        states.append(tx.update(p, states[-1], p, value=loss)[1])
    return states[1:]


class TestSummaries:
    def test_short_vector_has_a_key_an_entry(self):
        assert summarise("x", np.array([1.0, 2.0]), 2) == {"x/00": 1.0, "x/01": 2.0}
        assert summarise("x", np.arange(3), 2) == {"x/min": 0, "x/mean": 1.0, "x/max": 2}

    def test_matrix_has_three_keys_a_row_or_three_in_all(self):
        matrix = np.array([[1.0, 3.0], [5.0, 9.0]])
        assert summarise("x", matrix, 2) == {
            "x/00/min": 1.0,
            "x/00/mean": 2.0,
            "x/00/max": 3.0,
            "x/01/min": 5.0,
            "x/01/mean": 7.0,
            "x/01/max": 9.0,
        }
        assert summarise("x", matrix, 1) == {"x/min": 1.0, "x/mean": 4.5, "x/max": 9.0}
        assert summarise("x", matrix[None], 1) == {
            "x/00/min": 1.0,
            "x/00/mean": 4.5,
            "x/00/max": 9.0,
        }

    def test_keys_sort_as_layers_do(self):
        keys = list(summarise("x", np.zeros(200), 200))
        assert keys == sorted(keys)
        assert keys[7] == "x/007"

    @pytest.mark.parametrize(
        ("value", "number"),
        [
            (np.float16(0.5), 0.5),
            (jnp.bfloat16(0.5), 0.5),
            (np.True_, 1),
            (np.int32(7), 7),
            (3, 3),
            (np.uint8(255), 255),
        ],
    )
    def test_numbers_of_any_dtype(self, value, number):
        (got,) = summarise("x", value, 16).values()
        assert got == number
        assert type(got) is type(number)

    def test_int8_means_do_not_wrap(self):
        assert summarise("x", np.full(40, 100, np.int8), 16)["x/mean"] == 100.0

    @pytest.mark.parametrize("bad", ["text", None, {"a": 1}, 1j, object()])
    def test_what_is_no_number_is_named(self, bad):
        with pytest.raises(ValueError, match="metric 'x' must be"):
            summarise("x", bad, 16)

    def test_empty_is_named(self):
        with pytest.raises(ValueError, match=r"'x' is empty, with shape \(0, 3\)"):
            summarise("x", np.zeros([0, 3]), 16)

    def test_nan_stays_to_be_seen(self):
        got = summarise("x", np.array([1.0, np.nan, np.inf, -np.inf]), 3)
        assert all(math.isnan(value) for value in got.values())
        got = summarise("x", np.array([np.inf, -np.inf]), 1)
        assert got["x/min"] == -math.inf
        assert math.isnan(got["x/mean"])

    def test_layers_of_hyperparameters(self):
        layers = {f"gate_{i}_learning_rate": float(i) for i in range(3)}
        plain = {"learning_rate": 0.5, "gate_weight_decay": 0.25}
        assert summarise_layers(plain | layers, 3) == plain | layers
        assert summarise_layers(plain | layers, 2) == plain | {
            "gate_*_learning_rate/min": 0.0,
            "gate_*_learning_rate/mean": 1.0,
            "gate_*_learning_rate/max": 2.0,
        }

    @pytest.mark.parametrize("layers", [1, 16, 17, 48])
    @pytest.mark.parametrize("experts", [1, 64, 1024])
    def test_a_metric_has_no_more_keys_than_said(self, layers, experts):
        assert len(summarise("x", np.zeros([layers, experts]), 16)) <= 48


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
        with _writer(tmp_path) as writer:
            writer.write(0, metrics, state)
        (got,) = _lines(tmp_path)
        arrays = {name for name, value in metrics.items() if np.ndim(value)}
        assert len(arrays) > 3
        for name in metrics:
            assert sum(key.startswith(f"{name}/") for key in got) == 3 * (name in arrays), name
        assert "hyperparams/gate_*_learning_rate/mean" in got
        assert not any("gate_0_" in key for key in got)
        assert len(got) <= 1 + 3 * (len(metrics) + 4) + 1

    def test_both_files_say_the_same(self, tmp_path):
        tx = mo.skip_spikes(_logged())
        with _writer(tmp_path, tensorboard=True) as writer:
            for step, state in enumerate(_states(tx, [2.0, 2.0, jnp.nan])):
                writer.write(step, {"loss": jnp.float32(step), "b": [1, jnp.int32(2)]}, state)
                # Everything is there already, before the files are closed.
                assert len(_lines(tmp_path)) == step + 1
        lines = _lines(tmp_path)
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
        assert _scalars(tmp_path) == pytest.approx(numbers)
        assert _texts(tmp_path) == [
            (1, "- step 1: learning_rate 0.5 -> 0.25 (plateau: patience, value=2)")
        ]

    def test_what_json_does_not_have_is_null(self, tmp_path):
        with _writer(tmp_path, tensorboard=True) as writer:
            writer.write(0, {"a": jnp.nan, "b": np.array([np.inf, 1.0]), "c": 1e300})
        assert _lines(tmp_path) == [{"step": 0, "a": None, "b/00": None, "b/01": 1.0, "c": 1e300}]
        got = _scalars(tmp_path)
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
        with _writer(tmp_path) as writer:
            writer.write(0, {}, state)
        assert _lines(tmp_path)[0]["nonfinite_count"] == int(state.nonfinite_count) > 0

    def test_hidden_spikes_are_counted(self, tmp_path):
        tx = mo.inject_meta_hyperparams(optax.sgd, mo.hold_spikes(mo.plateau(), window=8))(0.5)
        state = _states(tx, [1.0 + 0.01 * (i % 3) for i in range(9)] + [100.0, jnp.nan])[-1]
        with _writer(tmp_path) as writer:
            writer.write(0, {}, state)
        (got,) = _lines(tmp_path)
        assert (got["spike_count"], got["nonfinite_count"]) == (1, int(state.nonfinite_count))

    def test_decisions_that_the_log_no_longer_held(self, tmp_path):
        states = _states(_logged(min_lr=0.0), [1.0] * 8)
        with _writer(tmp_path, tensorboard=True) as writer:
            writer.write(1, {}, states[1])
            writer.write(7, {}, states[7])
        first, last = _lines(tmp_path)
        assert "decisions_lost" not in first
        assert [d["step"] for d in last["decisions"]] == [4, 5, 6, 7]
        assert last["decisions_lost"] == 2
        assert "- 2 more that the log no longer held" in _texts(tmp_path)[-1][1]

    def test_state_without_moments_tells_as_much(self, tmp_path):
        tx = mo.inject_meta_hyperparams(optax.adam, mo.with_decisions(mo.plateau(patience=1)))(0.5)
        state = _states(tx, [1.0, 1.0])[-1]
        for name, told in (("a", state), ("b", state._replace(inner_state=()))):
            with _writer(tmp_path / name) as writer:
                writer.write(0, {}, told)
        assert _lines(tmp_path / "a") == _lines(tmp_path / "b")

    def test_two_things_of_one_key(self, tmp_path):
        state = _states(_logged(), [1.0])[-1]
        with _writer(tmp_path) as writer:
            for metrics in (
                {"a": np.zeros(20), "a/min": 1.0},
                {"step": 1},
                {"decisions": 1},
                {"hyperparams/learning_rate": 1.0},
            ):
                with pytest.raises(ValueError, match="would stand twice"):
                    writer.write(0, metrics, state)
        assert _lines(tmp_path) == []

    def test_state_with_nothing_to_tell(self, tmp_path):
        with _writer(tmp_path) as writer:
            with pytest.raises(ValueError, match="leave opt_state out"):
                writer.write(0, {}, optax.adam(0.1).init(params()))
            writer.write(0, {}, mo.skip_spikes(optax.adam(0.1)).init(params()))
        assert _lines(tmp_path) == [{"step": 0, "skipped_count": 0, "nonfinite_count": 0}]


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
        with _writer(tmp_path, tensorboard=True) as writer:
            monkeypatch.setattr(jax, "device_get", counted)
            monkeypatch.setattr(array_type, "_value", property(refuse))
            with pytest.raises(AssertionError, match="leaves the device"):
                float(metrics["loss"] + 0)
            writer.write(step, metrics, state)
            monkeypatch.undo()
        assert len(calls) == 1
        # Neither moments nor windows go along.
        assert calls[0] < 30
        assert _lines(tmp_path)[0]["hyperparams/learning_rate"] == 0.25

    def test_arrays_over_eight_devices(self, tmp_path):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        along = jax.NamedSharding(mesh, jax.P("data"))
        everywhere = jax.NamedSharding(mesh, jax.P())
        x = jnp.arange(8.0)
        with _writer(tmp_path) as writer:
            writer.write(0, {"a": jax.device_put(x, along), "b": jax.device_put(x[3], everywhere)})
        assert _lines(tmp_path)[0] == {"step": 0, **{f"a/0{i}": float(i) for i in range(8)}, "b": 3}


class TestSteps:
    def test_not_greater_than_the_last(self, tmp_path):
        with _writer(tmp_path) as writer:
            writer.write(7, {"a": 1.0})
            for step in (7, 3):
                with pytest.raises(ValueError, match=f"step {step} is not greater than 7"):
                    writer.write(step, {"a": 1.0})
            writer.write(np.int64(8), {"a": 1.0})
            writer.write(jnp.int32(9), {"a": 1.0})
        assert [line["step"] for line in _lines(tmp_path)] == [7, 8, 9]

    @pytest.mark.parametrize("step", [1.0, "1", None, np.array([1, 2])])
    def test_no_integer(self, step, tmp_path):
        with _writer(tmp_path) as writer, pytest.raises(ValueError, match="step must be"):
            writer.write(step, {})

    def test_before_the_first(self, tmp_path):
        with _writer(tmp_path) as writer, pytest.raises(ValueError, match="before 0"):
            writer.write(-1, {})
        with _writer(tmp_path, resume_step=5) as writer:
            with pytest.raises(ValueError, match="step 4 comes before 5"):
                writer.write(4, {})
            writer.write(5, {})


class TestResume:
    def test_goes_on_as_if_there_had_been_no_crash(self, tmp_path):
        states = _states(_logged(min_lr=0.0), [1.0] * 8)

        def run(folder, start, stop, **kwargs):
            with _writer(folder, tensorboard=True, **kwargs) as writer:
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
            for event in _events(tmp_path / "cut")
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
        with _writer(tmp_path, resume_step=7) as writer:
            writer.write(7, {})
        assert [line["step"] for line in _lines(tmp_path)] == [*kept, 7]

    @pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "1"}', "7"])
    def test_a_file_of_something_else_is_left_alone(self, line, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"metrics.jsonl has something else.*line 2"):
            _writer(tmp_path, resume_step=7)
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
                    _writer(tmp_path, resume_step=7)
            assert path.read_bytes() == before
        _writer(tmp_path, resume_step=7).close()
        assert path.read_bytes() == b'{"step": 1}\n'

    def test_a_log_is_never_overwritten(self, tmp_path):
        with _writer(tmp_path, tensorboard=True) as writer:
            writer.write(0, {"a": 1.0})
        files = sorted(tmp_path.iterdir())
        with pytest.raises(FileExistsError, match=r"metrics.jsonl has a log.*resume_step"):
            _writer(tmp_path, tensorboard=True)
        assert sorted(tmp_path.iterdir()) == files
        assert len(_lines(tmp_path)) == 1


class TestFiles:
    def test_nothing_to_write(self, tmp_path):
        with pytest.raises(ValueError, match="nothing to write"):
            _writer(tmp_path, json_lines=False)

    @pytest.mark.parametrize(
        ("name", "value"), [("max_layers", 0), ("max_layers", 1.5), ("resume_step", -1)]
    )
    def test_arguments_out_of_range(self, name, value, tmp_path):
        with pytest.raises(ValueError, match=name):
            _writer(tmp_path / "new", **{name: value})
        assert not (tmp_path / "new").exists()

    def test_cloud_paths_are_refused(self):
        with pytest.raises(ValueError, match="gs://bucket/run"):
            _writer("gs://bucket/run")

    def test_without_tensorboardx(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
        with pytest.raises(ImportError, match=r'pip install "meta-optax\[logging\]"'):
            mo.MetricsWriter(tmp_path / "new")
        assert not (tmp_path / "new").exists()
        with _writer(tmp_path / "new") as writer:
            writer.write(0, {"a": 1.0})
        assert len(_lines(tmp_path / "new")) == 1

    def test_closed(self, tmp_path):
        writer = _writer(tmp_path, tensorboard=True)
        writer.close()
        writer.close()
        with pytest.raises(ValueError, match="closed"):
            writer.write(0, {})

    @pytest.mark.parametrize("tensorboard", [False, True])
    def test_a_file_in_the_folders_place(self, tensorboard, tmp_path):
        (tmp_path / "run").write_text("mine")
        with pytest.raises(FileExistsError, match="run"):
            _writer(tmp_path / "run", tensorboard=tensorboard, json_lines=not tensorboard)
        assert (tmp_path / "run").read_text() == "mine"

    @pytest.mark.parametrize("tensorboard", [False, True])
    def test_a_folder_that_cannot_be_written(self, tensorboard):
        # Even root makes no file there.
        if not pathlib.Path("/proc/self").exists():
            pytest.skip("needs Linux")
        with pytest.raises(OSError, match="/proc/self"):
            _writer("/proc/self/run", tensorboard=tensorboard, json_lines=not tensorboard)

    @pytest.mark.parametrize("tensorboard", [False, True])
    def test_full_disk(self, tensorboard, tmp_path):
        """A line that does not fit leaves nothing, and can be written once there is room."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with _writer(tmp_path, tensorboard=tensorboard, json_lines=not tensorboard) as writer:
            writer.write(0, {"a": 1.0})
            (path,) = tmp_path.iterdir()
            before = path.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (before + 10, limits[1]))
            try:
                with pytest.raises(OSError, match=path.name):
                    writer.write(1, {"a": 2.0})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            if not tensorboard:
                assert path.stat().st_size == before
            writer.write(1, {"a": 2.0})
        if tensorboard:
            assert _scalars(tmp_path) == {(0, "a"): 1.0, (1, "a"): 2.0}
        else:
            assert [line["step"] for line in _lines(tmp_path)] == [0, 1]
