"""The keys of ERNIEKit 1.3 and PaddleFormers 1.2 training files, and what becomes of each; tables only.

A key is read by a rule (RULED), translated one to one (DIRECT), accepted at certain values (ONLY_AT), or
without effect on the result here (NO_EFFECT). Where the toolkits spell a key differently, ERNIEKit's spelling
stands for both.
"""

from __future__ import annotations

# PaddleFormers' spelling -> the spelling of the tables below.
SYNONYMS = {
    "_attn_implementation": "use_flash_attention",
    "apply_rope_fusion": "fuse_rope",
    "context_parallel_size": "context_parallel_degree",
    "expert_model_parallel_size": "expert_parallel_degree",
    "expert_tensor_model_parallel_size": "expert_tensor_parallel_degree",
    "loss_subbatch_sequence_length": "loss_subbatch_seqlen",
    "max_length": "max_seq_len",
    "moe_router_bias_update_rate": "moe_use_aux_free_update_coef",
    "mtp_num_layers": "num_nextn_predict_layers",
    "pipeline_model_parallel_size": "pipeline_parallel_degree",
    "router_aux_loss_coef": "moe_aux_loss_lambda",
    "router_z_loss_coef": "moe_z_loss_lambda",
    "sep_parallel_size": "sep_parallel_degree",
    "sharding_parallel_size": "sharding_parallel_degree",
    "template": "chat_template",
    "tensor_model_parallel_size": "tensor_parallel_degree",
    "use_attn_mask_startend_row_indices": "use_attn_mask_start_row_indices",
    "use_filtered_label_loss": "use_sparse_head_and_loss_fn",
    "virtual_pipeline_model_parallel_size": "virtual_pp_degree",
    "visual_ld": "vit_lr_ratio",
}

# Key -> our key, its type, and what both toolkits take when it is not given (None: it does not matter).
DIRECT: dict[str, tuple[str, type, object]] = {
    "output_dir": ("train.output", str, None),
    "max_seq_len": ("data.max_length", int, 4096),
    "min_pixels": ("data.min_pixels", int, None),
    "max_pixels": ("data.max_pixels", int, None),
    "dataloader_num_workers": ("data.workers", int, None),
    "gradient_accumulation_steps": ("train.accumulation", int, 1),
    "learning_rate": ("train.learning_rate", float, 5e-5),
    "weight_decay": ("train.weight_decay", float, 0.0),
    "adam_beta1": ("train.beta1", float, 0.9),
    "adam_beta2": ("train.beta2", float, 0.999),
    "adam_epsilon": ("train.epsilon", float, 1e-8),
    "seed": ("train.seed", int, 42),
    "logging_steps": ("train.log_every", int, None),
    "save_total_limit": ("train.keep_last", int, None),
}

RULED = frozenset(
    """
    attention_probs_dropout_prob dropout_warmup_steps layerwise_lr_decay_bound mask_out_eos_token
    ignore_eos_token
    weight_quantize_algo
    model_name_or_path tokenizer_name_or_path compute_type bf16 fp16 chat_template stage fine_tuning lora
    freeze_config from_scratch lora_rank lora_alpha rslora rslora_plus lora_plus_scale moe_gate_lr_ratio
    vit_lr_ratio train_dataset_path text_dataset_path eval_dataset_path mix_strategy modality_ratio
    random_shuffle dataloader_shuffle packing one_sample_in_one_seq truncation_strategy split_multi_turn
    num_train_epochs max_steps batch_size per_device_train_batch_size global_batch_size loss_subbatch_seqlen
    max_grad_norm recompute recompute_granularity use_recompute_moe
    offload_recompute_inputs offload_optim tensorwise_offload_optimizer recompute_modules
    lr_scheduler_type lr_scheduler warmup_steps warmup_ratio
    min_lr do_train do_eval evaluation_strategy eval_steps max_evaluate_steps metric_for_best_model
    greater_is_better save_strategy save_steps
    overwrite_output_dir resume_from_checkpoint tensor_parallel_degree pipeline_parallel_degree
    sharding_parallel_degree expert_parallel_degree context_parallel_degree sep_parallel_degree
    sequence_parallel sharding moe_aux_loss_lambda moe_z_loss_lambda moe_orthogonal_loss_lambda
    moe_use_aux_free_update_coef neftune neftune_noise_alpha video_fps video_max_frames
    """.split()  # noqa: SIM905
)

