"""Fields of a config that no shape depends on, each under the reason.

`Config` knows which fields were read. What was not read and is not listed here may bear on shapes, so `manifest` names
it and refuses: see `unread`. To list a field here is to say that no linear layer and no expert depends on it, in any
model that these rules read. What is harmless in one family only (the K and V heads of latent attention) stands there.
"""

from __future__ import annotations

from cachebuilder.authoring.derive.config import Config

#: Reason → names.
HARMLESS: dict[str, str] = {
    "names the model or its files": """
        _commit_hash _name_or_path architecture architectures auto_map custom_pipelines dtype language
        language_model_arch model_name name_or_path params_dtype torch_dtype transformers_version version
    """,
    "vocabulary and embeddings: neither engine quantises them": """
        embedding_initializer_range embedding_multiplier enable_lm_head_fp32 final_logit_softcapping
        head_dtype lm_head_fp32 logit_scale logits_scaling mtp_use_dedicated_embeddings norm_head norm_softmax
        num_embeddings output_logits_scale pad_vocab_size padded_vocab_size scale_emb text_vocab_size
        tie_encoder_decoder tie_word_embeddings unpadded_vocab_size vocab_multiple_of vocab_size
        vocab_size_per_layer_input word_embed_proj_dim
    """,
    "generation, or the interface of transformers": """
        _attn_implementation _attn_implementation_autoset _experts_implementation activation_alpha
        activation_function activation_limit add_cross_attention attn_implementation bad_words_ids
        begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size diversity_penalty do_sample
        early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
        forced_bos_token_id forced_eos_token_id generation_config gradient_checkpointing hidden_act
        hidden_activation id2label is_causal is_decoder is_encoder_decoder keys_to_ignore_at_inference
        label2id length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups
        num_beams num_labels num_return_sequences output_attentions output_hidden_states output_router_logits
        output_scores prefix pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty
        return_dict return_dict_in_generate suppress_tokens swiglu_alpha swiglu_limit swiglu_limits
        swiglu_limits_shared task_specific_params temperature tf_legacy_loss tie_weights tokenizer_class top_k
        top_p torchscript typical_p use_bfloat16 use_cache use_flash_attn use_grouped_mm
    """,
    "positions: rotary embedding, the longest context, which keys a query sees": """
        _sliding_window_pattern add_full_attention_sink_bias add_swa_attention_sink_bias apply_rope_all_layers
        attention_chunk_size attention_multiplier attention_value_scale attn_logit_softcapping attn_scale
        attn_temperature_tuning compress_rope_theta floor_scale freq_allocation indexer_rope_interleave
        local_attention max_model_len max_position_embeddings max_seq_len max_sequence_length
        max_window_layers model_max_length mrope_interleaved mrope_section no_rope_layer_interval
        no_rope_layers nope_layer_interval original_max_position_embeddings partial_rotary_factor
        partial_rotary_factors position_embedding_type query_pre_attn_scalar rope_interleave
        rope_is_neox_style rope_local_base_freq rope_parameters rope_percentage rope_scaling rope_theta
        rope_type rotary_base rotary_dim rotary_pct rotary_percent seq_length sink sliding_window
        sliding_window_pattern sliding_window_size sliding_windows swa_rope_theta use_bidirectional_attention
        use_mrope use_rope_layers use_rotary_pos_emb use_sliding_window window_size yarn_only_types
    """,
    "norms, biases and scales: vectors, or constants": """
        attention_bias attention_out_bias bias enable_attention_fp32_softmax enable_bias hc_eps
        hc_sinkhorn_iters init_std initializer_range initializer_std layer_norm_eps layer_norm_epsilon
        layernorm_epsilon layernorm_full_attention_beta layernorm_linear_attention_beta layernorm_mlp_beta
        linear_conv_kernel_dim mamba_ssm_dtype mla_scale_kv_lora mla_scale_q_lora mlp_bias norm_eps norm_type
        o_bias output_gate_type post_norm pre_norm qk_layernorm qk_norm qk_norm_type qkv_bias
        residual_multiplier rms_norm rms_norm_eps use_bias use_norm use_post_norm use_qk_norm use_qkv_bias
        use_rmsnorm zero_centered
    """,
    "the router: it is not quantised, and chooses experts without changing their shape": """
        enable_moe_fp32_combine gate_norm_prob_alpha moe_gate moe_norm_gate_logits moe_norm_min
        moe_router_activation moe_router_bias moe_router_dtype moe_router_enable_expert_bias moe_router_fusion
        moe_router_scaling_factor moe_router_topk_scaling_factor moe_router_use_sigmoid moe_use_aux_free
        multi_gate n_group need_fp32_gate norm_expert_weight norm_topk norm_topk_prob num_expert_group
        num_hash_layers rounter_params_dtype route_norm routed_scaling_factor router_bias router_dtype
        router_jitter_noise router_scaling_factor router_type score_func score_function scoring_func
        topk_group topk_method use_moe_router_bias use_routing_bias zero_expert_num zero_expert_type
    """,
    "models beside the text model that these engines do not run, or run with another config": """
        code2wav_config language_model_only talker_config ts_config
    """,
    "training": """
        attention_dropout attention_probs_dropout_prob attn_pdrop aux_loss_alpha aux_loss_coef
        classifier_dropout embd_pdrop embedding_dropout enable_mtp_magic_send ep_size fuse_rope hidden_dropout
        hidden_dropout_prob load_balancing_loss moe_aux_loss_coeff moe_capacity moe_layer_recompute
        moe_router_loss moe_token_drop mtp_loss_scaling_factor multi_token_pred_lambda output_dropout
        output_router_loss pretraining_sequence_length recompute resid_pdrop residual_dropout rezero_init
        router_aux_loss_coef router_z_loss_coef seq_aux use_fused_head_loss use_recompute
        weight_share_add_bias z_loss_coef
    """,
    "the image's or the sound's way into the text, outside the towers": """
        audio_token_index boi_token_index deepstack_visual_indexes downsample_ratio dynamic_image_size
        enable_audio_output eoi_token_index force_image_size image_seq_length image_size image_token_index
        max_dynamic_patch min_dynamic_patch mm_tokens_per_image multi_modal_projector_bias
        multimodal_projector_bias pad2square position_id_per_seconds projector_bias projector_dropout
        projector_hidden_act ps_version seconds_per_chunk select_layer spatial_merge_size template
        use_backbone_lora use_llm_lora use_thumbnail video_token_index vision_feature_layer
        vision_feature_select_strategy
    """,
}

