"""Every flag has an effect that a test sees, or warns that it has none: the table of which test that is.

A new flag fails here until it has its line. The tests themselves are in ``test_training_flags.py`` and
``test_other_flags.py``, or wherever the line says.
"""

import ast
from functools import cache

import pytest
from helpers.running import JOBS, ROOT, parse_only

from voxray.config.flags import flag_metadata
from voxray.config.new import NewSettings
from voxray.config.parse import Settings
from voxray.config.prepare import PrepareSettings, TableFlags

WARNS = "other_flags::flags_that_warn"
"""For flags marked ``no_effect``: parse says so whenever one is given."""

CACHE = dict.fromkeys(("features_cache_dir", "features_cache_gib"), "feature_flags::features_cache")
VARIANTS = dict.fromkeys(
    ("speeds", "noise_snr", "noise_dir", "noise_share", "room_dir", "room_share", "variant_seed"),
    "feature_flags::variants",
)
SERVER = {
    **dict.fromkeys(("engine", "engine_python"), "vllm_engine::evaluate_and_infer_answer_with_vllm"),
    **dict.fromkeys(("server", "served_model"), "server::requests_of_all_tasks"),
    "server_key": "server::keys_that_cannot_be_used",
    "server_timeout_sec": "server::faults_of_rows_stay_with_their_rows",
    "server_retries": "server::a_server_that_cannot_be_reached_ends_the_job",
}
MASKS = ("freq_masks", "freq_mask_bins", "time_masks", "time_mask_frames", "time_mask_share")
FEATURES_TRAINED = "feature_flags::feature_flags_reach_training"
FOLDERS = "training_flags::train_jsonl_output_dir_storage_path_features_dir"
LANGUAGE = "feature_flags::language"
TRIM, DTYPE = "trim_flag", "arithmetic::flags_go_before_the_base"
OWN_TASKS = "own_tasks::own_tasks_from_features_to_a_comparison"
TRAIN = {
    "model_id": "training_flags::model_id",
    "train_jsonl": FOLDERS,
    "tasks_file": "own_tasks::a_run_is_not_resumed_with_other_tasks own_tasks::recipes_train_their_kind_of_tasks",
    "output_dir": FOLDERS,
    "storage_path": FOLDERS,
    "features_dir": FOLDERS,
    "rows_per_shard": FOLDERS,
    "num_actors": "other_flags::numbers_of_ray_actors",
    "language": LANGUAGE,
    "strict": "training_flags::strict",
    "allow_empty": "training_flags::allow_empty",
    "bf16": "training_flags::bf16",
    "fp16": "training_flags::fp16",
    "fp32": f"{DTYPE} arithmetic::runs_record_the_type",
    "quantize": "training_flags::quantize",
    "tuning": "training_flags::tuning",
    "max_bad_steps": "training_flags::max_bad_steps",
    "tf32": "training_flags::tf32 training_flags::unused_flags_warn_without_a_gpu",
    "val_jsonl": "training_flags::val_jsonl_and_eval_steps",
    "max_len": "training_flags::max_len",
    "lora_r": "training_flags::lora_r_and_alpha",
    "lora_alpha": "training_flags::lora_r_and_alpha",
    "lora_dropout": "training_flags::lora_dropout",
    "freeze_whisper": "training_flags::freeze_whisper",
    "lr": "training_flags::lr_scales_the_first_step training_flags::lr_schedule_and_warmup_steps",
    "lr_schedule": "training_flags::lr_schedule_and_warmup_steps",
    "warmup_steps": "training_flags::lr_schedule_and_warmup_steps",
    "weight_decay": "training_flags::weight_decay",
    "optim": "training_flags::optim",
    "max_grad_norm": "training_flags::max_grad_norm",
    **dict.fromkeys(
        ("replay_jsonl", "replay_share"),
        "replay::a_share_of_the_rows_is_replayed replay::the_job_reads_manifests_of_replay",
    ),
    "context_shares": "context::training_draws_contexts_and_resumes_exactly context::draws",
    "distill_weight": "distillation::a_larger_weight_stays_closer_to_the_base",
    "label_smoothing": "training_flags::label_smoothing",
    "epochs": "training_flags::epochs_and_rows_per_step",
    "max_steps": "training_flags::max_steps",
    "per_device_bsz": "training_flags::epochs_and_rows_per_step",
    "grad_accum": "training_flags::epochs_and_rows_per_step",
    "grad_ckpt": "training_flags::grad_ckpt",
    "compile": "training_flags::compile",
    "seed": "training_flags::seed",
    "num_workers": "training_flags::num_workers submit::submitted_run_succeeds",
    "loader_workers": "training_flags::loader_workers",
    "worker_timeout_sec": "kill::a_worker_that_stands_still",
    "pin_memory": "training_flags::pin_memory training_flags::unused_flags_warn_without_a_gpu",
    "drop_last": "training_flags::drop_last",
    "cuda_visible_devices": WARNS,
    **dict.fromkeys(
        ("strategy", "zero_stage", "offload_optimizer"), "training_flags::strategy_zero_stage_and_offload_optimizer"
    ),
    "task_weights": "training_flags::task_weights",
    "eval_steps": "training_flags::val_jsonl_and_eval_steps",
    "eval_max_rows": "training_flags::eval_max_rows_and_new_tokens",
    "eval_max_new_tokens": "training_flags::eval_max_rows_and_new_tokens",
    "preview_rows": "training_flags::preview_rows",
    "save_steps": "training_flags::save_steps",
    "save_total_limit": "checkpoint::the_newest_and_the_best_are_kept",
    **dict.fromkeys(
        ("metric_for_best_model", "load_best_model_at_end"), "best_checkpoint::the_best_becomes_the_adapter"
    ),
    **dict.fromkeys(
        ("early_stopping_patience", "early_stopping_threshold"), "best_checkpoint::early_stopping_finishes_a_run"
    ),
    "log_steps": "training_flags::log_steps",
    "report_to": "trackers::mlflow_holds_the_records trackers::none_writes_no_events",
    "overwrite": "training_flags::overwrite",
    "debug": "training_flags::debug",
    "deterministic": "training_flags::deterministic",
    "init_adapter": "stages::init_adapter_is_loaded_frozen_and_recorded stages::init_adapter_continues_to_train",
    **dict.fromkeys(("store", "cache_dtype", "cache_budget_gib", "variants"), FEATURES_TRAINED),
    **CACHE,
    **VARIANTS,
    **dict.fromkeys(MASKS, "feature_flags::masks"),
    **dict.fromkeys(("batching", "pack_tokens", "per_task_bsz"), "training_flags::batching"),
    "curriculum": "training_flags::curriculum",
    "trim_audio_tokens": f"{TRIM}::training_uses_shorter_rows_and_records_it {TRIM}::stages_must_agree",
}
PUBLISHED = {
    flag: f"{TRAIN[flag]} stages::defaults_of_the_stages_are_the_published_ones"
    for flag in ("lora_r", "lora_alpha", "lr", "epochs")
}
ONLY_MULTITASK = {"curriculum", "per_task_bsz", "freeze_whisper", "task_weights"}
NOT_WHISPER = {*ONLY_MULTITASK, "trim_audio_tokens"}
OF_WHISPER = "whisper::defaults_are_the_published_ones"
NOT_SALMONN = {*NOT_WHISPER, *MASKS}
SALMONN = "salmonn"
SALMONN_REACHES = f"{SALMONN}::flags_reach_the_recipe"
OF_SALMONN = f"{SALMONN}::defaults_are_the_published_ones"
SALMONN_RATES = f"{SALMONN}::learning_rates_equal_salmonns_trainer {SALMONN}::invalid_settings_are_parse_error"
SALMONN_FILES = f"{SALMONN}::files_of_salmonns_trainer_run {SALMONN}::invalid_settings_are_parse_error"
SALMONN_PARTS = ("whisper_path", "beats_path", "llama_path", "end_sym", "prompts")
SALMONN_BASES = "salmonn_evaluation::a_base_is_named_after_what_it_is_made_of"
SALMONN_SETS = "salmonn_evaluation::a_submission_from_the_evaluators_file"
ONLY_AUDIO = {"variants", "trim_audio_tokens", *VARIANTS, *MASKS}
OF_STAGE = "stages::a_stage_trains_its_role_on_its_task"
FEATURIZE_FLAGS = "other_flags::featurize_flags"
EVALUATE_FOLDERS, EVALUATE_ROWS = "other_flags::evaluate_folders", "other_flags::evaluate_rows"
EVALUATE_BATCHES = "other_flags::evaluate_batches_and_precision"
INFER_ROWS, INFER_ADAPTER = "other_flags::infer_rows", "other_flags::infer_adapter"
SAMPLING = "other_flags::infer_sampling_really_happens"
TO_TRIALS = "sweep_flags::hands_its_flags_to_every_trial"
SEARCH, WINNER = "sweep_flags::search", "sweep_flags::winner"
PREPARE_LIMITS, PREPARE_RUN = "prepare_flags::limits", "prepare_flags::files_split_and_workers"
AUDIT_LIMITS, AUDIT_FILES = "audit_flags::limits", "audit_flags::files_and_model"
REACHES = "stages::flags_reach_the_recipe"
HANDED_TO_JOBS = "prefetch::flags_are_handed_on"
DEMO_MODEL = "answers::flags_reach_the_model"
COMPILED = "compiled_audio::flags_reach_the_compiler"
MEASURED = "efficiency::flags_reach_the_measurement"
HANDED_ON = "other_flags::quickstart_hands_its_flags_on"