_CHECKPOINT = "the model is taken as its checkpoint says"
_PREPARE = "prepare the data with it and name the resulting files"
_FRAME_SIZES = (
    "the checkpoint's video_preprocessor_config.json says it (size, min_frames), else ERNIE's default"
)
_RESUME = "a resume always restores the optimizer and the place in the data"

# Key -> the values that ask for nothing, and why another value is refused.
ONLY_AT: dict[str, tuple[tuple[object, ...], str]] = {
    "adaptive_max_imgtoken_option": ((), "pictures keep their own size between min_pixels and max_pixels"),
    "adaptive_max_imgtoken_rate": ((), "pictures keep their own size between min_pixels and max_pixels"),
    "adaptive_norm_clip": ((False,), "gradients are clipped by their global norm (max_grad_norm)"),
    "continue_training": ((True,), "write a random model with `ernietune init` and name that instead"),
    "custom_register_path": ((), "code named in a configuration is not run"),
    "data_filelist": ((), "name the files in train_dataset_path"),
    "data_weights": ((), "files are not weighted"),
    "dataset_type": (("iterable",), _PREPARE),
    "decay_steps": ((), "the rate falls over all steps"),
    "device": (("gpu", "cpu"), "the installed build of Paddle decides; it must be for a GPU or a CPU"),
    "encode_one_turn": ((True,), "turns are encoded one by one"),
    "eval_with_do_generation": (
        (False,),
        "pass train.eval_generate (a number), or use `ernietune eval` on the run",
    ),
    "fp8": ((False,), "train in bf16"),
    "freeze_training": ((False,), "name what trains in train.trainable"),
    "hidden_dropout_prob": ((0,), "there is no dropout in the model, only in adapters (lora.dropout)"),
    "hidden_size": ((), _CHECKPOINT),
    "ignore_data_skip": ((False,), _RESUME),
    "ignore_load_lr_and_optim": ((False,), _RESUME),
    "intermediate_size": ((), _CHECKPOINT),
    "lora_path": ((), "pass model.path=FOLDER to go on with an adapter in PEFT's layout"),
    "moe_dropout_prob": ((0,), "there is no dropout in the model, only in adapters (lora.dropout)"),
    "moe_expert_capacity_factor": ((0,), "no token is dropped"),
    "moe_group_experts": ((False,), _CHECKPOINT),
    "moe_router_force_load_balancing": ((False,), _CHECKPOINT),
    "multi_latent_attention": ((False,), _CHECKPOINT),
    "n_routed_experts": ((), _CHECKPOINT),
    "new_special_tokens_path": ((), "the vocabulary stays as it is"),
    "no_cuda": ((False,), "hide the cards with CUDA_VISIBLE_DEVICES= instead"),
    "normalization": (("RMSNorm",), _CHECKPOINT),
    "num_attention_heads": ((), _CHECKPOINT),
    "num_cycles": ((0.5,), "the cosine falls once"),
    "num_experts_per_tok": ((), _CHECKPOINT),
    "num_hidden_layers": ((), _CHECKPOINT),
    "num_key_value_heads": ((), _CHECKPOINT),
    "num_nextn_predict_layers": ((0,), "multi-token prediction layers are kept as they are, and not trained"),
    "offline_dataset_path": ((), _PREPARE),
    "optim": (("adamw", "adamw_custom", "adamw_torch"), "the optimizer is AdamW"),
    "position_embedding_type": (("rope",), _CHECKPOINT),
    "ref_model_update_steps": ((-1,), "the reference is the model as it was before training"),
    "skip_data_intervals": ((), "leave the records out of the data files"),
    "softmax_scale": ((), _CHECKPOINT),
    "softmax_type": (("vanilla",), _CHECKPOINT),
    "spatial_conv_size": ((2,), _CHECKPOINT),
    "tie_word_embeddings": ((), _CHECKPOINT),
    "train_emb_only": ((0,), "name what trains in train.trainable: [embeddings]"),
    "train_moe_only": ((0,), "name what trains in train.trainable: [experts]"),
    "train_mtp_only": ((False,), "multi-token prediction layers are kept as they are, and not trained"),
    "render_timestamp": ((True,), "the time is always drawn on the frames of videos, as the models know it"),
    "use_fp8": ((False,), "train in bf16"),
    "use_pic_id": ((True,), "the chat format numbers the pictures"),
    "use_qk_norm": ((), _CHECKPOINT),
    "use_template": ((True,), "conversations are always written in the model's chat format"),
    "variable_resolution": ((True,), "pictures keep their own size between min_pixels and max_pixels"),
    "video_frames_sample": (("middle",), "a frame is taken from the middle of its stretch of time"),
    "video_max_pixels": ((937664,), _FRAME_SIZES),
    "video_min_frames": ((16,), _FRAME_SIZES),
    "video_min_pixels": ((234416,), _FRAME_SIZES),
    "video_target_frames": ((-1,), "give target_frames in the records' video_url"),
    "vision_model_name_or_path": ((), "the vision tower is read from model_name_or_path"),
    "wandb_api_key": ((), "a secret does not belong in a configuration that is copied into every run folder"),
    "zcc_save_ema_coef": ((), "no moving average of the weights is kept"),
}

