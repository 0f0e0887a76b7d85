"""Labels of a mixture of experts' parameters, from their paths alone."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import numpy as np

from meta_optax._groups import GROUP_OF_LABEL
from meta_optax.moe._paths import Path, leaves_with_paths, natural
from meta_optax.moe._rules import Scopes, matching_rules

PyTree = Any
if TYPE_CHECKING:
    Rules = Mapping[str, str] | Sequence[tuple[str, str]]
else:
    Rules = Any  # Other things have to reach the check here, also where types are checked.

# How many paths an error shows.
_SHOWN = 12


class LabelledLeaf(NamedTuple):
    """A leaf's path, its label and the rule that gave it."""

    path: Path
    label: str
    rule: str


def label_moe_params(params: PyTree, *, rules: Rules = ()) -> PyTree:
    r"""Labels each leaf of a mixture of experts' params by its path.

    =================  =====================================================================
    label              given to
    =================  =====================================================================
    ``gate``           the router: a part of the path is ``router`` (or ``w_router``,
                       ``router_weights``, ``gate_weight``, ...), or is ``gate`` beside experts
    ``gate_bias``      the router's learned bias
    ``balance_bias``   a bias that a balance rule sets (``e_score_correction_bias``, ...)
    ``expert``         below ``experts``, or what a perceptron is made of beside a router
    ``shared_expert``  below ``shared_expert``, its gate too
    ``dense``          all the rest
    =================  =====================================================================

    Only whole parts of a path are compared, so ``gate_proj``, ``attn_gate``, ``gated_norm`` and
    ``shared_expert_gate`` are no gates. Shapes are not looked at: params, gradients, masked trees
    and `jax.ShapeDtypeStruct` trees of one model get the same labels. The names are those of
    MaxText, Levanter, Marin, Flaxformer, V-MoE, axlearn, EasyDeL, Tunix, jax-llm-examples and the
    Hugging Face checkpoints; for any other model, `explain_labels` shows what was found, and
    ``rules`` puts it right.

    Args:
      params: the tree: nested dicts, Flax Linen or NNX state, Equinox modules, one flat dict of
        dotted names; leaves of any kind, Optax's placeholders too.
      rules: pairs of a regular expression and a label, as a mapping or a sequence, that go before
        the rules here; the first that is found in the path (parts joined by ``/``) wins.

    Returns:
      The same tree with labels for leaves. It, or this function itself, is what `moe_partition`
      and `scale_by_meta` take as labels.

    Raises:
      ValueError: if no leaf is a gate or none an expert, if rules here disagree about a leaf, or
        if a rule of ``rules`` has an unknown label; with the paths.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> weights = {"router": jnp.ones([8, 4]), "experts": {"gate_proj": jnp.ones([4, 8, 9])}}
      >>> mo.label_moe_params({"layer_0": weights, "norm": jnp.ones(8)})
      {'layer_0': {'experts': {'gate_proj': 'expert'}, 'router': 'gate'}, 'norm': 'dense'}
    """
    labelled, treedef, _ = _label(params, rules)
    return jax.tree.unflatten(treedef, [leaf.label for leaf in labelled])