SEEN_BY: dict[str, dict[str, str]] = {
    "featurize": dict.fromkeys(
        ("model_id", "manifest", "output_dir", "storage_path", "rows_per_shard", "strict"), FEATURIZE_FLAGS
    )
    | {
        "num_actors": "other_flags::numbers_of_ray_actors",
        "tasks_file": f"{OWN_TASKS} own_tasks::features_of_other_tasks_are_other_features",
        **dict.fromkeys(("store", "cache_dtype"), "feature_flags::store"),
        "language": LANGUAGE,
        **dict.fromkeys(("cache_budget_gib", "bf16"), "feature_flags::cache_budget_and_bf16"),
        "fp32": DTYPE,
        "verify": "feature_flags::verify",
        "trim_audio_tokens": f"{TRIM}::featurize_and_audit_count_tokens_as_training_does",
        "variants": "feature_flags::variants",
        **CACHE,
        **VARIANTS,
    },
    # The stages share one code path, which train_multitask's tests see; a flag of theirs is shown to reach it.
    "train_text": {
        **{flag: f"{line} {REACHES}" for flag, line in TRAIN.items() if flag not in ONLY_MULTITASK | ONLY_AUDIO},
        **dict.fromkeys(("train_jsonl", "val_jsonl"), OF_STAGE),
        **PUBLISHED,
        "cuda_visible_devices": WARNS,
    },
    "train_asr_adapter": {
        **{flag: f"{line} {REACHES}" for flag, line in TRAIN.items() if flag not in ONLY_MULTITASK},
        **dict.fromkeys(("train_jsonl", "val_jsonl"), OF_STAGE),
        **dict.fromkeys(("store", "cache_dtype"), "stages::stored_encoder_outputs_give_the_same_losses"),
        **dict.fromkeys(MASKS, "feature_flags::masks stages::stored_encoder_outputs_give_the_same_losses"),
        **PUBLISHED,
        "grad_ckpt": "stages::a_frozen_language_model_is_recomputed_in_eval_mode",
        "cuda_visible_devices": WARNS,
    },
    "train_multitask": TRAIN,
    "train_whisper": {
        **{flag: f"{line} whisper::flags_reach_the_recipe" for flag, line in TRAIN.items() if flag not in NOT_WHISPER},
        **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lr", "warmup_steps"), OF_WHISPER),
        **dict.fromkeys(("per_device_bsz", "max_len", "eval_max_new_tokens", "pack_tokens"), OF_WHISPER),
        **dict.fromkeys(("freeze_encoder", "lora_targets"), "whisper::the_flags_choose_what_trains"),
        "store": "whisper::stored_encoder_outputs_need_a_frozen_encoder",
        "language": "whisper::settings_of_older_scripts_train",
        "cuda_visible_devices": WARNS,
        "task": WARNS,
    },
    "train_salmonn": {
        **{
            flag: f"{line} {SALMONN}::flags_reach_the_recipe" for flag, line in TRAIN.items() if flag not in NOT_SALMONN
        },
        **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "per_device_bsz", "weight_decay"), OF_SALMONN),
        **dict.fromkeys(("max_grad_norm", "max_steps", "eval_steps", "save_steps", "seed"), OF_SALMONN),
        **dict.fromkeys(("grad_accum", "eval_max_new_tokens"), OF_SALMONN),
        **dict.fromkeys(("lr", "lr_schedule", "warmup_steps", "min_lr", "warmup_start_lr"), SALMONN_RATES),
        **dict.fromkeys(("stage", "init_adapter"), f"{SALMONN}::stage_2_starts_from_stage_1"),
        **dict.fromkeys(
            ("whisper_path", "beats_path", "llama_path", "end_sym", "audio_prefix", "debug"), SALMONN_FILES
        ),
        "prompts": f"{SALMONN}::prompts_are_sampled_by_seed_epoch_and_row"
        f" {SALMONN}::packs_reserve_tokens_for_sampled_prompts",
        **dict.fromkeys(
            ("store", "cache_dtype"), "salmonn_audio_path::stored_outputs_give_the_same_losses_and_answers"
        ),
        "quantize": f"{SALMONN}::quantised_language_models_train",
        "cuda_visible_devices": WARNS,
    },
    "evaluate": {
        **dict.fromkeys(("output_dir", "storage_path", "features_dir", "rows_per_shard"), EVALUATE_FOLDERS),
        "val_jsonl": EVALUATE_ROWS,
        "tasks_file": OWN_TASKS,
        "mode": f"{EVALUATE_ROWS} {SALMONN_SETS} salmonn_evaluation::modes_search_as_the_evaluator",
        "audio_prefix": SALMONN_SETS,
        **dict.fromkeys(SALMONN_PARTS, f"{SALMONN_SETS} {SALMONN_BASES}"),
        **dict.fromkeys(("per_device_bsz", "gen_max_new_tokens", "bf16", "fp16", "quantize", "tf32"), EVALUATE_BATCHES),
        **dict.fromkeys(("model_id", "lora_dir"), "other_flags::evaluate_model_and_adapter"),
        **dict.fromkeys(("num_actors", "num_models"), "other_flags::numbers_of_ray_actors"),
        "gpus_per_model": "evaluation_flags::models_and_gpus",
        "fp32": DTYPE,
        **dict.fromkeys(("num_beams", "temperature", "top_p", "seed"), "evaluation_flags::beams_and_sampling"),
        "perplexity": "evaluation_flags::perplexity",
        "merge_adapter": "evaluation_flags::merge_adapter",
        "static_cache": "evaluation_flags::static_cache",
        "lora_scale": "lora_scale::scales_of_an_adapter",
        **dict.fromkeys(("context", "no_context"), "context::evaluation_uses_the_asked_context"),
        "retry_failed": "evaluation_flags::retry_failed",
        "check_batch_invariance": "evaluation_flags::check_batch_invariance",
        "score_only": "evaluation_flags::score_only_accepts_rows_of_other_systems",
        **dict.fromkeys(
            ("terms", "english_spelling", "caption_jars"), "evaluation_flags::terms_spelling_and_jars score::terms"
        ),
        "normalizer": "evaluation_flags::normalizer",
        "max_len": "other_flags::evaluate_max_len",
        "trim_audio_tokens": f"{TRIM}::evaluation_builds_prompts_as_in_training",
        "strict": "other_flags::evaluate_strict",
        "language": LANGUAGE,
        **dict.fromkeys(("store", "cache_dtype", "cache_budget_gib"), "feature_flags::feature_flags_reach_evaluation"),
        **CACHE,
        "compiled": "compiled_audio::evaluate_and_efficiency_use_it",
        "cuda_visible_devices": WARNS,
        **SERVER,
    },
    "infer": {
        **SERVER,
        **dict.fromkeys(("audio_path", "question", "language"), "other_flags::infer_clip"),
        **dict.fromkeys(("jsonl", "output_path", "batch_size", "preview_rows", "bf16", "fp16", "quantize"), INFER_ROWS),
        **dict.fromkeys(("max_new_tokens", "temperature", "seed"), f"{INFER_ROWS} {SAMPLING}"),
        **dict.fromkeys(("num_beams", "top_p"), "evaluation_flags::beams_and_sampling"),
        "json_lines": "evaluation_flags::infer_folder_and_json",
        "pseudo_labels": "evaluation_flags::pseudo_labels",
        "tasks_file": "own_tasks::infer_takes_a_file",
        "merge_adapter": "evaluation_flags::merge_adapter",
        "static_cache": "evaluation_flags::static_cache",
        "lora_scale": "lora_scale::scales_of_an_adapter",
        **dict.fromkeys(("context", "no_context", "initial_prompt"), "context::infer_uses_the_asked_context"),
        **dict.fromkeys(("task", "target_language"), "translation::infer_translates_a_clip"),
        "fp32": DTYPE,
        **dict.fromkeys(("lora_dir", "output_dir"), INFER_ADAPTER),
        **dict.fromkeys(("model_id", "tf32"), "other_flags::infer_model_id_and_tf32"),
        "max_len": "other_flags::infer_max_len",
        "trim_audio_tokens": f"{TRIM}::infer_builds_prompts_as_in_training",
    },
    "demo": {
        "model_id": "answers::base_and_tuned_answers_equal_infer",
        "lora_dir": "answers::base_and_tuned_answers_equal_infer answers::fully_tuned_weights_have_no_base",
        **dict.fromkeys(("bf16", "fp16", "quantize", "tf32", "trim_audio_tokens"), DEMO_MODEL),
        **dict.fromkeys(("num_beams", "temperature", "top_p", "seed", "batch_size"), DEMO_MODEL),
        "max_new_tokens": "answers::values_of_an_answer",
        "fp32": DTYPE,
        "max_len": "answers::refusals_are_one_line",
        "host": "serve::errors_at_the_start_are_one_line serve::address_and_warning",
        "port": "serve::errors_at_the_start_are_one_line",
        **dict.fromkeys(("max_upload_mib", "max_audio_sec"), "page::limits_of_length_and_size"),
        "allowed_hosts": "guard::own_names_are_answered",
        **dict.fromkeys(("language", "concurrency", "keep_sec"), "serve::flags_reach_the_page"),
        "queue_size": "serve::flags_reach_the_page page::a_full_queue_is_reported",
    },
    "export": {
        **dict.fromkeys(("lora_dir", "model_id"), "export::runs_checkpoints_and_bases_are_found"),
        **dict.fromkeys(("output_dir", "overwrite"), "export::folders_that_hold_something_are_left_alone"),
        "storage_path": "export::a_relative_output_stands_under_the_storage_path",
        "format": f"{SALMONN}::stage_2_starts_from_stage_1",
        "merge": "export::only_the_projector_can_be_merged",
        "dtype": "export::dtype",
        "evaluations": "model_card::card_of_a_training_and_of_its_export",
        "scale": "lora_scale::scales_of_an_adapter lora_scale::what_cannot_be_scaled",
    },
    "prepare": {
        **dict.fromkeys(("min_sec", "max_sec", "min_chars", "max_chars"), PREPARE_LIMITS),
        **dict.fromkeys(("min_chars_per_sec", "max_chars_per_sec", "min_peak_db", "min_rms_db"), PREPARE_LIMITS),
        **dict.fromkeys(("max_clip_share", "max_dc", "max_zero_tail_sec", "min_high_band_db"), PREPARE_LIMITS),
        "max_duration_error_sec": PREPARE_LIMITS,
        **dict.fromkeys(("input", "format", "train_output", "val_output", "quarantine", "storage_path"), PREPARE_RUN),
        **dict.fromkeys(("duplicates", "val_share", "seed", "num_actors", "rows_per_chunk"), PREPARE_RUN),
        "test_output": "prepare_flags::test_output_and_audio_output",
        "audio_output": "prepare_flags::test_output_and_audio_output",
        "leaks": "prepare_flags::leaks",
        "reading": "prepare_flags::reading",
        "language": "prepare::language_is_written_to_rows_that_name_none",
        **dict.fromkeys(TableFlags.model_fields, "own_tables::the_flags_of_prepare"),
    },
    "new": {
        **dict.fromkeys(("project", "memory_gib"), "new::the_folder_is_the_word_after_new"),
        **dict.fromkeys(
            ("input", "model_id", "train_output", "val_output", "leaks"), "new::data_settings_and_commands"
        ),
        "test_output": "new::rows_of_the_corpuss_test_split_are_what_evaluate_answers",
        # The rest are those of prepare, whose tests see them at work.
        **dict.fromkeys(
            PrepareSettings.model_fields.keys() - NewSettings.__annotations__.keys() - {"leaks"}, PREPARE_RUN
        ),
        **dict.fromkeys(("min_sec", "max_sec"), PREPARE_LIMITS),
    },
    "prefetch": {
        **dict.fromkeys(("model_id", "dataset", "hub", "output_dir"), "prefetch::a_hub_in_a_folder"),
        **dict.fromkeys(("model_revision", "dataset_revision"), "prefetch::a_server_and_a_second_run_without_it"),
        "language": "prefetch::a_language_that_is_not_there",
        **dict.fromkeys(("splits", "max_rows"), "prefetch::splits_and_max_rows"),
        **dict.fromkeys(("features", "keep_raw"), "prefetch::moved_elsewhere_it_still_loads"),
        "overwrite": "prefetch::changes_are_refused_unless_overwritten",
        "verify": f"prefetch::damage_is_found_and_put_right {HANDED_TO_JOBS}",
        "dry_run": "prefetch::dry_run_writes_nothing",
        "strict": "prefetch::rows_that_cannot_be_used_are_in_the_ledger",
        "val_share": "prefetch::rows_without_a_split_get_validation_drawn_by_speaker",
        # The rest are those of prepare and featurize, whose tests see them at work.
        **dict.fromkeys(("storage_path", "num_actors", "rows_per_shard", "bf16", "fp32", "seed"), HANDED_TO_JOBS),
        **dict.fromkeys(("store", "cache_dtype", "cache_budget_gib"), HANDED_TO_JOBS),
        **dict.fromkeys(("min_sec", "max_sec", "max_chars", "duplicates", "leaks"), HANDED_TO_JOBS),
        **dict.fromkeys(("min_chars_per_sec", "max_chars_per_sec", "min_peak_db", "min_rms_db"), HANDED_TO_JOBS),
        **dict.fromkeys(("max_clip_share", "max_dc", "max_zero_tail_sec", "min_high_band_db"), HANDED_TO_JOBS),
        "max_duration_error_sec": HANDED_TO_JOBS,
        **dict.fromkeys(("features_cache_dir", "features_cache_gib"), WARNS),
    },
    "audit": {
        **dict.fromkeys(("min_sec", "max_sec", "min_chars_per_sec", "max_chars_per_sec"), AUDIT_LIMITS),
        **dict.fromkeys(("min_peak_db", "min_rms_db", "max_clip_share", "max_dc", "max_zero_tail_sec"), AUDIT_LIMITS),
        **dict.fromkeys(("min_high_band_db", "max_duration_error_sec"), AUDIT_LIMITS),
        **dict.fromkeys(("input", "output_dir", "storage_path", "model_id", "fix"), AUDIT_FILES),
        "max_len": f"{AUDIT_FILES} audit_flags::max_len_without_a_model_says_that_it_is_not_checked",
        "trim_audio_tokens": f"{TRIM}::featurize_and_audit_count_tokens_as_training_does",
        "leaks": "audit_flags::equal_texts_of_a_script_are_no_leaks",
        "tasks_file": "own_tasks::preflight_and_audit_know_own_tasks",
        "compare": f"{AUDIT_FILES} audit_flags::same_side_files_are_not_compared_unless_asked",
        **dict.fromkeys(("outlier_spread", "max_examples"), "audit_flags::outlier_spread_and_max_examples"),
        **dict.fromkeys(("num_actors", "rows_per_chunk"), "audit_flags::actors_and_chunks"),
    },
    "compile": {
        **dict.fromkeys(("model_id", "output_dir"), "compiled_audio::a_program_computes_what_the_encoder_computes"),
        **dict.fromkeys(("windows", "bf16", "fp16", "fp32", "tf32", "lora_dir", "seed", "storage_path"), COMPILED),
        **dict.fromkeys(("backend", "optimization_level"), "compiled_audio::tensorrt_is_an_extra_that_needs_a_gpu"),
        "quantize": "compiled_audio::compile_errors_are_one_line",
        "overwrite": "compiled_audio::other_folders_are_not_overwritten",
        "tensorrt_device": WARNS,
        **dict.fromkeys(SALMONN_PARTS[:-1], SALMONN_BASES),
    },
    "efficiency": {
        **dict.fromkeys(("model_id", "output_dir"), "efficiency::report_of_every_family"),
        **dict.fromkeys(("batch_sizes", "clip_sec", "audio_path", "task", "question", "language"), MEASURED),
        **dict.fromkeys(("new_tokens", "warmup", "repeats", "seed", "storage_path", "trim_audio_tokens"), MEASURED),
        **dict.fromkeys(("bf16", "fp16", "fp32", "tf32", "quantize"), MEASURED),
        "lora_dir": f"efficiency::an_adapter_names_its_base {SALMONN_BASES}",
        **dict.fromkeys(SALMONN_PARTS, SALMONN_BASES),
        "compare": "efficiency::compare_runs_every_variant_in_its_own_process",
        "compiled": "compiled_audio::evaluate_and_efficiency_use_it",
        **dict.fromkeys(("optimization_level", "tensorrt_device"), WARNS),
    },
    "submit": {
        **dict.fromkeys(("address", "auth"), "submit_job::how_the_cluster_is_asked"),
        **dict.fromkeys(("name", "wait"), "submit_job::a_job_is_handed_in_under_an_id_of_its_own"),
        **dict.fromkeys(
            ("entrypoint_num_cpus", "entrypoint_num_gpus"), "submit_job::resources_of_the_jobs_own_process"
        ),
    },
    "compare": {
        **dict.fromkeys(("runs", "output_dir", "storage_path"), "compare_flags::runs_as_words_or_flag"),
        **dict.fromkeys(("seed", "num_resamples"), "compare_flags::seed_and_num_resamples"),
        **dict.fromkeys(("top", "max_rows"), "compare_flags::top_and_max_rows"),
        "embed_audio_mib": "compare_flags::embed_audio_mib",
        "tasks_file": "own_tasks::evaluations_with_other_tasks_are_not_compared",
    },
    # A sweep's own flags are seen on it; the rest reaches every trial, where train_multitask's tests see it.
    "tune": {
        **dict.fromkeys(TRAIN, TO_TRIALS),
        **dict.fromkeys(("task_weights", "lora_r", "space", "search", "num_trials"), SEARCH),
        **dict.fromkeys(("num_workers", "max_concurrent_trials"), "sweep_flags::trials_at_a_time"),
        **dict.fromkeys(("scheduler", "grace_steps"), "sweep_flags::schedulers"),
        **dict.fromkeys(("metric", "metric_mode", "output_dir", "storage_path"), WINNER),
        **dict.fromkeys(("top_k", "seeds", "seed"), "sweep_flags::seeds_and_top_k"),
        **dict.fromkeys(("resume", "overwrite"), "sweep_flags::resume_and_overwrite"),
        "recipe": "whisper::a_sweep_over_ranks",
        "cuda_visible_devices": WARNS,
    },
    # Flags of training go on to it in the file that the command names.
    "preflight": {
        **dict.fromkeys(TRAIN, "preflight::flags_reach_the_command"),
        **dict.fromkeys(("train_jsonl", "val_jsonl"), "preflight::everything_that_is_wrong_is_listed_at_once"),
        "max_len": "preflight::rows_that_are_left_out_are_told",
        "strict": "preflight::rows_that_are_left_out_are_told",
        "output_dir": "preflight::an_output_that_cannot_be_written preflight::a_good_run_is_ready",
        "overwrite": "preflight::flags_reach_the_command preflight::another_run_in_the_folder",
        "cuda_visible_devices": WARNS,
        "recipe": "preflight::the_recipe_follows_from_model_and_tasks",
        "tune": "preflight::a_batch_that_does_not_fit_is_made_smaller",
        "memory_gib": "preflight::a_batch_that_does_not_fit_is_made_smaller preflight::what_no_change_can_fit_is_said",
        "gpu": "preflight::a_gpu_of_other_machines",
        "price_per_hour": "preflight::a_good_run_is_ready",
        "autorun": "preflight::autorun_becomes_the_command_that_was_printed",
    },
    "quickstart": {
        **dict.fromkeys((*TRAIN, "base_val_jsonl", "eval_bsz"), HANDED_ON),
        "overwrite": WARNS,
        "cuda_visible_devices": WARNS,
    },
}


