"""What code bases call the parts of a mixture of experts."""

import re
from collections.abc import Sequence

from meta_optax.moe._paths import Path

# All are matched against whole parts of a path, in lower case.
_ROUTER = re.compile(r"(w_)?routers?(_\d+)?(_(weights?|kernel|logits|scale))?")
_EXPERTS = re.compile(r"((local|per)_)?experts?(_\d+)?(_mlps?|_scale)?|we_\w+")
_SHARED = re.compile(r"shared_(experts?|mlp)(_\w+)?|ws_\w+")
_EXPERTS_MODULE = re.compile(r"(local_)?experts?|expert_mlps?")
# What a perceptron is made of: beside a router, it is the experts'.
_PERCEPTRON = re.compile(
    r"(wi(_\d+)?|wo|w\d|w_(in|out|gate|up|down|gate_up)|(gate|up|down|gate_up)_proj|gate|up|down"
    r"|gating_einsum|linear|mlp|fc\d)(_weight|_bias)?"
)
# Names that are a router's only in a module of experts; elsewhere they are something else's.
_GATE = re.compile(r"gate(_weight)?")
# A perceptron that is complete without a part called `gate`.
_COMPLETE = ({"wi_0", "wi_1"}, {"wi_0_weight"}, {"gate_proj", "up_proj"}, {"gate_up_proj"})
_COMPLETE += ({"w1", "w2", "w3"},)
_MOE_NAME = re.compile(r"\w*moe\w*|\w*experts?")
_BIAS = re.compile(r"bias|b")
_ROUTER_BIAS = re.compile(r"w_router_bias")
# Biases that only choose: a balance rule sets them.
_BALANCE_BIAS = re.compile(r"(e_score_)?correction_bias|(expert|balance|balancing)_bias")
# Those of Marin, axlearn and jax-llm-examples, which only beside a router are that.
_ROUTERS_BALANCE_BIAS = re.compile(r"router_bias|gate_bias|b_router")
# MaxText calls this model's balance bias and the learned one of others `gate/bias`.
_BALANCED_BLOCK = re.compile(r"deepseek\w*|kimi\w*")
_SHARED_WEIGHT = re.compile(r"w_(gate|up|down|gate_up)")


def is_router(part: str) -> bool:
    """Whether a part of a path can be a router's name."""
    return any(pattern.fullmatch(part.lower()) for pattern in (_GATE, _ROUTER))


class Scopes:
    """What stands beside what: the names that each module of a tree holds."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Collects the names under every prefix of the paths."""
        self._names: dict[Path, set[str]] = {}
        for path in paths:
            for depth in range(len(path)):
                self._names.setdefault(path[:depth], set()).add(path[depth].lower())

    def holds(self, scope: Path, pattern: re.Pattern[str]) -> bool:
        """Whether the module at this path has a part of such a name."""
        return any(pattern.fullmatch(name) for name in self._names.get(scope, ()))

    def has_gate(self, scope: Path) -> bool:
        """Whether what is called ``gate`` in this module is a router."""
        names = self._names.get(scope, set())
        if not self.holds(scope, _GATE) or {"up", "down"} <= names or self.holds(scope, _ROUTER):
            return False
        is_named = bool(scope) and bool(_MOE_NAME.fullmatch(scope[-1].lower()))
        return (
            self.holds(scope, _EXPERTS)
            or any(complete <= names for complete in _COMPLETE)
            or (is_named and self.holds(scope, _PERCEPTRON))
        )

    def has_router(self, scope: Path) -> bool:
        """Whether this module has a router, of whatever name."""
        return self.holds(scope, _ROUTER) or self.has_gate(scope)


def matching_rules(path: Path, scopes: Scopes) -> dict[str, str]:
    """The rules that say what a leaf is, each with its label; none of a dense one."""
    parts = [part.lower() for part in path]
    name = parts[-1]
    found: dict[str, str] = {}
    if any(map(_SHARED.fullmatch, parts)) or _is_shared_weight(parts):
        found["shared expert"] = "shared_expert"
    beside_router = any(map(scopes.has_router, (path[:-1], path[:-2])))
    if _BALANCE_BIAS.fullmatch(name) or (_ROUTERS_BALANCE_BIAS.fullmatch(name) and beside_router):
        return found | {"balance bias": "balance_bias"}
    in_experts = any(map(_EXPERTS.fullmatch, parts))
    if in_experts:
        found["experts"] = "expert"
    router = _router(path, parts, scopes, in_experts=in_experts)
    if router and _BIAS.fullmatch(name):
        if any(map(_BALANCED_BLOCK.fullmatch, parts)):
            return found | {f"{router} bias of DeepSeek": "balance_bias"}
        found[f"{router} bias"] = "gate_bias"
    elif _ROUTER_BIAS.fullmatch(name):
        found["router bias"] = "gate_bias"
    elif router:
        found[router] = "gate"
    elif not found and _is_beside_router(path, parts, scopes):
        found["beside a router"] = "expert"
    return found


def _router(path: Path, parts: list[str], scopes: Scopes, *, in_experts: bool) -> str | None:
    """Which rule finds a router in the path."""
    if any(map(_ROUTER.fullmatch, parts)):
        return "router"
    is_gate = (_GATE.fullmatch(part) and scopes.has_gate(path[:i]) for i, part in enumerate(parts))
    # Among the experts themselves, a gate is the gate of each one's perceptron.
    return "gate beside experts" if not in_experts and any(is_gate) else None


def _is_beside_router(path: Path, parts: list[str], scopes: Scopes) -> bool:
    """Whether a perceptron's part stands beside a router, and no module of experts does."""
    return any(
        _PERCEPTRON.fullmatch(part)
        and scopes.has_router(path[:i])
        and not scopes.holds(path[:i], _EXPERTS_MODULE)
        for i, part in enumerate(parts)
    )


def _is_shared_weight(parts: list[str]) -> bool:
    """A perceptron's weights under ``shared``, which alone could be a shared embedding."""
    below = parts[parts.index("shared") + 1 :] if "shared" in parts else []
    return any(map(_SHARED_WEIGHT.fullmatch, below))
