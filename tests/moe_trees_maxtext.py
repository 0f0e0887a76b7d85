"""Trees of MaxText, Flaxformer, V-MoE, axlearn and Tunix, as text for `moe_trees`.

The text's form is told there. MaxText was looked up in AI-Hypercomputer/maxtext at e591f30cb
(2026-08-22), under `src/maxtext`: the modules in `models/*.py`, `layers/moe.py`,
`layers/nnx_decoders.py` and `layers/multi_token_prediction.py`; the paths of both layouts in
`checkpoint_conversion/utils/param_mapping.py`.

NNX trees (the default, `pure_nnx`) start at `decoder/`, Linen's at `params/decoder/`; the rest of a
path is the same. With `scan_layers` (the default) every parameter has its layers at axis 1
(`param_scan_axis`), biases and norms too.
"""

_TOP = """
dense         V,D      token_embedder/embedding
dense         D        decoder/decoder_norm/scale
dense         D,V      decoder/logits_dense/kernel
"""
_TOP_TIED = """
dense         V,D      token_embedder/embedding
dense         D        decoder/decoder_norm/scale
"""
_ATTENTION = """
dense         D,H,C    self_attention/query/kernel
dense         D,K,C    self_attention/(key|value)/kernel
dense         H,C,D    self_attention/out/kernel
dense         D        (pre|post)_self_attention_layer_norm/scale
"""
_MLP = """
dense         D,G      mlp/(wi_0|wi_1)/kernel
dense         G,D      mlp/wo/kernel
"""

_MIXTRAL = f"""{_ATTENTION}
gate          D,E      MoeBlock_0/gate/kernel
expert        E,D,F    MoeBlock_0/(wi_0|wi_1)
expert        E,F,D    MoeBlock_0/wo
"""
# `prefuse_moe_weights`
_MIXTRAL_FUSED = f"""{_ATTENTION}
gate          D,E      MoeBlock_0/gate/kernel
expert        E,D,2*F  MoeBlock_0/wi
expert        E,F,D    MoeBlock_0/wo
"""

_MLA = """
dense         D,Q      self_attention/wq_a/kernel
dense         Q        self_attention/q_norm/scale
dense         Q,H,C    self_attention/wq_b/kernel
dense         D,R      self_attention/wkv_a/kernel
dense         R        self_attention/kv_norm/scale
dense         R,H,2*C  self_attention/wkv_b/kernel
dense         H,C,D    self_attention/out/kernel
dense         D        (pre|post)_self_attention_layer_norm/scale
"""
# The bias is an nnx.Param, in top-k only, and train.py adds the sign rule's update to it. Kimi K2
# has the same block. DeepSeek-V4's bias is no Param (MoEBiasVar), so no tree of parameters has it.
_DEEPSEEK_MOE = """
gate          D,E      DeepSeekMoeBlock_0/MoeBlock_0/gate/kernel
balance_bias  E        DeepSeekMoeBlock_0/MoeBlock_0/gate/bias
expert        E,D,F    DeepSeekMoeBlock_0/MoeBlock_0/(wi_0|wi_1)
expert        E,F,D    DeepSeekMoeBlock_0/MoeBlock_0/wo
shared_expert D,S      DeepSeekMoeBlock_0/shared_experts/(wi_0|wi_1)/kernel
shared_expert S,D      DeepSeekMoeBlock_0/shared_experts/wo/kernel
"""
_MTP_TOP = """
dense         D        mtp_1_(embedding|hidden_state)_norm/scale
dense         2*D,D    mtp_1_projection/kernel
"""

# The bias is part of the logits, so of the weights too: learned.
_GPT_OSS = """
dense         D,H,C    GptOssAttention/query/kernel
dense         H,C      GptOssAttention/query/bias
dense         D,K,C    GptOssAttention/(key|value)/kernel
dense         K,C      GptOssAttention/(key|value)/bias
dense         H,C,D    GptOssAttention/out/kernel
dense         D        GptOssAttention/out/bias
dense         H        GptOssAttention/sinks
dense         D        (pre|post)_self_attention_layer_norm/scale
gate          D,E      GptOssMlp/gate/kernel
gate_bias     E        GptOssMlp/gate/bias
expert        E,D,F    GptOssMlp/(wi_0|wi_1)
expert        E,F      GptOssMlp/(wi_0|wi_1)_bias
expert        E,F,D    GptOssMlp/wo
expert        E,D      GptOssMlp/wo_bias
"""

_QWEN3 = f"""{_ATTENTION}
dense         C        self_attention/(query|key)_norm/scale
gate          D,E      moe_block/gate/kernel
expert        E,D,F    moe_block/(wi_0|wi_1)
expert        E,F,D    moe_block/wo
"""

