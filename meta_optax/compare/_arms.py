"""Who takes part in a comparison: Optax's own optimizers, published rules, and our strategies."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

import meta_optax as mo
from meta_optax.compare import _greedy_lr, _hypergradient, _peers

Rate = Float[Array, ""]
# Where quasi-random trials look: learning rates of AdamW, and factors for what finds its own.
RATES, FACTORS, DECAYS = (1e-4, 1e-1), (1e-1, 1e1), (1e-5, 1e-1)
# The share of a run in which AdamW's rate rises to its base value, whatever follows.
WARMUP = 0.05
# The share of a run after which warmup-stable-decay decays (Hägele et al., arXiv 2405.18392).
_STABLE = 0.8
AUX_LOSS_WEIGHT = 0.01
_DECISIONS_KEPT = 64


class Setting(NamedTuple):
    """What a run is given; rates, decay and seed are traced.

    Attributes:
      learning_rate: the base rate, or the factor of what finds its own.
      weight_decay: AdamW's.
      seed: of a policy that draws.
      steps: of the run.
      interval: steps between two looks of rules that are made for validation losses.
      has_experts: whether there are gates and experts to set apart.
    """

    learning_rate: Rate
    weight_decay: Rate
    seed: Int[Array, ""]
    steps: int
    interval: int
    has_experts: bool


Transformation = optax.GradientTransformation
Hyperparams = dict[str, Float[Array, ""]]


def _no_hyperparams(state: Any, setting: Setting, step: Int[Array, ""]) -> Hyperparams:
    del state, setting, step
    return {}


class Arm(NamedTuple):
    """One way to train.

    Attributes:
      about: one line for people.
      make: the optimizer.
      kind: "ours", "peer", or "baseline" for what the others are measured against.
      space: where trials look for `Setting.learning_rate`.
      needs_experts: whether it says nothing about a model without.
      looks: "step" if the optimizer is shown each step's loss, "interval" for a mean now and then.
      read: from the state to what the hyperparameters are, for the report.
      eval_params: from state and params to those to be measured.
    """

    about: str
    make: Callable[[Setting], Transformation]
    kind: str = "peer"
    space: tuple[float, float] = RATES
    needs_experts: bool = False
    looks: str = "step"
    read: Callable[[Any, Setting, Int[Array, ""]], Hyperparams] = _no_hyperparams
    eval_params: Callable[[Any, Any], Any] = lambda state, params: params


def _rise(setting: Setting) -> optax.Schedule:
    """The warm-up's share of the base rate: from a first step that is not lost to 1."""
    steps = setting.steps - _left(setting)
    return optax.linear_schedule(1.0 / steps, 1.0, max(1, steps - 1))


def _warm_outside(tx: Transformation, setting: Setting) -> Transformation:
    """For rules that keep a rate of their own, which must not begin as that of a warm-up."""
    return optax.chain(tx, optax.scale_by_schedule(_rise(setting)))


def _warm(setting: Setting, after: optax.Schedule) -> optax.Schedule:
    """A linear warm-up to 1, then a shape over the steps that are left, times the base rate."""
    shape = optax.join_schedules([_rise(setting), after], [setting.steps - _left(setting)])
    return lambda count: setting.learning_rate * shape(count)


def _left(setting: Setting) -> int:
    return setting.steps - max(1, round(WARMUP * setting.steps))


def bare(setting: Setting) -> Rate:
    """The base rate."""
    return setting.learning_rate


def constant(setting: Setting) -> optax.Schedule:
    """Warm-up, then the base rate."""
    return _warm(setting, optax.constant_schedule(1.0))


def linear(setting: Setting) -> optax.Schedule:
    """Warm-up, then down to zero in a straight line (Bergsma et al., arXiv 2502.15938)."""
    return _warm(setting, optax.linear_schedule(1.0, 0.0, _left(setting)))


def cosine(setting: Setting) -> optax.Schedule:
    """Warm-up, then half a cosine down to zero."""
    return _warm(setting, optax.cosine_decay_schedule(1.0, _left(setting)))


def warmup_stable_decay(setting: Setting) -> optax.Schedule:
    """Warm-up, the base rate up to four fifths of the run, then linearly to zero."""
    flat = round(_STABLE * setting.steps) - (setting.steps - _left(setting))
    return _warm(setting, optax.linear_schedule(1.0, 0.0, _left(setting) - flat, flat))


