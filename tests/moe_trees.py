"""Parameter trees of MoE code bases in JAX, to test `label_moe_params` on.

`TREES` has the real paths and the real axis orders of each code base, with small sizes, and the
label that each leaf must get. A tree is written as text, a line for leaves that are alike:

    label  axes  path      with a letter for a size (`_SIZES`), `(a|b)` for paths that differ there

and `(prefix, (axis, letters), text)` puts such text under a path, with the stacked layers' sizes
inserted at that axis. `moe_trees_maxtext` has the code bases with Flax or plain dicts.

Where the code bases leave room: one bias or scale an expert on the experts' output is "expert"; a
scale of the router's input is "gate" where its name says router; the shared expert's own gate is
"shared_expert"; a bias in the choice of experts alone is "balance_bias", whoever sets it.
"""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import moe_trees_maxtext


class Leaf(NamedTuple):
    """A leaf, with the axes along which layers are stacked, None where it is of one layer."""

    shape: tuple[int, ...]
    label: str
    layer_axis: int | None = None
    inner_layer_axis: int | None = None  # a second one: only MaxText's scan in a scan has it


class Tree(NamedTuple):
    """A tree of parameters; `style` is one of dict, flat, equinox, haliax, nnx."""

    source: str
    style: str
    leaves: dict[str, Leaf]
    num_layers: int  # layers with a mixture of experts


# D embedding, E experts, F G S widths of experts, dense and shared MLPs, H K heads of queries,
# keys, C a head, Q R low ranks, V vocabulary, P T W others; J L N stacked layers.
_NUMBERS = (8, 12, 7, 20, 28, 4, 6, 2, 3, 5, 11, 9, 10, 24, 25, 64, 13, 1, 2, 4)
_SIZES = dict(zip("CDEFGHJKLNPQRSTVW124", _NUMBERS, strict=True))

_LEVANTER_TOP = (
    "dense V,D (embeddings/token_embeddings|lm_head)/weight\ndense D transformer/norm/weight"
)
_LEVANTER_ATTENTION = """
dense         K,2,C,D  self_attn/q_proj/weight
dense         K,C,D    self_attn/(k|v)_proj/weight
dense         D,H,C    self_attn/o_proj/weight
dense         D        (input|post_attention)_layernorm/weight
"""
# Linear weights are [out, in], MoELinear's are [experts, in, out].
_LEVANTER_MIXTRAL = f"""{_LEVANTER_ATTENTION}
gate          E,D      block_sparse_moe/gate/weight
expert        E,D,F    block_sparse_moe/experts/(w1|w3)/weight
expert        E,F,D    block_sparse_moe/experts/w2/weight
shared_expert F,D      shared_mlp/(gate|up)_proj/weight
shared_expert D,F      shared_mlp/down_proj/weight
"""
_LEVANTER_QWEN3 = f"""{_LEVANTER_ATTENTION}
dense         C        self_attn/(q|k)_norm/weight
gate          E,D      mlp/gate/weight
expert        E,D,F    mlp/experts/(gate|up)_proj/weight
expert        E,F,D    mlp/experts/down_proj/weight
"""

_GRUG_TOP = """
dense         V,D      token_embed
dense         D        (embed|final)_norm/weight
dense         D,W      (embed|final)_gated_norm/w_down
dense         W,D      (embed|final)_gated_norm/w_up
dense         D,V      output_proj
"""
# The bias is under stop_gradient, in top-k only; the train step sets it from the scores' quantiles.
_GRUG = """
dense         D        (rms_attn|rms_mlp)/weight
dense         D,W      (attn|mlp)_gated_norm/w_down
dense         W,D      (attn|mlp)_gated_norm/w_up
dense         D,H*C    attn/w_q
dense         D,K*C    attn/(w_k|w_v)
dense         H*C,D    attn/w_o
dense         D,H      attn/attn_gate
gate          D,E      mlp/router
balance_bias  E        mlp/router_bias
expert        E,F,D    mlp/expert_mlp/w_down
"""
_GRUG_SPLIT = "expert E,D,F mlp/expert_mlp/(w_gate|w_up)"
_GRUG_FUSED = "expert E,D,2*F mlp/expert_mlp/w_gate_up"
_GRUG_SHARED = "shared_expert D,S (w_gate|w_up)\nshared_expert S,D w_down"