def settings_class(job: str) -> type[Settings]:
    return type(parse_only(job, []))


@cache
def named_tests(name: str) -> set[str]:
    """Names of the test functions of tests/jobs/test_<name>.py, or of the file of that name in another folder."""
    path = ROOT / "tests" / "jobs" / f"test_{name}.py"
    path = path if path.is_file() else next((ROOT / "tests").rglob(path.name))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name.removeprefix("test_") for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_job_is_in_the_table() -> None:
    assert set(SEEN_BY) == set(JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_every_flag_has_a_line(job: str) -> None:
    fields = set(settings_class(job).model_fields)
    missing, stale = fields - set(SEEN_BY[job]), set(SEEN_BY[job]) - fields
    assert not missing, f"{job}: no test sees {sorted(missing)}"
    assert not stale, f"{job}: no longer flags: {sorted(stale)}"


@pytest.mark.parametrize("job", JOBS)
def test_lines_name_tests_that_exist(job: str) -> None:
    for flag, line in SEEN_BY[job].items():
        assert line.split(), f"{job} --{flag}: the line is empty"
        for entry in line.split():
            file, _, test = entry.partition("::")
            assert test in named_tests(file), f"{job} --{flag}: there is no test_{test} in test_{file}.py"


@pytest.mark.parametrize("job", JOBS)
def test_flags_without_effect_are_those_that_warn(job: str) -> None:
    fields = settings_class(job).model_fields
    assert {flag for flag, line in SEEN_BY[job].items() if line == WARNS} == {
        name for name, field in fields.items() if flag_metadata(field).no_effect
    }