# Why a group of keys has no effect here -> the keys.
NO_EFFECT: dict[str, str] = {
    "kernels and fusion (the same numbers, other speed)": """
        use_flash_attention use_mem_eff_attn use_flash_attn_with_mask use_attn_mask_start_row_indices
        use_sparse_flash_attn use_sparse_head_and_loss_fn use_fused_head_and_loss_fn fuse_linear fuse_rope
        fuse_softmax_mask fuse_rms_norm fuse_swiglu fuse_gate_detach_matmul enable_linear_fused_grad_add
        fa_version fp32_residual_connection fuse_optimizer_states high_precision_rope moe_deep_gemm
        moe_dequant_input moe_expert_fusion moe_router_fusion moe_use_fusion_node
        mp_fused_linear_param_grad_add mp_skip_c_identity replace_with_c_embedding
        replace_with_parallel_cross_entropy tensor_fusion use_fast_layer_norm use_fused_linear_cross_entropy
        use_global_causal_attn use_intermediate_api use_unified_moe using_sonic_moe deterministic_mode
        to_static enable_auto_parallel model_with_dpo_criterion""",
    "several cards (how they share the work is ours)": """
        use_sp_callback tensor_parallel_config pipeline_parallel_config sharding_parallel_config
        data_parallel_config sequence_parallel_config sharding_degree sharding_comm_buffer_size_MB
        sharding_parallel_mesh_dimension virtual_pp_degree pp_seg_method pp_need_data pp_need_data_degree
        disable_pipeline_warmup add_tail_layers tensor_parallel_output expert_tensor_parallel_degree
        use_expert_parallel moe_group moe_multimodal_dispatch_use_allgather moe_with_send_router_loss
        enable_mtp_magic_send balanced_image_preprocess distributed_dataloader split_inputs_sequence_dim
        fuse_sequence_parallel_allreduce hybrid_parallel_topo_order split_norm_comm
        ddp_find_unused_parameters use_train_part_sharding text_use_train_part_sharding num_of_gpus
        force_reshard_pp auto_parallel_resume_form_hybrid_parallel auto_parallel_sync_shared_params
        batch_p2p_comm best_unbalanced_scheduler clear_every_step_cache cp_balance_mode cp_comm_type
        dp_allreduce_avg_in_gradinent_scale dp_comm_overlap experimental_dataflow
        forward_backward_overlap_scheduler gradient_sync_after_accumulate hybrid_parallel_expert_grad_scale
        moe_deepep_num_sms moe_ep_barrier moe_shared_expert_overlap moe_token_dispatcher_type
        moe_token_drop_policy moe_pad_expert_input_to_capacity mp_async_allreduce nccl_comm_group_config
        non_batch_p2p_comm num_consecutive num_empty_layers_add_in_head num_empty_layers_add_in_tail overlap
        overlap_p2p_comm p2p_cache_shape partial_send_recv pp_delay_scale_loss pp_release_grads
        pp_sharding_comm_overlap pp_sync_moment pp_sync_param reorder_pipeline_priority sd_release_grads
        sd_sharding_comm_overlap sd_shardingv1_comm_overlap send_recv_overlap sharding_comm_group_call_opt
        shuffle_consecutive sp_allreduce_avg_in_gradinent_scale sp_async_reduce_scatter split_backward
        split_param stage1_allgather_overlap stage1_broadcast_overlap stage1_overlap stage1_reduce_avg
        stage1_tensor_fusion stage2_overlap sync_grad tp_async_allreduce tp_sync_moment tp_sync_param
        use_dualpipev variable_seq_lengths share_folder warmup_only_rank0 expert_max_capacity
        expert_min_capacity""",
    "memory (docs/hardware.md says what can be saved)": """
        release_grads optim_shard_num use_lowprecision_moment
        pre_alloc_memory use_recompute_loss_fn use_recompute_mtp recompute_use_reentrant
        no_recompute_layers refined_recompute recompute_method
        recompute_num_layers recompute_mtp_granularity recompute_mtp_method recompute_mtp_modules
        offload_queue moe_subbatch_token_num_after_dispatch moe_subbatch_token_num_before_dispatch
        sharding_offload_opt_buffersize_GB offload_fp8_expert_master_weight estimation_output_file""",
    "mixed precision (bf16 on a GPU; adapters, moments and master weights in fp32)": """
        fp16_opt_level amp_master_grad amp_custom_white_list amp_custom_black_list scale_loss bf16_full_eval
        fp16_full_eval""",
    "FP8 (as in docs/quantized-training.md, or off)": """
        apply_hadamard hadamard_block_size quant_input_grad quant_weight_grad apply_online_actscale_step
        actscale_moving_rate fp8_format_type fp8_force_clear_state enable_fp8_quantize_analysis fp8_wgrad
        merge_with_qdq_base_model""",
    "checkpoints (ours are complete or absent, and hold all that a resume needs)": """
        unified_checkpoint unified_checkpoint_config disable_ckpt_quant ckpt_quant_stage save_sharded_model
        load_sharded_model load_sharded_model_remap_parameter_name
        save_sharding_stage1_model_include_freeze_params use_async_save enable_zero_cost_checkpoint
        zcc_workers_num zcc_pipeline_hooks_capacity_usage zcc_ema_interval zcc_ema_loss_threshold
        save_tokenizer save_rng_states save_on_each_node ordered_save_group_size ignore_save_lr_and_optim
        flash_device_save_steps same_data reshard_save_then_exit convert_from_hf save_to_hf
        use_huggingface_model load_via_cpu load_from_hf load_checkpoint_format save_checkpoint_format
        flex_ckpt_comm_method aoa_config copy_custom_file_list online_merge_ema replicate_saved_into_local
        resume_from_huggingface_ckpt save_hf_memory_growth_threshold save_hf_steps save_hf_total_limit
        save_last_step sharded_model_from_ema load_best_model_at_end download_hub""",
    "logs (output/log.jsonl and output/tensorboard)": """
        logging_dir logging_strategy logging_first_step log_on_each_node report_to run_name disable_tqdm
        metrics_output_path log_global_grad_norm global_logging_interval record_optimizer_stat
        count_trained_tokens skip_profile_timer skip_memory_metrics wandb_http_proxy profile
        profile_step_end profile_step_start timer internal_medicine_monitor_interval
        internal_medicine_monitors""",
    "reading and packing of the data (done by ernietune's own rule)": """
        num_samples_each_epoch greedy_intokens buffer_size prefetch_factor serialize_output
        dataloader_drop_last max_estimate_samples lazy_data_processing remove_unused_columns
        drop_untrainble_sample factor tokenizer tokenizer_name corpus_name im_prefix_length image_token_len
        image_dtype prompt_dir sft_shift_by_one load_args_from_api eval_iters per_device_eval_batch_size
        eval_accumulation_steps minimum_eval_times token_balance_loss modality_interleave
        sampling_wo_replacement_data_resuming binpacking data_cache data_impl dataset_batch_size
        dataset_kwargs dataset_num_proc dataset_output_dir dataset_text_field input_dir make_offline_data
        packed_idx_cache_dir packing_interval padding_free processor_use_fast skip_warmup split
        template_backend truncate_packing""",
    "formats of records, which show what they are, and weights of files that are not mixed": """
        train_dataset_type eval_dataset_type train_dataset_prob text_dataset_prob eval_dataset_prob""",
    "ERNIEKit's reader of text among pictures, which splices unrelated records (not done here)": """
        dataset_name example_from_same_task_prob pseudo_sampling_prob trigger_data_prob drop_history_with_k
        add_sys_token min_shot max_shot""",
    "what the checkpoint says": """
        vision_config bos_token_id eos_token_id pad_token_id max_position_embeddings moe_gate
        moe_use_hard_gate moe_use_aux_free rope_3d multimodal use_moe ernie_model_config
        embedding_init_method embedding_init_method_std init_method output_layer_init_method
        gated_linear_unit no_rope_freq moe_router_load_balancing_type dsa_indexer_loss_coeff use_cache
        mtp_attention_flexible""",
    "an option that this file leaves off": """
        lr_end power decay_function multi_token_pred_lambda mtp_distillation_loss
        use_ortho_loss_callback muon_exclude_patterns muon_extra_scale_factor
        muon_ffn_split muon_momentum muon_ns_coeff_type muon_ns_coeffs muon_ns_steps muon_qkv_update_mode
        muon_version""",
    "preference training only": """
        max_prompt_len normalize_logps label_smoothing reference_free loss_type pref_loss_ratio sft_loss_ratio
        beta offset_alpha simpo_gamma dpop_lambda""",
    "serving, chat and export (options of `ernietune serve`, `chat` and `export`)": """
        max_new_tokens min_tokens temperature top_p frequency_penalty presence_penalty repetition_penalty
        stream stream_options enable_thinking copy_tokenizer max_shard_size host port metrics_port
        engine_worker_queue_port max_model_len max_num_seqs use_warmup gpu_memory_utilization quantization
        enable_mm limit_mm_per_prompt reasoning_parser max_num_batched_tokens block_size kv_cache_ratio
        load_choices tool_call_parser server_tp_degree""",
    "never read by the toolkit itself": """
        num_comparisons in_tokens_batching use_cls enable_global_training_logs gc_interval
        vit_second_fwd_batch_size mergekit_task_config hf_hub_id pad_to_max_seqlen""",
    "platform and debugging": """
        do_predict do_export prediction_loss_only output_signal_dir local_rank past_index label_names
        flatten_param_grads pdc_download_ckpt pdc_download_timeout sft_benchmark dpo_benchmark
        autotuner_benchmark""",
}