_QWEN3_NEXT_DELTA = """
dense         D,4*H*C  attention/in_proj_qkvz/kernel
dense         D,2*H    attention/in_proj_ba/kernel
dense         W,1,H*C  attention/conv1d/kernel
dense         H        attention/(A_log|dt_bias)
dense         C        attention/norm/rms_norm/scale
dense         H*C,D    attention/out_proj/kernel
"""
_QWEN3_NEXT_FULL = """
dense         D,H,2*C  attention/attention/query/kernel
dense         D,K,C    attention/attention/(key|value)/kernel
dense         H,C,D    attention/attention/out/kernel
dense         C        attention/attention/(query|key)_norm/scale
"""
_QWEN3_NEXT_MOE = """
dense         D        (input|post_attention)_layernorm/scale
gate          D,E      mlp/routed_experts/gate/kernel
expert        E,D,F    mlp/routed_experts/(wi_0|wi_1)
expert        E,F,D    mlp/routed_experts/wo
shared_expert D,S      mlp/shared_expert/(wi_0|wi_1)/kernel
shared_expert S,D      mlp/shared_expert/wo/kernel
shared_expert D,1      mlp/shared_expert_gate/kernel
"""

_GEMMA4_ATTENTION = """
dense         D,H,C    self_attention/query/kernel
dense         D,K,C    self_attention/(key|value)/kernel
dense         H,C,D    self_attention/out/kernel
dense         C        self_attention/(query|key)_norm/scale
dense         D        (pre|post)_(self_attention|ffw)_norm/scale
dense         1        layer_scalar
"""
# `pre_forward_scale_2` scales the router's input (HF's `router.scale`), which its path does not
# tell. The router's own norm, `gate_norm`, has no parameter.
_GEMMA4_MOE = """
dense         D        mlp/(pre|post)_feedforward_layernorm_2/scale
dense         D        mlp/post_feedforward_layernorm_1/scale
dense         D        mlp/pre_forward_scale_2
gate          D,E      mlp/moe_block/MoeBlock_0/gate/kernel
expert        E,D,F    mlp/moe_block/MoeBlock_0/(wi_0|wi_1)
expert        E,F,D    mlp/moe_block/MoeBlock_0/wo
expert        E        mlp/moe_block/MoeBlock_0/per_expert_scale
shared_expert D,S      mlp/moe_block/shared_experts/(wi_0|wi_1)/kernel
shared_expert S,D      mlp/moe_block/shared_experts/wo/kernel
"""

_LLAMA4_MOE = f"""{_ATTENTION}
gate          D,E      Llama4MoEBlock_0/MoeBlock_0/gate/kernel
expert        E,D,F    Llama4MoEBlock_0/MoeBlock_0/(wi_0|wi_1)
expert        E,F,D    Llama4MoEBlock_0/MoeBlock_0/wo
shared_expert D,S      Llama4MoEBlock_0/shared_experts/(wi_0|wi_1)/kernel
shared_expert S,D      Llama4MoEBlock_0/shared_experts/wo/kernel
"""

_FLAXFORMER_TOP = """
dense         V,D      token_embedder/embedding
dense         D,V      decoder/logits_dense/kernel
"""
_FLAXFORMER_ATTENTION = """
dense         D,H*C    attention/query/kernel
dense         D,C      attention/(key|value)/kernel
dense         H*C,D    attention/out/kernel
dense         D        pre_(attention|mlp)_layer_norm/scale
dense         H,W      relpos_bias/rel_embedding
"""
_FLAXFORMER_MLP = """
dense         D,G      mlp/wi/kernel
dense         G,D      mlp/wo/kernel
"""
# A learned bias, by default.
_FLAXFORMER_MOE = """
gate          D,E      mlp/router/router_weights/w/kernel
gate_bias     E        mlp/router/router_weights/w/bias
expert        E,D,F    mlp/expert/wi/kernel
expert        E,F      mlp/expert/wi/bias
expert        E,F,D    mlp/expert/wo/kernel
expert        E,D      mlp/expert/wo/bias
"""
# Two routers a layer, and the attention's own query and output projections are expert weights.
_FLAXFORMER_FUSED = """
dense         D        layer_norm/scale
dense         D,1,2*C  kv_fused/kernel
gate          D,E      q_wi_fused/router/router_weights/w/kernel
gate          H,W,E    o_wo_fused/router/router_weights/w/kernel
gate_bias     E        (q_wi|o_wo)_fused/router/router_weights/w/bias
expert        E,D,H,P  q_wi_fused/expert/kernel
expert        E,H,W,D  o_wo_fused/expert/kernel
"""