_EASYDEL_TOP = (
    "dense V,D model/embed_tokens/embedding\ndense D model/norm/kernel\ndense D,V lm_head/kernel"
)
_EASYDEL_LAYER = """
dense         D,H*C    self_attn/q_proj/kernel
dense         D,K*C    self_attn/(k|v)_proj/kernel
dense         H*C,D    self_attn/o_proj/kernel
dense         D        (input|post_attention)_layernorm/kernel
"""
_EASYDEL_MLP = "dense D,G (gate|up)_proj/kernel\ndense G,D down_proj/kernel"
_EASYDEL_MIXTRAL = """
gate          D,E      block_sparse_moe/gate/kernel
expert        E,D,F    block_sparse_moe/experts/(w1|w3)/kernel
expert        E,F,D    block_sparse_moe/experts/w2/kernel
"""
_EASYDEL_EXPERTS = (
    "expert E,D,F experts/(gate|up)_proj/kernel\nexpert E,F,D experts/down_proj/kernel"
)
_EASYDEL_SHARED = "shared_expert D,S (gate|up)_proj/kernel\nshared_expert S,D down_proj/kernel"
_EASYDEL_QWEN2 = "gate D,E gate/kernel\nshared_expert D,1 shared_expert_gate/kernel\n"
# Nothing in EasyDeL sets the bias. In deepseek_v3 the biased scores are the weights too, so it has
# a gradient there; in glm4_moe and kimi_linear it only chooses, as it is meant to.
_EASYDEL_DEEPSEEK = "gate D,E gate/kernel\nbalance_bias E gate/e_score_correction_bias\n"
_EASYDEL_GPT_OSS = """
gate          D,E      router/kernel
gate_bias     E        router/bias
expert        E,F      experts/(gate|up)_proj/bias
expert        E,D      experts/down_proj/bias
"""

_EXAMPLES_TOP = "dense V,D embedding\ndense D gamma_final\ndense D,V lm_head"
_EXAMPLES_ATTENTION = "dense D,H,C attn/q\ndense D,K,C attn/(k|v)\ndense H,C,D attn/o"
_EXAMPLES_MLP = "dense D,G w_(gate|up)\ndense G,D w_down"
_EXAMPLES_EXPERTS = "gate D,E w_router\nexpert E,D,F we_(gate|up)\nexpert E,F,D we_down"
_EXAMPLES_SHARED = "shared_expert D,S ws_(gate|up)\nshared_expert S,D ws_down"
_EXAMPLES_MLA = """
dense         D,Q      attn/q_a
dense         Q        attn/q_gamma
dense         Q,H,C    attn/q_b
dense         D,R      attn/kv_a
dense         R        attn/kv_gamma
dense         R,H,C    attn/(k_b|v_b)
dense         H,C,D    attn/o
dense         D        gamma_(pre|post)_attn
"""
# The converted checkpoint's e_score_correction_bias, in top-k only (also in kimi_k2 and nemotron3).
_EXAMPLES_BALANCE = "balance_bias E b_router"
_EXAMPLES_GPT_OSS = """
dense         H,C      attn/q_bias
dense         C        attn/sinks
dense         D        attn_(pre|post)_gamma
gate          D,E      ffw/w_router
gate_bias     E        ffw/w_router_bias
expert        E,D,2*F  ffw/we_gate_up
expert        E,2*F    ffw/we_gate_up_bias
expert        E,F,D    ffw/we_down
expert        E,D      ffw/we_down_bias
"""
_EXAMPLES_GEMMA4 = "gate D w_router_scale\nexpert E per_expert_scale"
_EXAMPLES_MAMBA = "dense D,H,C (wg|wx)_in\ndense H,C,D w_out\ndense H*C (gamma|b_conv)"

_TORCH_TOP = "dense V,D (model.embed_tokens|lm_head).weight\ndense D model.norm.weight"
_TORCH_LAYER = """
dense         H*C,D    self_attn.q_proj.weight
dense         K*C,D    self_attn.(k|v)_proj.weight
dense         D,H*C    self_attn.o_proj.weight
dense         D        (input|post_attention)_layernorm.weight
"""
_TORCH_MLP = "dense G,D (gate|up)_proj.weight\ndense D,G down_proj.weight"
_TORCH_GATE = "gate E,D gate.weight"
_TORCH_EXPERTS = "expert F,D (0|1|2).(gate|up)_proj.weight\nexpert D,F (0|1|2).down_proj.weight"
_TORCH_W123 = "expert F,D (0|1|2).(w1|w3).weight\nexpert D,F (0|1|2).w2.weight"
_TORCH_SHARED = "shared_expert S,D (gate|up)_proj.weight\nshared_expert D,S down_proj.weight"
_TORCH_BALANCE = "balance_bias E e_score_correction_bias"
# gate_up_proj is [E, 2 F, D] in transformers 5 (read in copies), [E, D, 2 F] in gpt-oss, Llama 4.
_TORCH_FUSED = "expert E,2*F,D gate_up_proj\nexpert E,D,F down_proj"
_TORCH_FUSED_IN = "expert E,D,2*F gate_up_proj\nexpert E,F,D down_proj"
_TORCH_GPT_OSS = "expert E,2*F gate_up_proj_bias\nexpert E,D down_proj_bias"