def explain_labels(params: PyTree, *, rules: Rules = ()) -> str:
    """Prints which path got which label by which rule, with counts and sizes.

    Leaves whose paths differ only in numbers are one line.

    Args:
      params: as for `label_moe_params`, with shapes.
      rules: as for `label_moe_params`.

    Returns:
      What was printed.

    Raises:
      ValueError: as `label_moe_params`.

    Example:
      >>> import jax.numpy as jnp, meta_optax as mo
      >>> layer = {"router": jnp.ones([8, 4]), "experts": jnp.ones([4, 8, 9])}
      >>> text = mo.explain_labels({"layer_0": layer, "layer_1": layer})
      label          leaves  parameters  rule     path
      gate                2          64  router   layer_*/router
      expert              2         576  experts  layer_*/experts
    """
    labelled, _, leaves = _label(params, rules)
    counts: Counter[LabelledLeaf] = Counter()
    sizes: Counter[LabelledLeaf] = Counter()
    for leaf, value in zip(labelled, leaves, strict=True):
        pattern = tuple(re.sub(r"(?<![a-zA-Z])\d+", "*", part) for part in leaf.path)
        kind = leaf._replace(path=pattern)
        counts[kind] += 1
        sizes[kind] += int(np.prod(np.shape(value)))
    order = list(GROUP_OF_LABEL)
    kinds = sorted(counts, key=lambda kind: (order.index(kind.label), natural(kind.path)))
    width = max([len("rule"), *(len(kind.rule) for kind in kinds)])
    lines = [f"{'label':<14} {'leaves':>6}  {'parameters':>10}  {'rule':<{width}}  path"]
    lines += [
        f"{kind.label:<14} {counts[kind]:>6}  {sizes[kind]:>10,}  {kind.rule:<{width}}  "
        f"{'/'.join(kind.path)}"
        for kind in kinds
    ]
    used = {leaf.rule for leaf in labelled}
    lines += [f"the rule {p!r} matched no path" for p, _ in _pairs(rules) if repr(p) not in used]
    text = "\n".join(lines)
    print(text)
    return text


def _label(params: PyTree, rules: Rules) -> tuple[list[LabelledLeaf], Any, list[Any]]:
    flat, treedef = leaves_with_paths(params)
    paths = [path for path, _ in flat]
    own = _pairs(rules)
    for pattern, label in own:
        if label not in GROUP_OF_LABEL:
            hit = [path for path in paths if re.search(pattern, "/".join(path))]
            raise ValueError(
                f"The rule {pattern!r} gives the label {label!r}, which no optimizer serves, to "
                f"{_show(hit)}; labels are {list(GROUP_OF_LABEL)}."
            )
    scopes = Scopes(paths)
    labelled = [_label_leaf(path, own, scopes) for path in paths]
    # Optax's placeholder for a whole tree of params has no leaves, and so nothing to be missed.
    for label in ("gate", "expert") if paths else ():
        if not any(leaf.label == label for leaf in labelled):
            raise ValueError(
                f"label_moe_params found no {label} among the paths {_show(paths)}. Say which "
                f"paths are: rules={{'a regular expression': {label!r}, ...}}."
            )
    return labelled, treedef, [leaf for _, leaf in flat]


def _label_leaf(path: Path, own: list[tuple[str, str]], scopes: Scopes) -> LabelledLeaf:
    joined = "/".join(path)
    for pattern, label in own:
        if re.search(pattern, joined):
            return LabelledLeaf(path, label, repr(pattern))
    found = matching_rules(path, scopes)
    if len(set(found.values())) > 1:
        raise ValueError(
            f"label_moe_params cannot tell what {joined!r} is: its rules say {found}. Decide it: "
            f"rules={{{re.escape(joined)!r}: ...}}."
        )
    rule, label = next(iter(found.items()), ("else", "dense"))
    return LabelledLeaf(path, label, rule)


def _pairs(rules: Rules) -> list[tuple[str, str]]:
    """The rules as a list.

    Raises:
      ValueError: if they are no pairs of a regular expression and a label.
    """
    pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
    for pair in pairs:
        try:
            pattern, _ = pair if not isinstance(pair, str) else (None, None)
            re.compile(cast(str, pattern))
        except (TypeError, ValueError, re.error) as error:
            raise ValueError(
                f"rules must be pairs of a regular expression and a label, got {pair!r}: {error}."
            ) from error
    return cast(list[tuple[str, str]], pairs)


def _show(paths: list[Path]) -> str:
    shown = ["/".join(path) for path in paths[:_SHOWN]]
    return f"{shown}{f' and {len(paths) - _SHOWN} more' if len(paths) > _SHOWN else ''}"