#: Fields whose names end like this: numbers of tokens of the vocabulary, and probabilities of training.
HARMLESS_ENDINGS = ("_token_id", "_token_ids", "_loss_coef", "_loss_weight", "_dropout_prob", "_loss_coeff")

#: Of ``quantization_config``: what the checkpoint's tool notes about itself; formats of the KV cache. So are empty
#: fields: of ``sparsity_config`` and ``transform_config``, other values change the layers.
HARMLESS_QUANTIZATION = """
    dequantize fmt format global_compression_ratio is_checkpoint_fp8_serialized kv_cache_quant_algo
    kv_cache_scheme modules_to_convert_dtype original_dtype packed_modules_mapping producer quant_library
    quantization_status run_compressed scale_fmt store_dtype_of_kv_cache use_deep_gemm version
"""

#: Objects that describe a tower of another modality, and what the checkpoint calls the tower's modules.
TOWERS = {
    "vision_config": ("visual", "vision", "vit"),
    "audio_config": ("audio",),
}

_NAMES = frozenset(name for names in HARMLESS.values() for name in names.split())


def unread(config: Config, unused: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Fields that may bear on shapes and that no rule read, in the order of the config.

    A tower of another modality counts as read where the checkpoint's list of unquantised modules names it.

    Args:
        unused: what this model's family says that no shape depends on.
    """
    harmless = _NAMES.union(unused)
    unquantized = [entry.lower() for entry in config.unconverted]
    names = [
        name
        for name in dict.fromkeys([*config.fields.unread, *config.around.unread])
        if name not in harmless
        and name not in ("quantization_config", "model_type", "text_config", "llm_config", "thinker_config")
        and not name.endswith(HARMLESS_ENDINGS)
        and not any(word in entry for word in TOWERS.get(name, ()) for entry in unquantized)
    ]
    quantization = [
        name
        for name in config.quantization.unread
        if name not in HARMLESS_QUANTIZATION.split() and config.quantization[name]
    ]
    return (*names, *(f"quantization_config.{name}" for name in quantization))