_ONE, _L0 = (0, ""), (0, "L")  # one layer; layers stacked at axis 0
_MARIN = "marin-community/marin 00804986: experiments/grug/moe/model.py"
_MARIN_STACKED = "marin-community/marin: experiments/grug, ArrayStacked (commit unknown)"
_LEVANTER = "marin-community/marin 16ad318d: lib/levanter/.../models/mixtral.py; haliax f41e7d4"
_EASYDEL = "erfanzar/EasyDeL 090a03b2: easydel/modules/"
_EXAMPLES = "jax-ml/jax-llm-examples 8b4b246: "
_TORCH = "huggingface/transformers: models/"
_GRUG_ALL = ("blocks/(0|1)/", _ONE, _GRUG)
_TORCH_MIXTRAL = {"mlp": "block_sparse_moe", "layers": "(0|1)"}
_TORCH_ALL = (("", _ONE, _TORCH_TOP), ("model.layers.(0|1).", _ONE, _TORCH_LAYER))
_EASYDEL_ALL = (("", _ONE, _EASYDEL_TOP), ("model/layers/(0|1)/", _ONE, _EASYDEL_LAYER))
_EASYDEL_DENSE = ("model/layers/0/mlp/", _ONE, _EASYDEL_MLP)
_EASYDEL_SPARSE = "model/layers/1/mlp/"


def _examples(file: str, *parts: tuple[str, str]) -> tuple:
    parts = tuple((prefix, _ONE, text) for prefix, text in parts)
    return (_EXAMPLES + file, "equinox", 1, ("", _ONE, _EXAMPLES_TOP), *parts)


def _torch(model: str, *parts: tuple[str, str], mlp: str = "mlp", layers: str = "1") -> tuple:
    parts = tuple((f"model.layers.{layers}.{mlp}.{prefix}", _ONE, text) for prefix, text in parts)
    dense = () if layers != "1" else ((f"model.layers.0.{mlp}.", _ONE, _TORCH_MLP),)
    return (_TORCH + model, "flat", 1 if dense else 2, *_TORCH_ALL, *dense, *parts)