# Refused or renamed by PaddleFormers: a file that holds one of these was written for ERNIEKit.
ERNIEKIT_ONLY = frozenset(
    """
    use_flash_attention use_flash_attn_with_mask use_attn_mask_start_row_indices use_sparse_head_and_loss_fn
    fuse_linear fuse_rope fuse_rms_norm virtual_pp_degree add_tail_layers use_recompute_moe
    moe_aux_loss_lambda moe_z_loss_lambda offload_recompute_inputs use_recompute_loss_fn dataset_name
    text_dataset_path text_dataset_prob offline_dataset_path num_comparisons mask_out_eos_token
    in_tokens_batching use_cls disable_ckpt_quant use_sp_callback server_tp_degree multimodal
    vision_model_name_or_path train_emb_only data_filelist data_weights from_scratch record_optimizer_stat
    adaptive_norm_clip enable_global_training_logs reshard_save_then_exit vit_lr_ratio visual_ld
    modality_interleave modality_ratio vit_second_fwd_batch_size moe_use_aux_free_update_coef
    disable_pipeline_warmup train_moe_only example_from_same_task_prob pseudo_sampling_prob
    trigger_data_prob drop_history_with_k add_sys_token min_shot max_shot
    sampling_wo_replacement_data_resuming use_train_part_sharding text_use_train_part_sharding sft_benchmark
    dpo_benchmark batch_size layerwise_lr_decay_bound dropout_warmup_steps fp8_force_clear_state
    enable_fp8_quantize_analysis apply_hadamard hadamard_block_size quant_input_grad quant_weight_grad
    apply_online_actscale_step actscale_moving_rate fp8_format_type multi_token_pred_lambda
    use_huggingface_model copy_tokenizer mergekit_task_config max_shard_size hf_hub_id host port
    metrics_port engine_worker_queue_port max_model_len max_num_seqs use_warmup gpu_memory_utilization
    quantization enable_mm limit_mm_per_prompt reasoning_parser max_num_batched_tokens block_size
    kv_cache_ratio load_choices tool_call_parser sharding_parallel_degree tensor_parallel_degree
    pipeline_parallel_degree sep_parallel_degree context_parallel_degree expert_parallel_degree
    expert_tensor_parallel_degree recompute refined_recompute expert_max_capacity expert_min_capacity
    offload_optim
    """.split()  # noqa: SIM905
)

# The reverse. ERNIEKit's repository uses mix_strategy, packing and split_multi_turn too: they tell nothing.
PADDLEFORMERS_ONLY = frozenset(SYNONYMS) - {"visual_ld", "max_length"} | frozenset(
    """
    recompute_method recompute_modules recompute_num_layers tokenizer_name_or_path truncation_strategy
    padding_free load_checkpoint_format save_checkpoint_format moe_token_dispatcher_type neftune
    global_batch_size template_backend use_template fp8 model_with_dpo_criterion freeze_training
    dataset_num_proc
    """.split()  # noqa: SIM905
)

REASONS = {key: reason for reason, keys in NO_EFFECT.items() for key in keys.split()}
KNOWN = frozenset(DIRECT) | RULED | frozenset(ONLY_AT) | frozenset(REASONS) | frozenset(SYNONYMS)
