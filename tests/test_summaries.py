"""How many numbers a log keeps of an array, under which names."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from meta_optax._summaries import summarise, summarise_layers


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