def _scheduled(about: str, make: Callable[[Setting], optax.Schedule], kind: str = "peer") -> Arm:
    return Arm(
        about=about,
        make=lambda s: optax.adamw(make(s), weight_decay=s.weight_decay),
        kind=kind,
        read=lambda state, s, step: {"learning_rate": jnp.asarray(make(s)(step))},
    )


def _reduce_on_plateau() -> Arm:
    def make(s: Setting) -> Transformation:
        rule = optax.contrib.reduce_on_plateau(accumulation_size=s.interval)
        return optax.chain(optax.adamw(constant(s), weight_decay=s.weight_decay), rule)

    return Arm(
        about="AdamW and optax.contrib.reduce_on_plateau, a look at the mean of each interval",
        make=make,
        read=lambda state, s, step: {
            "learning_rate": constant(s)(step) * optax.tree.get(state, "scale")
        },
    )


def _strategy(
    about: str,
    make: Callable[[Setting], mo.MetaOptimizer],
    *,
    base: Callable[[Setting], optax.Schedule | Rate] = constant,
    wrap: Callable[[Transformation, Setting], Transformation] = lambda tx, s: tx,
    free: Mapping[str, float] | None = None,
    **rest: Any,
) -> Arm:
    """AdamW under a strategy, in groups where the strategy sets gates and experts apart."""

    def build(s: Setting) -> Transformation:
        grouped = rest.get("needs_experts", False)
        factory = mo.moe_partition(optax.adamw, mo.label_moe_params) if grouped else optax.adamw
        strategy = mo.with_decisions(make(s), _DECISIONS_KEPT)
        inject = mo.inject_meta_hyperparams(factory, strategy, free_hyperparams=free)
        return wrap(inject(learning_rate=base(s), weight_decay=s.weight_decay), s)

    return Arm(
        about=about,
        make=build,
        read=lambda state, s, step: {
            name: value
            for name, value in optax.tree.get(state, "hyperparams").items()
            if name.endswith(("learning_rate", "weight_decay", "aux_loss_weight"))
        },
        **{"kind": "ours", **rest},
    )


def _schedule_free() -> Arm:
    return Arm(
        about="schedule-free AdamW, optax.contrib.schedule_free_adamw, measured at its average",
        make=lambda s: optax.contrib.schedule_free_adamw(
            s.learning_rate,
            warmup_steps=s.steps - _left(s),
            weight_decay=s.weight_decay,
        ),
        read=lambda state, s, step: {"learning_rate": s.learning_rate},
        eval_params=optax.contrib.schedule_free_eval_params,
    )


def _prodigy() -> Arm:
    return Arm(
        about="optax.contrib.prodigy times a cosine, as its authors advise",
        make=lambda s: optax.contrib.prodigy(
            lambda count: s.learning_rate * optax.cosine_decay_schedule(1.0, s.steps)(count),
            weight_decay=s.weight_decay,
        ),
        space=FACTORS,
        read=lambda state, s, step: {"learning_rate": optax.tree.get(state, "estim_lr")},
    )


def _dog() -> Arm:
    return Arm(
        about="optax.contrib.dog: SGD whose step is distance over gradients, without averaging",
        make=lambda s: optax.contrib.dog(s.learning_rate, weight_decay=s.weight_decay),
        space=FACTORS,
    )


def _mechanic() -> Arm:
    return Arm(
        about="optax.contrib.mechanize around AdamW on a linear schedule, as its authors advise",
        make=lambda s: optax.contrib.mechanize(
            optax.adamw(linear(s), weight_decay=s.weight_decay), weight_decay=0.01
        ),
    )


def _hypergradient_arm() -> Arm:
    return Arm(
        about="AdamW whose rate follows its own gradient (Baydin et al., arXiv 1703.04782)",
        make=lambda s: _warm_outside(
            _hypergradient.adamw_with_hypergradient(s.learning_rate, weight_decay=s.weight_decay),
            s,
        ),
        read=lambda state, s, step: {
            "learning_rate": optax.tree.get(state, "hyperparams")["learning_rate"]
        },
    )