_VMOE = """
dense         4,4,2,D  embedding/kernel
dense         1,1,D    cls
dense         1,T,D    Encoder/posembed_input/pos_embedding
dense         D        Encoder/encoder_norm/(scale|bias)
dense         D,V      head/kernel
dense         D        Encoder/encoderblock_(0|1)/LayerNorm_(0|1)/scale
dense         D,H,C    Encoder/encoderblock_(0|1)/SelfAttention/(query|key|value)/kernel
dense         H,C,D    Encoder/encoderblock_(0|1)/SelfAttention/out/kernel
dense         D,F      Encoder/encoderblock_0/Mlp/Dense_0/kernel
dense         F,D      Encoder/encoderblock_0/Mlp/Dense_1/kernel
gate          D,E      Encoder/encoderblock_1/Moe/Router/dense/kernel
expert        E,D,F    Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel
expert        E,F      Encoder/encoderblock_1/Moe/Mlp/Dense_0/bias
expert        E,F,D    Encoder/encoderblock_1/Moe/Mlp/Dense_1/kernel
expert        E,D      Encoder/encoderblock_1/Moe/Mlp/Dense_1/bias
"""

_AXLEARN_TOP = """
dense         V,D      decoder/emb/token_emb/weight
dense         D        decoder/output_norm/scale
"""
_AXLEARN_ATTENTION = """
dense         D        self_attention/norm/scale
dense         D,W,C    self_attention/attention/i_proj/i_proj/qkv_proj/weight
dense         D,H,C    self_attention/attention/o_proj/weight
dense         C        self_attention/attention/scale_(query|key)/norm/scale
dense         D        feed_forward/(prenorm|postnorm)/scale
"""
_AXLEARN_MLP = """
dense         D,G      feed_forward/(linear1_0|linear1_1)/weight
dense         G,D      feed_forward/linear2/weight
"""
# TopKBiasGating: the sign rule, as a state update of the forward pass.
_AXLEARN_MOE = """
dense         ()       feed_forward/residual_gate_theta
gate          D,E      feed_forward/gate_weight
balance_bias  E        feed_forward/gating/gate_bias
expert        E,D,F    feed_forward/(wi_0|wi_1)_weight
expert        E,F,D    feed_forward/wo_weight
"""

_TUNIX_TOP = "dense V,D embedder/input_embedding\ndense D final_norm/w"
# Experts have the dense MLP's names, beside a router and without "kernel".
_TUNIX_QWEN3 = """
dense         D,H,C    attn/q_proj/w
dense         D,K,C    attn/(k|v)_proj/w
dense         H,C,D    attn/o_proj/w
dense         C        attn/(q|k)_norm/w
dense         D        (input|post_attention)_layernorm/w
gate          D,E      mlp/router/kernel
expert        E,D,F    mlp/(gate|up)_proj
expert        E,F,D    mlp/down_proj
"""
_TUNIX_GEMMA4 = """
dense         H,D,C    attn/q_einsum/w
dense         2,K,D,C  attn/kv_einsum/w
dense         H,C,D    attn/attn_vec_einsum/w
dense         C        attn/(_query|_key)_norm/scale
dense         D        (pre_attention|pre_ffw|moe_pre_ffw|moe_post_ffw|dense_post_ffw)_norm/scale
dense         D,G      mlp/(gate|up)_proj/kernel
dense         G,D      mlp/down_proj/kernel
dense         D,P      per_layer_input_gate/w
dense         P,D      per_layer_projection/w
dense         1        skip_scale
gate          D,E      moe/router_logits
gate          D        moe/router_scale
expert        E,2,F,D  moe/gating_einsum
expert        E,F,D    moe/linear
expert        E        moe/per_expert_scale
"""

_MAXTEXT = "AI-Hypercomputer/maxtext e591f30cb: src/maxtext/"
_FLAXFORMER = "google/flaxformer 399ea3a: architectures/moe/"
_AXLEARN = "apple/axlearn 34aed43c: common/mixture_of_experts.py"
_SCAN = (1, "L")
_DENSE_SCAN = (1, "J")
_DOUBLE_SCAN = (1, "LN")
_NO_SCAN = (0, "")

