"""Thresholds as shares of log E, and specialisation for any number of experts."""

import jax.numpy as jnp
import numpy as np
import pytest

import meta_optax as mo


@pytest.mark.parametrize("experts", [2, 8, 64, 256])
def test_entropy_threshold_is_a_share_of_log_e(experts):
    strategy = mo.expert_gate(normalized_entropy=True, entropy_threshold=0.5)
    for share, scale in ((0.49, 0.05), (0.51, 0.1)):
        metrics = {"step": 0, "gate_entropy_normalized": share}
        state = strategy.observe(strategy.init(), metrics)
        used = strategy.apply(state, {"learning_rate": 1.0})
        assert float(used["gate_learning_rate"]) == pytest.approx(scale)
    with pytest.raises(
        ValueError, match=r"entropy_threshold must be a number in \[0, 1\], got 1.5"
    ):
        mo.expert_gate(normalized_entropy=True, entropy_threshold=1.5)


def _bonus(strategy, experts, probs):
    """The experts' rate after two looks at the routing."""
    state = strategy.init()
    for step in range(2):
        state = strategy.observe(state, {"step": step, **mo.router_metrics(probs)})
    return float(strategy.apply(state, {"learning_rate": 1.0})["expert_learning_rate"])


def _routing(kind, experts):
    even = np.eye(experts, dtype=np.float32)
    return {
        "specialised": even,
        "collapsed": np.repeat(even[:1], experts, axis=0),
        "undecided": 0.001 * even + 0.999 / experts,
    }[kind]


@pytest.mark.parametrize("experts", [2, 4, 8, 9, 64, 256])
def test_specialisation_is_told_from_collapse_and_indecision(experts):
    strategy = mo.smart_expert_gate(normalized_entropy=True)
    bonus = {
        k: _bonus(strategy, experts, _routing(k, experts))
        for k in ("specialised", "collapsed", "undecided")
    }
    assert bonus == pytest.approx({"specialised": 1.2, "collapsed": 1.0, "undecided": 1.0})


@pytest.mark.parametrize("experts", [4, 8, 9, 64])
def test_the_recorded_rule_takes_collapse_for_specialisation_and_ends_at_eight_experts(experts):
    recorded = mo.smart_expert_gate()
    assert _bonus(recorded, experts, _routing("specialised", experts)) == pytest.approx(1.0)
    collapsed = _bonus(recorded, experts, _routing("collapsed", experts))
    assert collapsed == pytest.approx(1.2 if experts <= 8 else 1.0)


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_usage_of_another_length_is_held_and_counted(per_layer):
    arguments = {"per_layer": True, "num_layers": 2} if per_layer else {}
    strategy = mo.smart_expert_gate(**arguments)

    def row(experts):
        metrics = {
            "gate_entropy": 0.1,
            "gate_sparsity": 0.7,
            "expert_usage": [1 / experts] * experts,
        }
        if per_layer:
            metrics = {f"{k}_per_layer": jnp.array([v, v]) for k, v in metrics.items()}
        return {"step": 0, **{k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}}

    state = strategy.observe(strategy.init(), row(4))
    held = strategy.observe(state, row(5))
    assert int(held.nonfinite_count) == 1
    assert int(held.num_experts) == 4
    assert held.sparsities.count == state.sparsities.count
    assert int(strategy.observe(held, row(4)).nonfinite_count) == 1