BASELINE = "linear"
ARMS: Mapping[str, Arm] = {
    "constant": _scheduled("AdamW at a constant rate after the warm-up", constant),
    "linear": _scheduled("AdamW, linearly to zero after the warm-up", linear, kind="baseline"),
    "cosine": _scheduled("AdamW, half a cosine to zero after the warm-up", cosine),
    "wsd": _scheduled("AdamW, constant for 80 % of the run, then to zero", warmup_stable_decay),
    "reduce_on_plateau": _reduce_on_plateau(),
    "torch_plateau": _strategy(
        "AdamW and the rule of PyTorch's ReduceLROnPlateau, a look at each interval's mean",
        lambda s: _peers.torch_plateau(accumulation=s.interval),
        base=bare,
        wrap=_warm_outside,
        kind="peer",
    ),
    "greedy_lr": _strategy(
        "AdamW and the rule of GreedyLR (arXiv 2512.14527), a look at each step's loss",
        lambda s: _greedy_lr.greedy_lr(),
        base=bare,
        wrap=_warm_outside,
        kind="peer",
    ),
    "prodigy": _prodigy(),
    "schedule_free": _schedule_free(),
    "dog": _dog(),
    "mechanic": _mechanic(),
    "hypergradient": _hypergradient_arm(),
    "random_policy": _strategy(
        "AdamW whose rate is halved, kept or doubled at random at each interval",
        lambda s: _peers.random_policy(s.seed, update_frequency=s.interval),
        base=bare,
        wrap=_warm_outside,
        kind="peer",
    ),
    "plateau": _strategy(
        "AdamW under meta_optax.plateau, shown each interval's mean loss",
        lambda s: mo.plateau(),
        looks="interval",
    ),
    "advanced_plateau": _strategy(
        "AdamW under meta_optax.advanced_plateau, shown each interval's mean loss",
        lambda s: mo.advanced_plateau(),
        looks="interval",
    ),
    "trend_plateau": _strategy(
        "AdamW under meta_optax.trend_plateau, shown each step's loss",
        lambda s: mo.trend_plateau(),
    ),
    "greedy": _strategy(
        "AdamW under meta_optax.greedy, shown each step's loss", lambda s: mo.greedy()
    ),
    "linear_trend_plateau": _strategy(
        "meta_optax.trend_plateau on top of the linear schedule",
        lambda s: mo.trend_plateau(),
        base=linear,
    ),
    "linear_greedy": _strategy(
        "meta_optax.greedy on top of the linear schedule", lambda s: mo.greedy(), base=linear
    ),
    "linear_skip_spikes": Arm(
        about="meta_optax.skip_spikes around AdamW on the linear schedule",
        make=lambda s: mo.skip_spikes(optax.adamw(linear(s), weight_decay=s.weight_decay)),
        kind="ours",
    ),
    "hold_spikes": _strategy(
        "AdamW under meta_optax.hold_spikes(advanced_plateau), shown each interval's mean loss",
        lambda s: mo.hold_spikes(mo.advanced_plateau()),
        looks="interval",
    ),
    "reinforce": _strategy(
        "AdamW under meta_optax.reinforce, shown each step's loss",
        lambda s: mo.reinforce(seed=s.seed),
    ),
    "policy_gradient": _strategy(
        "AdamW under meta_optax.policy_gradient, shown each step's loss",
        lambda s: mo.policy_gradient(horizon=s.steps, seed=s.seed),
    ),
    "learned": _strategy(
        "meta_optax.learned, which was trained beforehand, on top of the linear schedule",
        lambda s: mo.learned(horizon=s.steps),
        base=linear,
    ),
    "expert_gate": _strategy(
        "AdamW in groups under meta_optax.expert_gate, linear schedule",
        lambda s: mo.expert_gate(),
        base=linear,
        needs_experts=True,
    ),
    "smart_expert_gate": _strategy(
        "AdamW in groups under meta_optax.smart_expert_gate, linear schedule",
        lambda s: mo.smart_expert_gate(),
        base=linear,
        needs_experts=True,
    ),
    "guard_collapse": _strategy(
        "AdamW in groups under meta_optax.guard_collapse, linear schedule",
        lambda s: mo.guard_collapse(),
        base=linear,
        needs_experts=True,
        free={"aux_loss_weight": AUX_LOSS_WEIGHT},
    ),
    "adapt_aux_loss": _strategy(
        "AdamW under meta_optax.adapt_aux_loss, linear schedule",
        lambda s: mo.adapt_aux_loss(),
        base=linear,
        needs_experts=True,
        free={"aux_loss_weight": AUX_LOSS_WEIGHT},
    ),
}
