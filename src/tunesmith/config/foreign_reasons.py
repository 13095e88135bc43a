"""Keys of other tools without a counterpart here: why they need none, or what is missing."""

from __future__ import annotations

# (why nothing is lost without them, their names)
HARMLESS = (
    ("each forward is a full pack in which no document sees another, always",
     """packing packing_strategy padding_free eval_packing neat_packing block_diag_attn sample_packing
     eval_sample_packing sample_packing_group_size sample_packing_bin_size sample_packing_sequentially
     sample_packing_mp_start_method sample_packing_eff_est sample_packing_seq_len_multiplier multipack_real_batches
     batch_flattening pretrain_multipack_buffer_size pretrain_multipack_attn streaming_multipack_buffer_size
     max_packed_sequence_len use_packed_sequences batching_strategy group_by_length train_sampling_strategy
     length_column_name total_num_tokens total_supervised_tokens"""),
    ("nothing is padded", """pad_to_sequence_len pad_to_multiple_of pad_token ignore_pad_token_for_loss"""),
    ("only replies are trained, unless --data.train_on all", """completion_only_loss assistant_only_loss"""),
    ("attention is chosen and checked at the start of every run",
     """attn_implementation flash_attn flash_attention sdp_attention xformers_attention flex_attention eager_attention
     sage_attention flex_attn_compile_kwargs flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp
     flash_attn_fuse_qkv flash_optimum fused_attn_kernel gemma4_hybrid_attn_impl large_head_attention flash_attn_d512
     sdpa_varlen use_v1_kernels attn"""),
    ("the head is applied at trained positions only, so the logits of a whole batch are never in memory",
     """use_liger_kernel liger_kernel enable_liger_kernel liger_kernel_config liger_rope liger_rms_norm
     liger_rms_norm_gated liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy liger_cross_entropy
     liger_swiglu cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks
     cross_entropy_loss_fusion use_unsloth unsloth_cross_entropy_loss"""),
    ("kernels change the speed, not the result; torch's own are used",
     """lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel use_kernels kernel_config
     experts_implementation use_scattermoe use_sonicmoe dsv4_fp4_grouped_mode use_dsv4_kernels use_glm_dsa_kernels
     tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp bias_activation_fusion apply_rope_fusion
     masked_softmax_fusion moe_grouped_gemm moe_token_dispatcher_type tf32 torch_compile_backend torch_compile_mode
     torch_compile_options deepcompile mean_resizing_embeddings"""),
    ("the model's own chat template is used; for another one set data.chat_template to a .jinja file",
     "template tool_format tokenizer_save_jinja_files is_mistral_derived_model is_llama_derived_model "
     "is_falcon_derived_model is_qwen_derived_model"),
    ("the end of a turn is the stop token of the chat template", "eos_token eot_tokens"),
    ("tunesmith train trains; held-out data is evaluated whenever data.eval or data.eval_split names some",
     "do_train do_eval do_predict predict_with_generate stage task_type lora_task_type model_class"),
    ("an unknown key is always an error", "strict test_value"),
    ("RUN/report.html has the curves; the model card and metrics.jsonl have the numbers", "plot_loss compute_accuracy"),
    ("train.eval_steps N evaluates every N steps, and the end of a run is always evaluated",
     """evaluation_strategy eval_strategy eval_on_start eval_delay do_causal_lm_eval eval_causal_lm_metrics
     eval_table_size eval_max_new_tokens do_bench_eval bench_dataset bench_split include_for_metrics
     batch_eval_metrics prediction_loss_only eval_do_concat_batches eval_use_gather_object"""),
    ("evaluation uses the packs of training (train.micro_batch_tokens)",
     "per_device_eval_batch_size eval_batch_size eval_accumulation_steps bf16_full_eval fp16_full_eval eval_num_beams "
     "eval_sequence_len eval_on_each_dataset"),
    ("checkpoints are written every train.save_steps and train.save_minutes, and at the end",
     "save_strategy save_first_step enable_jit_checkpoint dynamic_checkpoint save_on_each_node"),
    ("every checkpoint can be resumed", "save_only_model restore_callback_states_from_checkpoint ignore_data_skip"),
    ("weights are always safetensors, on one machine",
     "save_safetensors export_legacy_format fsdp_final_state_dict_type save_weight "
     "save_ckpt_as_hf"),
    ("tunesmith resume RUN continues a run", "resume_from_checkpoint auto_resume_from_checkpoints from_resume resume"),
    ("a run never overwrites another", "overwrite_output_dir"),
    ("the best evaluated checkpoint is kept; with train.early_stop_patience it becomes the model",
     "load_best_model_at_end metric_for_best_model greater_is_better"),
    ("share a model with: hf upload owner/name RUN/model",
     """push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision
     hub_model_revision push_dataset_to_hub hf_use_auth_token export_hub_model_id"""),
    ("unread columns are named; data.ignore_columns silences them", "remove_unused_columns label_names"),
    ("rows are read, labelled and kept in RUN/tokens, once",
     """dataset_num_proc dataset_processes preprocessing_num_workers preprocessing_batch_size overwrite_cache
     tokenized_path dataset_prepared_path data_shared_file_system dataset_keep_in_memory num_dataset_shards_to_save
     skip_prepare_dataset is_preprocess preprocess_iterable buffer_size cache_dir dataset_shard_num dataset_shard_idx
     shuffle_before_merging_datasets sample_backend"""),
    ("rows are drawn in a new random order each epoch, from train.seed",
     "shuffle_merged_datasets shuffle_dataset data_seed dataset_shuffle_seed"),
    ("packs are made ahead by the run itself",
     """dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
     dataloader_multiprocessing_context dataloader_in_order dataloader_drop_last num_workers ddp_timeout"""),
    ("one process trains, on one device",
     """ddp ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph fsdp
     fsdp_config fsdp_version fsdp_transformer_layer_cls_to_wrap deepspeed accelerator_config parallelism_config
     dist_config dp_shard_size dp_replicate_size tensor_parallel_size context_parallel_size expert_parallel_size
     sequence_parallel_degree heads_k_stride ring_attn_func cp_size cp_mode use_ray ray_num_workers ray_run_name
     ray_init_kwargs resources_per_worker master_addr master_port world_size local_rank use_distributed_optimizer
     overlap_param_gather overlap_grad_reduce tensor_model_parallel_size pipeline_model_parallel_size
     expert_model_parallel_size virtual_pipeline_model_parallel_size sequence_parallel
     account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split use_mca use_megatron_bridge
     megatron_bridge_args megatron_pretrained_checkpoint export_hf_on_finish extra_config use_hyper_parallel
     hyper_parallel_args hyper_parallel_cp_size hybrid_cp megatron_config megatron_core context_parapllel_size
     expert_parallel_num_nvl_bytes expert_parallel_token_capacity average_tokens_across_devices
     calculate_per_token_loss lora_on_cpu qlora_sharded_model_loading mixed_precision init_config"""),
    ("the fastest device is taken; CUDA_VISIBLE_DEVICES chooses among several",
     "device_map device use_cpu no_cuda max_memory gpu_memory_limit experimental_skip_move_to_device low_cpu_mem_usage "
     "offload_folder quantization_device_map use_kt kt_config kt_cpu_activation kt_weight_path "
     "kt_non_expert_weight_path kt_expert_checkpoint_path"),
    ("train.gradient_checkpointing true; torch chooses the form",
     """gradient_checkpointing_kwargs activation_checkpointing_kwargs use_reentrant_gc use_unsloth_gc
     recompute_granularity recompute_method recompute_num_layers selective_checkpointing"""),
    ("it saves memory, not more; train.gradient_checkpointing true and lora.quantize do too",
     "activation_offloading layer_offloading torch_empty_cache_steps gc_steps gc_collect_steps auto_find_batch_size "
     "use_cache use_kv_cache"),
    ("metrics.jsonl has every step; train.log_steps N writes fewer lines",
     """logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica
     disable_tqdm include_num_input_tokens_seen include_tokens_per_second include_tkps
     include_effective_tokens_per_second print_param_status debug skip_memory_metrics"""),
    ("a run is named by its folder, train.output_dir; trackers read their own environment variables",
     """run_name project project_name wandb_name wandb_run_id wandb_mode wandb_project wandb_entity wandb_watch
     wandb_log_model mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts comet_api_key
     comet_workspace comet_project_name comet_experiment_key comet_mode comet_online comet_experiment_config
     trackio_project_name trackio_run_name trackio_space_id trackio_bucket_id trackio_static_space_id swanlab_project
     swanlab_workspace swanlab_run_name swanlab_experiment_name swanlab_description swanlab_mode swanlab_api_key
     swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret swanlab_log_model swanlab_log_completions
     swanlab_completion_log_interval swanlab_completion_max_buffer logging_dir"""),
    ("trackers are tensorboard, wandb, swanlab and trackio (train.trackers)",
     "use_mlflow use_comet use_otel_metrics otel_metrics_host otel_metrics_port"),
    ("train.profile_steps FIRST-LAST profiles a range of steps",
     """profiler_steps profiler_steps_start enable_torch_profiler profiler_output_dir profiler_wait_steps
     profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory
     profiler_with_stack profile_modules"""),
    ("the model's own files say it",
     """model_type type_of_model tokenizer_type cls_model_config tokenizer_use_fast use_fast_tokenizer tokenizer_legacy
     tokenizer_use_mistral_common base_model_config base_model_ignore_patterns is_causal fan_in_fan_out
     lora_fan_in_fan_out processor_kwargs trainer_cls axolotl_config_path download_mode export_size export_device
     runtime_config tokenizer_class"""),
    ("new rows of the embedding are added only for model.add_tokens", "resize_vocab resize_token_embeddings_to_32x "
     "shrink_embeddings embeddings_skip_upcast fix_untrained_tokens"),
    ("losses that are not finite stop the run (train.on_nonfinite)", "loss_watchdog_threshold loss_watchdog_patience"),
    ("it belongs to generation, not to training",
     """infer_backend infer_dtype do_sample temperature top_p top_k num_beams max_new_tokens repetition_penalty
     length_penalty skip_special_tokens vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config
     sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend gradio_title gradio_share
     gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature generate_samples
     num_generation_samples generation_max_new_tokens generation_temperature generation_top_p generation_top_k
     generation_prompt_ratio generation_do_sample"""),
    ("it belongs to another training method; tunesmith does SFT and pre-training",
     """pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight
     simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters
     ref_model_quantization_bit reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha
     dpo_beta dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss dpo_use_weighting dpo_use_liger_kernel
     dpo_padding_free dpo_loss_type dpo_loss_weights precompute_ref_log_probs rpo_alpha orpo_alpha cpo_alpha
     kto_desirable_weight kto_undesirable_weight rl_beta trl vllm ebft center_rewards_coefficient max_prompt_len
     max_prompt_length beta num_labels task task_dir lang n_shot rl
     reward_model process_reward_model"""),
    ("it writes or merges a model; tunesmith merge does that after training",
     """merge_lora merge_method export_dir export_quantization_bit export_quantization_dataset
     export_quantization_nsamples export_quantization_maxlen nvfp4_merge_aware create_new_adapter"""),
    ("bitsandbytes holds the frozen weights (lora.quantize nf4 or int8)",
     "quantization_method quantization_type bnb_4bit_quant_type bnb_4bit_quant_storage gptq "
     "gptq_groupsize gptq_model_v1 gptq_disable_exllama"),
    ("credentials are those of hf auth login", "hf_hub_token ms_hub_token om_hub_token"),
    ("it concerns peft's files, which adapters here follow",
     "peft_autocast_adapter_dtype auto_mapping inference_mode peft_type peft_version base_model_name_or_path "
     "base_model_class"),
)  # fmt: skip