# name: (source, style, number of MoE layers, (prefix, (first stacked axis, sizes), leaves) ...)
_SPECS = {
    "levanter_mixtral": (
        *(_LEVANTER, "haliax", 3, ("", _ONE, _LEVANTER_TOP)),
        ("transformer/layers/stacked/", _L0, _LEVANTER_MIXTRAL),
    ),
    "levanter_mixtral_blocks": (
        *(_LEVANTER, "haliax", 2, ("", _ONE, _LEVANTER_TOP)),
        ("transformer/layers/blocks/(0|1)/", _ONE, _LEVANTER_MIXTRAL),
    ),
    "levanter_qwen3_moe": (
        *("marin-community/marin 239d50d5: lib/levanter/.../models/qwen3_moe.py", "haliax", 3),
        *(("", _ONE, _LEVANTER_TOP), ("transformer/layers/stacked/", _L0, _LEVANTER_QWEN3)),
    ),
    "marin_grug": (
        *(_MARIN, "equinox", 2, ("", _ONE, _GRUG_TOP), _GRUG_ALL),
        *(("blocks/(0|1)/", _ONE, _GRUG_SPLIT), ("blocks/(0|1)/shared/", _ONE, _GRUG_SHARED)),
    ),
    "marin_grug_fused": (
        *(_MARIN, "equinox", 2, ("", _ONE, _GRUG_TOP), _GRUG_ALL),
        *(("blocks/(0|1)/", _ONE, _GRUG_FUSED), ("blocks/(0|1)/shared/", _ONE, _GRUG_SHARED)),
    ),
    "marin_grug_stacked": (
        *(_MARIN_STACKED, "equinox", 3, ("", _ONE, _GRUG_TOP)),
        ("stacked_blocks/stacked/", _L0, _GRUG + _GRUG_SPLIT),
        ("stacked_blocks/stacked/shared/(0|1)/", _L0, _GRUG_SHARED),
    ),
    "easydel_mixtral": (
        *(f"{_EASYDEL}mixtral", "nnx", 2, *_EASYDEL_ALL),
        ("model/layers/(0|1)/", _ONE, _EASYDEL_MIXTRAL),
    ),
    "easydel_qwen2_moe": (
        *(f"{_EASYDEL}qwen2_moe", "nnx", 1, *_EASYDEL_ALL, _EASYDEL_DENSE),
        (_EASYDEL_SPARSE, _ONE, _EASYDEL_QWEN2 + _EASYDEL_EXPERTS),
        (f"{_EASYDEL_SPARSE}shared_expert/", _ONE, _EASYDEL_SHARED),
    ),
    "easydel_deepseek_v3": (
        *(f"{_EASYDEL}deepseek_v3", "nnx", 1, *_EASYDEL_ALL, _EASYDEL_DENSE),
        (_EASYDEL_SPARSE, _ONE, _EASYDEL_DEEPSEEK + _EASYDEL_EXPERTS),
        (f"{_EASYDEL_SPARSE}shared_experts/", _ONE, _EASYDEL_SHARED),
    ),
    "easydel_gpt_oss": (
        *(f"{_EASYDEL}gpt_oss", "nnx", 2, *_EASYDEL_ALL),
        ("model/layers/(0|1)/mlp/", _ONE, _EASYDEL_GPT_OSS + _EASYDEL_EXPERTS),
    ),
    "easydel_llama4": (
        *(f"{_EASYDEL}llama4", "nnx", 1, *_EASYDEL_ALL),
        ("model/layers/0/feed_forward/", _ONE, _EASYDEL_MLP),
        ("model/layers/1/feed_forward/", _ONE, "gate D,E router/kernel\n" + _EASYDEL_EXPERTS),
        ("model/layers/1/feed_forward/shared_expert/", _ONE, _EASYDEL_SHARED),
    ),
    "jax_llm_examples_deepseek_r1": _examples(
        *("deepseek_r1_jax", ("layers/(0|1)/", _EXAMPLES_MLA), ("layers/0/mlp/", _EXAMPLES_MLP)),
        *(("layers/1/mlp/", t) for t in (_EXAMPLES_EXPERTS, _EXAMPLES_BALANCE, _EXAMPLES_SHARED)),
    ),
    "jax_llm_examples_gpt_oss": _examples(
        "gpt_oss", ("layers/0/", _EXAMPLES_ATTENTION), ("layers/0/", _EXAMPLES_GPT_OSS)
    ),
    "jax_llm_examples_gemma4": _examples(
        *("gemma4", ("layers/0/", _EXAMPLES_ATTENTION), ("layers/0/mlp/", _EXAMPLES_MLP)),
        ("layers/0/", "dense D (ffw_pre_gamma_moe|ffw_post_gamma_moe)"),
        *(("layers/0/moe/", _EXAMPLES_EXPERTS), ("layers/0/moe/", _EXAMPLES_GEMMA4)),
    ),
    "jax_llm_examples_nemotron3": _examples(
        *("nemotron3", ("layers/(0|1)/", "dense D gamma"), ("layers/0/ffw/", _EXAMPLES_MAMBA)),
        ("layers/1/ffw/", "expert E,D,F we_up\nexpert E,F,D we_down\ngate D,E w_router"),
        *(("layers/1/ffw/", "shared_expert D,S ws_up"), ("layers/1/ffw/", _EXAMPLES_BALANCE)),
    ),
    "hf_mixtral": _torch(
        *("mixtral 00d4b3d2", ("", _TORCH_GATE), ("experts.", _TORCH_W123)),
        **_TORCH_MIXTRAL,
    ),
    "hf_mixtral_fused": _torch(
        "mixtral 5", ("", _TORCH_GATE), ("experts.", _TORCH_FUSED), layers="(0|1)"
    ),
    "hf_deepseek_v3": _torch(
        *("deepseek_v3 00b676f8", ("", _TORCH_GATE), ("gate.", _TORCH_BALANCE)),
        *(("experts.", _TORCH_EXPERTS), ("shared_experts.", _TORCH_SHARED)),
    ),
    "hf_gpt_oss": _torch(
        *("gpt_oss 00d4b3d2", ("router.", "gate E,D weight\ngate_bias E bias")),
        *(("experts.", _TORCH_FUSED_IN), ("experts.", _TORCH_GPT_OSS)),
        layers="(0|1)",
    ),
    "hf_qwen2_moe": _torch(
        *("qwen2_moe 001f85b3", ("", _TORCH_GATE), ("experts.", _TORCH_EXPERTS)),
        *(("shared_expert.", _TORCH_SHARED), ("", "shared_expert 1,D shared_expert_gate.weight")),
    ),
    "hf_llama4": _torch(
        *("llama4", ("router.", "gate E,D weight"), ("experts.", _TORCH_FUSED_IN)),
        ("shared_expert.", _TORCH_SHARED),
        **{"mlp": "feed_forward"},
    ),
    "hf_minimax_m2": _torch(  # its bias is beside the gate, not under it
        *("minimax_m2", ("", _TORCH_GATE), ("", _TORCH_BALANCE), ("experts.", _TORCH_W123)),
        **_TORCH_MIXTRAL,
    ),
    "hf_ernie4_5_moe": _torch(
        *("ernie4_5_moe", ("", _TORCH_GATE), ("experts.", _TORCH_EXPERTS)),
        ("moe_statics.", "balance_bias 1,E e_score_correction_bias"),
        ("shared_experts.", _TORCH_SHARED),
    ),
}


