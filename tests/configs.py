"""Model configurations as data: the fields that shapes follow from, each with its source.

The sources are the classes' own defaults in transformers (``CONFIG_MAPPING[model_type]()``), whose DeepSeek-V3, V3.2,
V4 and Qwen3-Next defaults are the released models'; public training scripts; and MODEL_SHAPES.md. Each has the
``quantization_config`` of the released block-FP8 checkpoint, except GLM-4.5: see its comment.
"""

from __future__ import annotations

from typing import Any

BLOCK_FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

#: transformers' DeepseekV3Config defaults; num_nextn_predict_layers: the checkpoint's README_WEIGHTS.md (one MTP layer).
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "quantization_config": BLOCK_FP8,
}

#: transformers' DeepseekV32Config defaults for what it adds to V3.
DEEPSEEK_V32: dict[str, Any] = {
    **DEEPSEEK_V3,
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}

#: transformers' DeepseekV4Config defaults: V4-Flash. compress_ratios is invented (the released list was not found).
DEEPSEEK_V4_FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 43,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "hc_mult": 4,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
    "expert_dtype": "fp4",
    "max_position_embeddings": 1048576,
    "quantization_config": {**BLOCK_FP8, "scale_fmt": "ue8m0"},
}

#: Hidden size, heads, experts and the one dense layer are those of MODEL_SHAPES.md; the rest is DeepSeek V3's. Not checked
#: against a published config.json.
KIMI_K2: dict[str, Any] = {
    **DEEPSEEK_V3,
    "model_type": "kimi_k2",
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 131072,
}

#: slime (github.com/zyzshishui/slime), scripts/models/qwen3-235B-A22B.sh.
QWEN3_235B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
    "quantization_config": {
        **BLOCK_FP8,
        "modules_to_not_convert": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(94))],
    },
}

#: slime, scripts/models/qwen3-30B-A3B.sh.
QWEN3_30B: dict[str, Any] = {
    **QWEN3_235B,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
}

#: transformers' Qwen3NextConfig defaults: 80B-A3B. Its Instruct-FP8 checkpoint is block FP8.
QWEN3_NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 262144,
    "quantization_config": BLOCK_FP8,
}

#: slime, scripts/models/glm4.5-355B-A32B.sh. The released GLM-4.5-FP8 was not at hand. Block FP8 stands in for it,
#: so that the shapes can be tested; a checkpoint with one scale for each channel is refused (test_models.py).
GLM_45: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 131072,
    "quantization_config": BLOCK_FP8,
}

#: A decoder whose architecture has no rule.
UNKNOWN: dict[str, Any] = {
    "architectures": ["SomethingNewForCausalLM"],
    "model_type": "something_new",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "quantization_config": BLOCK_FP8,
}