# (what is missing, names of keys that would change the training)
MISSING = (
    ("no other optimizer than AdamW, in 32 or 8 bits",
     """use_galore galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise
     use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type
     apollo_scale_type apollo_layerwise apollo_scale_front use_badam badam_mode badam_start_block badam_switch_mode
     badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose use_adam_mini use_muon optim_config
     adam_epsilon2 adam_beta3 dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank
     qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits
     qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size optim_args
     optim_target_modules torchdistx_path"""),
    ("no learning rate of its own for a part of the model, but lora.lr_ratio",
     "embedding_lr embedding_lr_scale lr_groups loraplus_lr_embedding loraplus_weight_decay"),
    ("no such schedule; optim.schedule has cosine, linear, constant and minimind",
     """lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor eta_min jagged_restart_steps
     jagged_restart_warmup_steps jagged_restart_anneal_steps relora relora_prune_ratio relora_prune_method
     relora_cpu_offload"""),
    ("the loss is plain cross-entropy over supervised tokens",
     """neftune_noise_alpha noisy_embedding_alpha label_smoothing_factor loss_type use_dft_loss use_asft_loss
     asft_alpha use_eaft_loss eaft_alpha eaft_k use_eaft scaling_softmax scaling_softmax_factor
     scaling_softmax_bias"""),
    ("no single layers are frozen or chosen; lora.target_modules chooses among modules",
     """freeze_trainable_layers freeze_trainable_modules freeze_extra_modules unfrozen_parameters use_llama_pro
     lisa_n_layers lisa_step_interval lisa_layers_attribute freeze_mm_modules freeze_vision_tower
     freeze_multi_modal_projector freeze_language_model layers_to_transform layers_pattern peft_layers_to_transform
     peft_layers_pattern exclude_modules layer_replication peft_layer_replication mixture_of_depths
     ignore_bias_buffers"""),
    ("an adapter has one rank and one alpha for all its modules",
     "rank_pattern alpha_pattern lora_rank_pattern lora_alpha_pattern"),
    ("no such kind of adapter; lora.kind has lora, rslora, dora, pissa and olora",
     """loftq_config eva_config corda_config lora_ga_config velora_config alora_invocation_tokens use_qalora
     qalora_group_size monteclora_config use_bdlora arrow_config kasa_config oft_rank oft_block_size oft_target
     module_dropout lora_bias pissa_iter pissa_convert kt_use_lora_experts kt_lora_expert_num
     kt_lora_expert_intermediate_size ensure_weight_tying peft_ensure_weight_tying"""),
    ("tokens are added by model.add_tokens, and their rows trained",
     "trainable_token_indices peft_trainable_token_indices added_tokens_overrides new_special_tokens_config "
     "init_special_tokens reinit_weights"),
    ("an adapter starts anew; to train one on, give its RUN or folder as model.path",
     "adapter_name_or_path adapter_folder lora_model_dir"),
    ("the model's config stays as it is; --model.config.KEY changes a new:PRESET model",
     """rope_scaling shift_attn s2_attention overrides_of_model_config overrides_of_model_kwargs model_config
     model_init_kwargs tokenizer_config llama4_linearized_experts
     upcast_layernorm upcast_lmhead_output fp32_norms fp32_norm_classes model_max_length"""),
    ("the router loss is added with the model's own coefficient; model.config.router_aux_loss_coef sets another",
     "moe_aux_loss_coef router_aux_loss_coef"),
    ("weights are trained in fp32, bf16 or fp16 (train.precision)",
     """fp8 fp8_backend fp8_enable_fsdp_float8_all_gather qat quantization model_quantization_config
     model_quantization_config_kwargs use_onebitllms compute_dtype quantize_moe_experts llmcompressor"""),
    ("only text is trained",
     """image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches image_size image_resize_algorithm
     video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate media_dir
     processor_type"""),
    ("data is read to its end before training; data.limit takes the first rows",
     "streaming dataset_streaming curriculum_sampling disable_shuffling pretraining_sample_concatenation"),
    ("data.train takes a list of sources, each with a weight: its share of the tokens, not of the rows",
     "mix_strategy interleave_probs dataset_mixing_strategy mixing_weights"),
    ("rows are never left out by their length from below, nor as duplicates; `tunesmith check` names duplicates",
     "min_sample_len dataset_exact_deduplication"),
    ("a chat that is too long follows data.overlong; positions are never stretched",
     "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks"),
    ("roles and their tokens come from the chat template", "role_boundaries"),
    ("plugins are not loaded", "plugins diffusion secrets"),
)  # fmt: skip


def _by_name(groups: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {name: reason for reason, names in groups for name in names.split()}


HARMLESS_KEYS = _by_name(HARMLESS)
MISSING_KEYS = _by_name(MISSING)