def _parse(spec: tuple, sizes: Mapping[str, int]) -> Tree:
    """Spells a tree's text out into leaves."""
    source, style, num_layers, *parts = spec
    leaves: dict[str, Leaf] = {}
    for prefix, (axis, stack), text in parts:
        for label, letters, name in map(str.split, filter(None, text.splitlines())):
            axes = [] if letters == "()" else letters.split(",")
            axes[axis:axis] = stack
            shape = tuple(math.prod(sizes[size] for size in size.split("*")) for size in axes)
            stacked = (*range(axis, axis + len(stack)), None, None)[:2]
            pieces = [piece.split("|") for piece in re.split(r"[()]", prefix + name)]
            for path in map("".join, itertools.product(*pieces)):
                assert path not in leaves, path
                leaves[path] = Leaf(shape, label, *stacked)
    return Tree(source, style, leaves, num_layers)


_ALL_SPECS = moe_trees_maxtext.SPECS | _SPECS
TREES = {name: _parse(spec, _SIZES) for name, spec in _ALL_SPECS.items()}
# As many layers as experts: the sizes alone do not tell which axis is which.
for _name in ("maxtext_mixtral_scanned", "maxtext_deepseek3_scanned", "levanter_mixtral"):
    _tree = _parse(_ALL_SPECS[_name], _SIZES | {"L": _SIZES["E"]})
    TREES[f"{_name}_layers_equal_experts"] = _tree._replace(num_layers=_SIZES["E"])


class Module:
    """Stands for an Equinox module: its children have the names of attributes."""

    def __init__(self, fields: Mapping[str, Any]):
        self.__dict__.update(fields)


class NamedArray(Module):
    """Stands for a Haliax array: its child has no name in JAX's key paths."""


def _flatten_with_keys(module: Module) -> tuple:
    children = [(jax.tree_util.GetAttrKey(name), child) for name, child in vars(module).items()]
    return children, tuple(vars(module))


jax.tree_util.register_pytree_with_keys(
    Module,
    _flatten_with_keys,
    lambda names, children: Module(dict(zip(names, children, strict=True))),
)
jax.tree_util.register_pytree_node(
    NamedArray,
    lambda named: ([named.array], None),
    lambda _, leaves: NamedArray({"array": leaves[0]}),
)


def build(tree: Tree) -> Any:
    """Nests the tree's leaves, without values, as the code base has them in memory."""
    leaves = {p: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for p, x in tree.leaves.items()}
    return _nest(leaves, tree.style)


def build_expected_labels(tree: Tree) -> Any:
    """Nests the labels as `build` nests the leaves."""
    return _nest(expected(tree), tree.style)


def expected(tree: Tree) -> dict[str, str]:
    """Says which label the leaf at each path must get."""
    return {path: leaf.label for path, leaf in tree.leaves.items()}


def _nest(leaves: Mapping[str, Any], style: str) -> Any:
    if style == "flat":
        return dict(leaves)
    root: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = (int(k) if k.isdigit() and style != "dict" else k for k in path.split("/"))
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = NamedArray({"array": leaf}) if style == "haliax" else leaf
    if style == "nnx":
        from flax import nnx  # not every JAX that the tests run on can import it

        return nnx.State(jax.tree.map(nnx.Param, root))
    return root if style == "dict" else _modules(root)


def _modules(node: Any) -> Any:
    """Turns dicts with numbers for keys into lists, the others into modules."""
    if not isinstance(node, dict):
        return node
    if 0 in node:
        return [_modules(node[index]) for index in range(len(node))]
    return Module({name: _modules(child) for name, child in node.items()})
