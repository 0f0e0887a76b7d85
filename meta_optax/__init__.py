"""Closed-loop control of hyperparameters for Optax, inside the jitted step."""

from typing import TYPE_CHECKING, Any

from meta_optax._adopt import adopt
from meta_optax._advanced_plateau import advanced_plateau
from meta_optax._checkpoint import checkpoint_template
from meta_optax._combine import bounded, chain, every, log_only
from meta_optax._core import MetaOptimizer
from meta_optax._decisions import Decision, format_decisions, read_decisions
from meta_optax._expert_gate import expert_gate
from meta_optax._greedy import greedy
from meta_optax._inject import InjectMetaHyperparamsState, inject_meta_hyperparams
from meta_optax._learned import learned
from meta_optax._log import with_decisions
from meta_optax._migrate import migrate
from meta_optax._multi_steps import MetaMultiStepsState, multi_steps
from meta_optax._partition import moe_partition
from meta_optax._plateau import plateau
from meta_optax._policy_gradient import policy_gradient
from meta_optax._read import read_hyperparams, reset
from meta_optax._reinforce import reinforce
from meta_optax._scale import (
    ScaleByMetaState,
    scale_by_advanced_plateau,
    scale_by_expert_gate,
    scale_by_meta,
    scale_by_plateau,
    scale_by_smart_expert_gate,
)
from meta_optax._schedule import MetaScheduleState, as_schedule
from meta_optax._smart_expert_gate import smart_expert_gate
from meta_optax._spikes import SkipSpikesState, hold_spikes, skip_spikes
from meta_optax._trend_plateau import trend_plateau
from meta_optax._writer import MetricsWriter
from meta_optax.moe._adapters import (
    router_metrics_from_collection,
    router_metrics_from_counts,
    router_metrics_from_logits,
)
from meta_optax.moe._aux_loss import adapt_aux_loss
from meta_optax.moe._balance import BalanceRouterBiasState, balance_router_bias
from meta_optax.moe._guard import guard_collapse
from meta_optax.moe._labels import explain_labels, label_moe_params
from meta_optax.moe._router_metrics import router_metrics

if TYPE_CHECKING:
    from meta_optax._flax import TrainState

__all__ = [
    "BalanceRouterBiasState",
    "Decision",
    "InjectMetaHyperparamsState",
    "MetaMultiStepsState",
    "MetaOptimizer",
    "MetaScheduleState",
    "MetricsWriter",
    "ScaleByMetaState",
    "SkipSpikesState",
    "TrainState",
    "adapt_aux_loss",
    "adopt",
    "advanced_plateau",
    "as_schedule",
    "balance_router_bias",
    "bounded",
    "chain",
    "checkpoint_template",
    "every",
    "expert_gate",
    "explain_labels",
    "format_decisions",
    "greedy",
    "guard_collapse",
    "hold_spikes",
    "inject_meta_hyperparams",
    "label_moe_params",
    "learned",
    "log_only",
    "migrate",
    "moe_partition",
    "multi_steps",
    "plateau",
    "policy_gradient",
    "read_decisions",
    "read_hyperparams",
    "reinforce",
    "reset",
    "router_metrics",
    "router_metrics_from_collection",
    "router_metrics_from_counts",
    "router_metrics_from_logits",
    "scale_by_advanced_plateau",
    "scale_by_expert_gate",
    "scale_by_meta",
    "scale_by_plateau",
    "scale_by_smart_expert_gate",
    "skip_spikes",
    "smart_expert_gate",
    "trend_plateau",
    "with_decisions",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What needs Flax is imported when it is asked for, so that this can be without Flax."""
    if name != "TrainState":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from meta_optax._flax import TrainState
    except ImportError as error:
        raise ImportError(
            'meta_optax.TrainState needs Flax: pip install "meta-optax[flax]".'
        ) from error
    return TrainState


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
