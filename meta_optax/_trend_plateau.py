"""Plateau control by tests that know noise."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meta_optax import _checks
from meta_optax._checks import Mode, Scalar, Size
from meta_optax._core import (
    Hyperparams,
    MetaOptimizer,
    Metrics,
    Rules,
    forms,
    hold_nonfinite,
    observe_every,
    rules_of,
    select,
)
from meta_optax._rules import copy_for_plateau, cut, cut_rate, has_room
from meta_optax._trend import (
    Trend,
    TrendState,
    advance_trend,
    clear_trend_where,
    empty_trend,
    probability_not_falling,
    read_trend,
)

# After each cut without a fall since the one before, so many times as many rows are asked for.
_HOLD_GROWTH = 4.0
_LONGEST_HOLD = 4.0**8
_RULES = ("fall ended", "no fall")
_ENDED, _NONE = range(2)


class TrendPlateauState(NamedTuple):
    """State of `trend_plateau`; ``hold`` is how many windows a cut without a fall waits for."""

    trend: TrendState
    hold: Float[Array, ""]
    cooldown_count: Int[Array, ""]
    rate_scale: Float[Array, ""]
    rule: Int[Array, ""]
    nonfinite_count: Int[Array, ""]

    def decision_rules(self) -> dict[str, Rules]:
        """The rule behind the last change of each hyperparameter."""
        return {
            "learning_rate": rules_of("trend_plateau", self.rule, dict.fromkeys(_RULES, "value"))
        }


def trend_plateau(
    *,
    window: Size = 256,
    significance: Scalar = 2e-4,
    lr_factor: Scalar = 0.5,
    min_lr: Scalar = 1e-6,
    mode: Mode = "min",
    cooldown: Scalar = 0,
    min_evidence: Scalar = 32,
    update_frequency: Scalar = 1,
) -> MetaOptimizer:
    r"""Cuts the learning rate once the loss is shown to have stopped falling, noise or not.

    Lines are fitted to the last :math:`m` rows and to the :math:`m` before them, for a dozen
    :math:`m` from 16 to ``window``. With :math:`\hat\beta, \hat\beta_-` their slopes, :math:`s` the
    standard error and t-tests throughout,

    .. math::
      \text{fall ended} &\iff \exists m: \; \hat\beta_- \ll 0, \quad
        \hat\beta \text{ not below } 0, \quad
        \hat\beta > \tfrac14 \hat\beta_- \text{ at the level } \text{significance} \\
      \text{no fall} &\iff \hat\beta \text{ not below } 0 \text{ for } m = \text{window}
        \text{, and no part of it that ends now falls} \\
      \text{either} &\Rightarrow \text{lr} \leftarrow
        \max(\text{lr} \cdot \text{lr_factor}^{2 p}, \text{min_lr}), \quad
        p = P(\beta \ge 0 \mid \text{the rows})

    so that a flat loss is cut by ``lr_factor``, one that rises by up to its square, and one that
    may still fall a little by less. How many rows it takes follows from the noise: 16 flat rows
    after 16 of a clean fall, hundreds where the noise is a hundred times the fall a row.

    - *Noise*: standard errors are multiplied by :math:`\sqrt{(1 + \hat\phi) / (1 - \hat\phi)}`,
      and the degrees of freedom reduced as much, with :math:`\hat\phi` the residuals'
      autocorrelation: the effective sample size.
    - *Spikes*: a row is drawn to within six robust deviations (median and MAD) of the nine before
      it. Five in a row on one side are a new level, and the evidence starts afresh there: a loss
      that falls again after a spike is not cut, however far above its old best.
    - *Evidence*: no cut before ``min_evidence`` rows; where no fall was seen, none before
      ``window`` rows. A cut empties the evidence. Each cut without a fall since the one before
      waits four times as long: what did not help is not repeated at once.
    - *Values*: only slopes count, so the loss may cross zero, and its scale does not matter.

    The cuts multiply the base value, so a base schedule keeps its shape, and every group's form of
    a rate is cut with it. ``min_lr`` is a floor on the cuts alone. The state is means of blocks of
    1, 2, 4, ... rows: 64 for each doubling of the window.

    Metrics: ``value`` (the loss, a scalar).

    Args:
      window: rows in which a fall must show for the loss to count as falling, an integer >= 8, not
        traced. Falls a row below about :math:`12 \sigma / \text{window}^{3/2}` (with
        :math:`\sigma` the noise a row, uncorrelated) cannot be told from none.
      significance: the level at which a fall's end must be shown, in (0, 1); less is later and
        surer.
      lr_factor: what a cut multiplies the rate by where the loss is flat, in (0, 1).
      min_lr: the rate below which no cut leads, >= 0, in units of the base rate.
      mode: ``"min"`` for a metric to be lowered, ``"max"`` for one to be raised.
      cooldown: rows after a cut that are not looked at, an integer >= 0.
      min_evidence: the fewest rows that a cut rests on, an integer >= 8, half of them before the
        fall's end. A loss that rises and falls in a rhythm (of the data's order, say) does stall
        for a while each time: to look past that, take four times the period.
      update_frequency: look at the metrics of every n-th step only; an integer >= 1.

    Arguments that are traced are clipped to these ranges.

    Returns:
      A `MetaOptimizer`.

    Raises:
      ValueError: for an argument outside its range.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> meta = mo.trend_plateau()
      >>> state, rates = meta.init(), []
      >>> for step in range(80):
      ...     loss = max(2.0 - 0.05 * step, 0.0)  # flat from step 40 on
      ...     state = meta.observe(state, {"step": step, "value": loss})
      ...     rates.append(float(meta.apply(state, {"learning_rate": 0.1})["learning_rate"]))
      >>> next((step, f"{rate:.3f}") for step, rate in enumerate(rates) if rate < 0.1)
      (56, '0.050')

    References:
      Zhang et al., "Statistical adaptive stochastic gradient methods" (SALSA), arXiv 2002.10597,
      and Lang et al., "Using statistics to automate stochastic optimization" (SASA), NeurIPS 2019,
      cut by a test for stationarity with batch means; King, "Automatic learning rate scheduling
      that really works", dlib's blog, 2018, by a robust test of the loss's slope over spans of all
      lengths.
    """
    window = _checks.size("window", window, low=8)
    level = _checks.real("significance", significance, high=1.0, open_low=True, open_high=True)
    cut_factor = _checks.real("lr_factor", lr_factor, high=1.0, open_low=True, open_high=True)
    min_lr = _checks.real("min_lr", min_lr, open_high=True)
    sign = _checks.sign_of_mode(mode)
    cooldown = _checks.integer("cooldown", cooldown, low=0)
    evidence = _checks.integer("min_evidence", min_evidence, low=8)
    frequency = _checks.integer("update_frequency", update_frequency, low=1)

    def init() -> TrendPlateauState:
        return TrendPlateauState(
            trend=empty_trend(window),
            hold=jnp.ones([], jnp.float32),
            cooldown_count=jnp.zeros([], jnp.int32),
            rate_scale=jnp.ones([], jnp.float32),
            rule=jnp.zeros([], jnp.int32),
            nonfinite_count=jnp.zeros([], jnp.int32),
        )

    def needs(metrics: Metrics) -> dict[str, int]:
        del metrics
        return {"value": 0}

    def decide(state: TrendPlateauState, seen: Trend, metrics: Metrics) -> TrendPlateauState:
        wait = jnp.maximum(window * state.hold, jnp.asarray(evidence, jnp.float32))
        waited = state.trend.count.astype(jnp.float32) >= wait
        fires = seen.has_stalled | (seen.is_flat & waited)
        fires &= has_room(metrics, state.rate_scale, min_lr)
        score = jnp.where(seen.has_stalled, seen.stalled_score, seen.flat_score)
        factor = jnp.power(cut_factor, 2.0 * probability_not_falling(score))
        longer = jnp.minimum(state.hold * _HOLD_GROWTH, _LONGEST_HOLD)
        rule = jnp.where(seen.has_stalled, _ENDED, _NONE)
        return state._replace(
            trend=clear_trend_where(fires, state.trend),
            hold=jnp.where(fires, longer, jnp.where(seen.is_certain, 1.0, state.hold)),
            cooldown_count=jnp.where(fires, cooldown, 0).astype(jnp.int32),
            rate_scale=cut(state.rate_scale, factor, fires),
            rule=jnp.where(fires, rule, state.rule).astype(jnp.int32),
        )

    def observe(state: TrendPlateauState, metrics: Metrics) -> TrendPlateauState:
        state_with_row = state._replace(trend=advance_trend(state.trend, sign * metrics["value"]))
        seen = read_trend(state_with_row.trend, window, level, evidence)
        decided = decide(state_with_row, seen, metrics)
        waiting = state._replace(cooldown_count=state.cooldown_count - 1)
        return select(state.cooldown_count > 0, waiting, decided)

    def apply(state: TrendPlateauState, hyperparams: Mapping[str, Any]) -> Hyperparams:
        out = copy_for_plateau("trend_plateau", hyperparams)
        for key in forms(hyperparams, "learning_rate"):
            out[key] = cut_rate(hyperparams[key], state.rate_scale, min_lr)
        return out

    return MetaOptimizer(
        name="trend_plateau",
        init=init,
        observe=observe_every(
            "trend_plateau", frequency, hold_nonfinite("trend_plateau", needs, observe)
        ),
        apply=apply,
        metrics=("value",),
    )