# name: (file, style, number of MoE layers, (prefix, (first stacked axis, sizes), leaves) ...)
SPECS = {
    "maxtext_mixtral_scanned": (
        *(f"{_MAXTEXT}models/mixtral.py", "nnx", 3, ("", _NO_SCAN, _TOP)),
        ("decoder/layers/", _SCAN, _MIXTRAL),
    ),
    "maxtext_mixtral_scanned_linen": (
        *(f"{_MAXTEXT}models/mixtral.py", "dict", 3, ("params/", _NO_SCAN, _TOP)),
        ("params/decoder/layers/", _SCAN, _MIXTRAL),
    ),
    "maxtext_mixtral_scanned_fused": (
        *(f"{_MAXTEXT}models/mixtral.py", "nnx", 3, ("", _NO_SCAN, _TOP)),
        ("decoder/layers/", _SCAN, _MIXTRAL_FUSED),
    ),
    "maxtext_mixtral_unscanned": (
        *(f"{_MAXTEXT}models/mixtral.py", "nnx", 2, ("", _NO_SCAN, _TOP)),
        ("decoder/layers_(0|1)/", _NO_SCAN, _MIXTRAL),
    ),
    "maxtext_deepseek3_scanned": (
        *(f"{_MAXTEXT}models/deepseek.py", "nnx", 3, ("", _NO_SCAN, _TOP)),
        ("decoder/dense_layers/", _DENSE_SCAN, _MLA + _MLP),
        ("decoder/moe_layers/", _SCAN, _MLA + _DEEPSEEK_MOE),
    ),
    # The layer for multi-token prediction is never scanned: a bias [E] beside the decoder's [E, L].
    "maxtext_deepseek3_scanned_mtp": (
        *(f"{_MAXTEXT}layers/multi_token_prediction.py", "nnx", 4, ("", _NO_SCAN, _TOP)),
        ("decoder/moe_layers/", _SCAN, _DEEPSEEK_MOE),
        ("mtp_block/mtp_layer_1/", _NO_SCAN, _MTP_TOP),
        ("mtp_block/mtp_layer_1/mtp_1_transformer_layer/", _NO_SCAN, _MLA + _DEEPSEEK_MOE),
    ),
    "maxtext_deepseek3_unscanned_linen": (
        *(f"{_MAXTEXT}models/deepseek.py", "dict", 2, ("params/", _NO_SCAN, _TOP)),
        ("params/decoder/dense_layers_0/", _NO_SCAN, _MLA + _MLP),
        ("params/decoder/moe_layers_(0|1)/", _NO_SCAN, _MLA + _DEEPSEEK_MOE),
    ),
    # Layers that differ in kind make a block, and the blocks are scanned: 2 kinds x 3 blocks.
    "maxtext_gpt_oss_scanned": (
        *(f"{_MAXTEXT}models/gpt_oss.py", "nnx", 6, ("", _NO_SCAN, _TOP)),
        ("decoder/layers/layers_(0|1)/", _SCAN, _GPT_OSS),
    ),
    "maxtext_gpt_oss_unscanned": (
        *(f"{_MAXTEXT}models/gpt_oss.py", "nnx", 2, ("", _NO_SCAN, _TOP)),
        ("decoder/layers_(0|1)/", _NO_SCAN, _GPT_OSS),
    ),
    "maxtext_qwen3_moe_scanned": (
        *(f"{_MAXTEXT}models/qwen3.py", "nnx", 3, ("", _NO_SCAN, _TOP)),
        ("decoder/layers/", _SCAN, _QWEN3),
    ),
    "maxtext_qwen3_moe_unscanned_linen": (
        *(f"{_MAXTEXT}models/qwen3.py", "dict", 2, ("params/", _NO_SCAN, _TOP)),
        ("params/decoder/layers_(0|1)/", _NO_SCAN, _QWEN3),
    ),
    "maxtext_qwen3_next_scanned": (
        *(f"{_MAXTEXT}models/qwen3.py", "nnx", 6, ("", _NO_SCAN, _TOP)),
        ("decoder/layers/layer_0/", _SCAN, _QWEN3_NEXT_DELTA + _QWEN3_NEXT_MOE),
        ("decoder/layers/layer_1/", _SCAN, _QWEN3_NEXT_FULL + _QWEN3_NEXT_MOE),
    ),
    "maxtext_qwen3_next_unscanned": (
        *(f"{_MAXTEXT}models/qwen3.py", "nnx", 2, ("", _NO_SCAN, _TOP)),
        ("decoder/layers_0/", _NO_SCAN, _QWEN3_NEXT_DELTA + _QWEN3_NEXT_MOE),
        ("decoder/layers_1/", _NO_SCAN, _QWEN3_NEXT_FULL + _QWEN3_NEXT_MOE),
    ),
    # Three blocks of five local layers and one global layer, and one layer that is left over. The
    # local layers are scanned in the scan of blocks, so they have two stacked axes, 1 and 2.
    "maxtext_gemma4_scanned": (
        *(f"{_MAXTEXT}models/gemma4.py", "nnx", 19, ("", _NO_SCAN, _TOP_TIED)),
        ("decoder/scanned_blocks/local_layers/", _DOUBLE_SCAN, _GEMMA4_ATTENTION + _GEMMA4_MOE),
        ("decoder/scanned_blocks/global_layer/", _SCAN, _GEMMA4_MOE),
        ("decoder/layers_remainder/layers_0/", _NO_SCAN, _GEMMA4_MOE),
    ),
    "maxtext_gemma4_unscanned": (
        *(f"{_MAXTEXT}models/gemma4.py", "nnx", 1, ("", _NO_SCAN, _TOP_TIED)),
        ("decoder/layers_0/", _NO_SCAN, _GEMMA4_ATTENTION + _GEMMA4_MOE),
    ),
    "maxtext_llama4_scanned": (
        *(f"{_MAXTEXT}models/llama4.py", "nnx", 3, ("", _NO_SCAN, _TOP)),
        ("decoder/layers/layers_0/", _SCAN, _ATTENTION + _MLP),
        ("decoder/layers/layers_1/", _SCAN, _LLAMA4_MOE),
    ),
    "maxtext_llama4_unscanned_linen": (
        *(f"{_MAXTEXT}models/llama4.py", "dict", 1, ("params/", _NO_SCAN, _TOP)),
        ("params/decoder/layers_0/", _NO_SCAN, _ATTENTION + _MLP),
        ("params/decoder/layers_1/", _NO_SCAN, _LLAMA4_MOE),
    ),
    "flaxformer_scanned": (
        *(f"{_FLAXFORMER}moe_architecture_test.py", "dict", 3, ("", _NO_SCAN, _FLAXFORMER_TOP)),
        ("encoder/encoder/subblock_0/", _SCAN, _FLAXFORMER_ATTENTION + _FLAXFORMER_MLP),
        ("encoder/encoder/subblock_1/", _SCAN, _FLAXFORMER_ATTENTION + _FLAXFORMER_MOE),
    ),
    "flaxformer_unscanned": (
        *(f"{_FLAXFORMER}moe_architecture_test.py", "dict", 1, ("", _NO_SCAN, _FLAXFORMER_TOP)),
        ("encoder/layers_0/", _NO_SCAN, _FLAXFORMER_ATTENTION + _FLAXFORMER_MLP),
        ("encoder/layers_1/", _NO_SCAN, _FLAXFORMER_ATTENTION + _FLAXFORMER_MOE),
    ),
    "flaxformer_parallel_fused": (
        *(
            f"{_FLAXFORMER}moe_parallel_fused_decoder_test.py",
            "dict",
            2,
            ("", _NO_SCAN, _FLAXFORMER_TOP),
        ),
        ("decoder/layers_(0|1)/", _NO_SCAN, _FLAXFORMER_FUSED),
    ),
    "vmoe": (*("google-research/vmoe 942a78b: nn/vit_moe.py", "dict", 1, ("", _NO_SCAN, _VMOE)),),
    # The paths are those of experiments/testdata/*/envy-Switch-Base_init.txt.
    "axlearn_repeated": (
        *(_AXLEARN, "dict", 3, ("", _NO_SCAN, _AXLEARN_TOP)),
        ("decoder/transformer/repeat/layer/layer0/", (0, "L"), _AXLEARN_ATTENTION + _AXLEARN_MLP),
        ("decoder/transformer/repeat/layer/layer1/", (0, "L"), _AXLEARN_ATTENTION + _AXLEARN_MOE),
    ),
    "axlearn_stacked": (
        *(_AXLEARN, "dict", 1, ("", _NO_SCAN, _AXLEARN_TOP)),
        ("decoder/transformer/layer0/", _NO_SCAN, _AXLEARN_ATTENTION + _AXLEARN_MLP),
        ("decoder/transformer/layer1/", _NO_SCAN, _AXLEARN_ATTENTION + _AXLEARN_MOE),
    ),
    "tunix_qwen3": (
        *("google/tunix c7d8950f: tunix/models/qwen3/model.py", "nnx", 2),
        ("", _NO_SCAN, _TUNIX_TOP + "\ndense D,V lm_head/w"),
        ("layers/(0|1)/", _NO_SCAN, _TUNIX_QWEN3),
    ),
    "tunix_gemma4": (
        *("google/tunix c7d8950f: tunix/models/gemma4/moe.py, model.py, attention.py", "nnx", 1),
        ("", _NO_SCAN, "dense V,D embedder/input_embedding\ndense D final_norm/scale"),
        ("layers/0/", _NO_SCAN, _TUNIX_GEMMA4),
    ),
}
