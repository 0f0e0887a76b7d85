"""Plateau control by patience and by trend, with a warm-up and a watch on the norms."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from meta_optax import _checks
from meta_optax._checks import Mode, Scalar
from meta_optax._core import (
    Hyperparams,
    MetaOptimizer,
    Metrics,
    Rules,
    forms,
    hold_nonfinite,
    is_due,
    read_arrival,
    read_step,
    rules_of,
    sees,
    select,
)
from meta_optax._history import (
    Smoothed,
    Window,
    average_rows,
    clear_where,
    empty_average,
    empty_window,
    has_stalled,
    is_full,
    push,
)
from meta_optax._rules import (
    LEAST_WEIGHT_DECAY,
    cool_down,
    copy_for_plateau,
    count_bad,
    cut,
    cut_rate,
    grow,
    grown_decay,
    has_room,
    is_cooling,
    is_exactly,
    warmup_share,
)

_RATE_RULES = {"warm-up": "step", "patience": "value", "trend": "value"}
_WARM_UP, _PATIENCE, _TREND = range(3)
_DECAY_RULES = {"grad_norm": "grad_norm", "param_norm": "param_norm", "rising loss": "value"}


class AdvancedPlateauState(NamedTuple):
    """State of `advanced_plateau`."""

    # A reset starts the decisions afresh, not the training.
    kept_on_reset = ("warmup",)

    smoothed: Smoothed | None
    best: Float[Array, ""]
    bad_count: Int[Array, ""]
    cooldown_count: Int[Array, ""]
    losses: Window
    param_norms: Window
    previous_value: Float[Array, ""]
    previous_grad_norm: Float[Array, ""]
    warmup: Float[Array, ""]
    rate_scale: Float[Array, ""]
    decay_growth: Float[Array, ""]
    rate_rule: Int[Array, ""]
    decay_rule: Int[Array, ""]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of each hyperparameter."""
        return {
            "learning_rate": rules_of("advanced_plateau", self.rate_rule, _RATE_RULES),
            "weight_decay": rules_of("advanced_plateau", self.decay_rule, _DECAY_RULES),
        }


def advanced_plateau(
    *,
    patience: Scalar = 3,
    lr_factor: Scalar = 0.5,
    min_lr: Scalar = 1e-7,
    grad_norm_threshold: Scalar = 10.0,
    weight_decay_factor: Scalar = 1.5,
    weight_norm_threshold: Scalar = 1.0,
    warmup_steps: Scalar = 50,
    trend_window: Scalar = 5,
    update_frequency: Scalar = 1,
    rearm_trend: Scalar = True,
    max_weight_decay_growth: Scalar = 10.0,
    mode: Mode = "min",
    rtol: Scalar = 0.0,
    atol: Scalar = 1e-6,
    cooldown: Scalar = 0,
    smoothing: Scalar = 0,
) -> MetaOptimizer:
    r"""Warm-up, then cuts by patience or by trend, and weight decay grown on large norms.

    With :math:`t` the step count, :math:`b` the best loss since the warm-up, :math:`n` the rows
    since that were not below :math:`b - (\text{rtol} \cdot |b| + \text{atol})`, and
    :math:`x_1 \dots x_w` the last ``trend_window`` losses,

    .. math::
      t < \text{warmup_steps} &\Rightarrow
        \text{lr} = \text{lr}_0 \cdot (t + 1) / \text{warmup_steps}
        \quad\text{and nothing else happens} \\
      n \ge \text{patience} \;\text{or}\; \forall i > 1: x_i \ge x_1 - 0.001 |x_1|
        &\Rightarrow \text{lr} \leftarrow \max(\text{lr} \cdot \text{lr_factor}, \text{min_lr}),
        \; n \leftarrow 0 \\
      \text{norms are large} &\Rightarrow \text{wd} \leftarrow
        \min(\max(\text{wd} \cdot \text{weight_decay_factor}, 10^{-6}),
        \text{max_weight_decay_growth} \cdot \max(\text{wd}_0, 10^{-6}))

    where "norms are large" is any of: ``grad_norm > grad_norm_threshold``; of the last three
    positive weight norms, (last - first) / 3 > ``weight_norm_threshold``; the loss rose since the
    row before and the mean of the last two gradient norms is above ``grad_norm_threshold / 2``.

    The warm-up follows the step count, observed or not, also where the loss did not arrive. The
    cuts multiply the base value, so a base schedule keeps its shape, and every group's form of a
    rate is cut with it. ``min_lr`` is a floor on the cuts alone. Where the optimizer has no weight
    decay, the norms are neither needed nor measured.

    Metrics: ``value`` (the loss), ``grad_norm`` and ``param_norm``, all scalars.

    Args:
      patience: rows without a better loss before a cut; an integer >= 1.
      lr_factor: what a cut multiplies the rate by, in (0, 1).
      min_lr: the rate below which no cut leads, >= 0, in units of the base rate.
      grad_norm_threshold: a gradient norm above this grows weight decay, >= 0; ``math.inf``
        switches both tests on it off.
      weight_decay_factor: what weight decay is multiplied by, >= 1; exactly 1 switches the rule,
        and the measuring of the norms, off.
      weight_norm_threshold: a growth of the weights' norm per row above this grows weight decay,
        >= 0; ``math.inf`` switches the test off. With both thresholds infinite, no norm is needed.
      warmup_steps: steps of linear warm-up, an integer >= 0.
      trend_window: rows that the trend test looks at, an integer >= 2, not traced.
      update_frequency: look at the metrics of every n-th step only; an integer >= 1.
      rearm_trend: whether a cut empties the trend's window, so that both tests start afresh;
        False is the recorded behaviour, which cuts at every row of a long plateau. Not traced.
      max_weight_decay_growth: the most that weight decay becomes, as a multiple of its base (or
        of 1e-6 where that is more), >= 1; ``math.inf`` for the recorded behaviour.
      mode: ``"min"`` for a metric to be lowered, ``"max"`` for one to be raised: all tests on it
        are mirrored.
      rtol: the improvement on the best that counts as one, as a share of it, >= 0.
      atol: the improvement that counts as one, >= 0; the two are added.
      cooldown: judged rows after a cut that no test looks at, an integer >= 0.
      smoothing: what both tests judge in place of the loss. In (0, 1): its exponential moving
        average, which keeps that share at each row. An integer >= 2: the means of so many rows,
        each judged once. 0: the loss itself. Not traced.

    Arguments that are traced are clipped to these ranges.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: for an argument outside its range.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> meta = mo.advanced_plateau(patience=2, lr_factor=0.8, warmup_steps=3)
      >>> state, rates = meta.init(), []
      >>> for step, loss in enumerate([1.0023, 0.9760, 0.9261, 0.88, 0.84, 0.8, 0.8, 0.8]):
      ...     row = {"step": step, "value": loss, "grad_norm": 1.0, "param_norm": 1.0}
      ...     state = meta.observe(state, row)
      ...     rates.append(meta.apply(state, {"learning_rate": 0.01})["learning_rate"])
      >>> print(*(f"{rate:.4f}" for rate in rates))
      0.0033 0.0067 0.0100 0.0100 0.0100 0.0100 0.0100 0.0080
    """
    patience = _checks.integer("patience", patience, low=1)
    cut_factor = _checks.real("lr_factor", lr_factor, high=1.0, open_low=True, open_high=True)
    min_lr = _checks.real("min_lr", min_lr, open_high=True)
    grad_limit = _checks.real("grad_norm_threshold", grad_norm_threshold)
    factor = _checks.real("weight_decay_factor", weight_decay_factor, low=1.0, open_high=True)
    param_limit = _checks.real("weight_norm_threshold", weight_norm_threshold)
    warmup_steps = _checks.integer("warmup_steps", warmup_steps, low=0)
    window = _checks.size("trend_window", trend_window, low=2)
    frequency = _checks.integer("update_frequency", update_frequency, low=1)
    rearm = _checks.flag("rearm_trend", rearm_trend)
    most = _checks.real("max_weight_decay_growth", max_weight_decay_growth, low=1.0)
    sign = _checks.sign_of_mode(mode)
    margins = {
        "rtol": _checks.real("rtol", rtol, open_high=True),
        "atol": _checks.real("atol", atol, open_high=True),
    }
    cooldown = _checks.integer("cooldown", cooldown, low=0)
    kept = _checks.smoothing(smoothing)
    uses = {"grad_norm": grad_limit, "param_norm": param_limit}
    norms = tuple(name for name, limit in uses.items() if not is_exactly(limit, math.inf))
    norms = () if is_exactly(factor, 1.0) else norms

    def init() -> AdvancedPlateauState:
        return AdvancedPlateauState(
            smoothed=empty_average(kept),
            best=jnp.full([], sign * jnp.inf, jnp.float32),
            bad_count=jnp.zeros([], jnp.int32),
            cooldown_count=jnp.zeros([], jnp.int32),
            losses=empty_window(window),
            param_norms=empty_window(3),
            previous_value=jnp.full([], sign * jnp.inf, jnp.float32),
            previous_grad_norm=jnp.zeros([], jnp.float32),
            warmup=warmup_share(jnp.zeros([], jnp.int32), warmup_steps),
            rate_scale=jnp.ones([], jnp.float32),
            decay_growth=jnp.ones([], jnp.float32),
            rate_rule=jnp.zeros([], jnp.int32),
            decay_rule=jnp.zeros([], jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def needs(metrics: Metrics) -> dict[str, int]:
        return {"value": 0} | dict.fromkeys(norms if sees(metrics, "weight_decay") else (), 0)

    def observe_rate(
        state: AdvancedPlateauState, metrics: Metrics, warm: Bool[Array, ""]
    ) -> AdvancedPlateauState:
        smoothed, value, is_judged = average_rows(state.smoothed, metrics["value"], kept)
        value = sign * value
        best, bad = count_bad(sign * state.best, state.bad_count, value, **margins)
        cooling = is_cooling(state.cooldown_count, cooldown)
        losses = push(state.losses, value)
        by_patience = bad >= patience
        fires = (
            (by_patience | has_stalled(losses))
            & has_room(metrics, state.rate_scale, min_lr)
            & ~(warm | cooling)
        )
        bad, left = cool_down(bad, state.cooldown_count, fires, cooldown)
        rule = jnp.where(by_patience, _PATIENCE, _TREND)
        judged = state._replace(
            best=jnp.where(warm, state.best, sign * best),
            bad_count=jnp.where(warm, state.bad_count, bad),
            cooldown_count=left,
            losses=clear_where(fires | cooling, losses) if rearm else losses,
            rate_scale=cut(state.rate_scale, cut_factor, fires),
            rate_rule=jnp.where(fires, rule, state.rate_rule).astype(jnp.int32),
        )
        seen = select(is_judged, judged, state)._replace(smoothed=smoothed)
        return seen._replace(rate_rule=jnp.where(warm, _WARM_UP, seen.rate_rule).astype(jnp.int32))

    def observe_decay(
        state: AdvancedPlateauState, metrics: Metrics, warm: Bool[Array, ""]
    ) -> AdvancedPlateauState:
        grad_norm, param_norm = (metrics[k] if k in norms else 0.0 * metrics["value"] for k in uses)
        param_norms = select(param_norm > 0, push(state.param_norms, param_norm), state.param_norms)
        growth = (param_norms.values[2] - param_norms.values[0]) / 3
        rising = sign * metrics["value"] > sign * state.previous_value
        causes = [
            grad_norm > grad_limit,
            is_full(param_norms) & (growth > param_limit),
            rising & ((grad_norm + state.previous_grad_norm) / 2 > grad_limit / 2),
        ]
        fires = (causes[0] | causes[1] | causes[2]) & ~warm
        rule = jnp.argmax(jnp.stack(causes)).astype(jnp.int32)
        return state._replace(
            param_norms=param_norms,
            previous_grad_norm=grad_norm,
            decay_growth=grow(state.decay_growth, factor, fires),
            decay_rule=jnp.where(fires, rule, state.decay_rule),
        )

    def observe(state: AdvancedPlateauState, metrics: Metrics) -> AdvancedPlateauState:
        warm = read_step("advanced_plateau", metrics) < warmup_steps
        seen = observe_rate(state, metrics, warm)
        if norms and set(norms) <= set(needs(metrics)):
            seen = observe_decay(seen, metrics, warm)
        step = read_step("advanced_plateau", metrics)
        return seen._replace(
            previous_value=metrics["value"], warmup=warmup_share(step, warmup_steps)
        )

    held = hold_nonfinite("advanced_plateau", needs, observe)

    def observe_and_warm_up(state: AdvancedPlateauState, metrics: Metrics) -> AdvancedPlateauState:
        # The warm-up moves on the steps in between as well, else it could end short of the rate.
        step = read_step("advanced_plateau", metrics)
        between = state._replace(warmup=warmup_share(step, warmup_steps))
        arrived = read_arrival("advanced_plateau", metrics, needs(metrics))
        return select(is_due(step, frequency) & arrived, held(state, metrics), between)

    def apply(state: AdvancedPlateauState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        out = copy_for_plateau("advanced_plateau", hyperparams, controls_decay=True)
        for key in forms(hyperparams, "learning_rate"):
            out[key] = cut_rate(hyperparams[key], state.rate_scale, min_lr) * state.warmup
        for key in forms(hyperparams, "weight_decay") if norms else ():
            floor = LEAST_WEIGHT_DECAY / factor
            out[key] = grown_decay(hyperparams[key], state.decay_growth, floor, most)
        return out

    return MetaOptimizer(
        name="advanced_plateau",
        init=init,
        observe=observe_and_warm_up,
        apply=apply,
        metrics=("value", *norms),
    )
