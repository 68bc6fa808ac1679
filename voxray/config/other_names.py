"""Names that other training programs give to the settings, for messages about unknown flags and for docs/trainer.md."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ours:
    """What voxray has for a name of another program.

    Attributes:
        flags: Flags with this meaning, separated by spaces; the first that the job has is suggested.
        note: One sentence: what there is instead, or how the flag differs.
    """

    flags: str = ""
    note: str = ""

    @property
    def flag_names(self) -> list[str]:
        return self.flags.split()


FIXED_OPTIMIZER = "voxray trains with AdamW, betas 0.9 and 0.999, epsilon 1e-8; see --lr, --weight_decay and --optim"
NO_UPLOAD = "voxray uploads nothing; run the export job, then `hf upload`"
GREEDY = "validations during training answer greedily; evaluate and infer have --num_beams"
NO_PENALTY = "voxray has no penalties on generated tokens; evaluate has --num_beams, --temperature and --top_p"
ONE_RANK = "every adapted layer has the rank --lora_r and the scale --lora_alpha / --lora_r"
LORA_ONLY = "voxray trains LoRA, DoRA, rsLoRA or whole weights (--tuning); PEFT's other methods are not there"
ZERO = "--strategy deepspeed with --zero_stage 2 or 3 shards the training over the workers"
FSDP = "--strategy fsdp shards the weights over the workers; --offload_optimizer keeps the optimizer state on the CPU"
NO_PLUGINS = "a run takes no objects of Python; docs/trainer.md says what can be extended"
BY_LENGTH = "--batching length groups rows of similar length"
SPECAUGMENT = "SpecAugment is on with a value above 0"
GENERATION_CONFIG = "it is read from the base's generation_config.json"
ONE_JOB = "train_*, evaluate and infer are jobs of their own"

TRAINER: Mapping[str, Ours] = {
    "lr_scheduler_type": Ours("lr_schedule"),
    "warmup_ratio": Ours("warmup_steps", "it is a number of steps, not a share of them"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), Ours("", FIXED_OPTIMIZER)),
    "label_smoothing_factor": Ours("label_smoothing"),
    "neftune_noise_alpha": Ours("", "voxray adds no noise to embeddings"),
    "torch_compile": Ours("compile"),
    "attn_implementation": Ours("", "voxray always uses PyTorch's scaled_dot_product_attention (sdpa)"),
    "use_cache": Ours("", "generation always uses the KV cache, and training never does"),
    "auto_find_batch_size": Ours("", "the preflight job finds the largest batch that fits"),
    **dict.fromkeys(("group_by_length", "train_sampling_strategy"), Ours("batching", BY_LENGTH)),
    "dataloader_num_workers": Ours("loader_workers"),
    "dataloader_pin_memory": Ours("pin_memory"),
    "dataloader_drop_last": Ours("drop_last"),
    "remove_unused_columns": Ours("", "voxray ignores the keys of a manifest that it does not know"),
    "data_seed": Ours("seed"),
    "full_determinism": Ours("deterministic"),
    "max_train_samples": Ours("", "voxray trains on all rows of --train_jsonl; --debug takes 8 of each task"),
    "max_eval_samples": Ours("eval_max_rows", "it counts rows per task"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), Ours("eval_steps", "0 validates after each epoch")),
    "save_strategy": Ours("save_steps", "checkpoints are always written by steps, and at the end"),
    "logging_strategy": Ours("log_steps"),
    "logging_dir": Ours("", "TensorBoard's files are in the folder tensorboard of --output_dir"),
    "run_name": Ours("", "a run has the name of its --output_dir; WANDB_NAME sets another one in Weights & Biases"),
    "per_device_eval_batch_size": Ours("", "a validation answers --per_device_bsz rows at a time, but at least 8"),
    "eval_accumulation_steps": Ours("", "a validation keeps only texts and counts, not logits"),
    "eval_on_start": Ours("", "evaluate with the base alone gives the scores before training"),
    "predict_with_generate": Ours("", "every validation generates answers"),
    "generation_max_length": Ours("eval_max_new_tokens gen_max_new_tokens", "it counts new tokens only"),
    "generation_num_beams": Ours("num_beams", GREEDY),
    "greater_is_better": Ours("", "voxray knows for every metric whether higher is better"),
    "resume_from_checkpoint": Ours("", "the same command resumes from the newest checkpoint by itself"),
    "ignore_data_skip": Ours("", "a resumed run continues with the very next rows"),
    "overwrite_output_dir": Ours("overwrite"),
    "save_only_model": Ours(
        "", "a checkpoint always holds the optimizer's state; the adapter folder has the weights alone"
    ),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token"), Ours("", NO_UPLOAD)),
    "deepspeed": Ours("strategy", ZERO),
    **dict.fromkeys(("fsdp", "fsdp_config"), Ours("strategy", FSDP)),
    **dict.fromkeys(("ddp_backend", "ddp_find_unused_parameters"), Ours("", "voxray sets up its processes itself")),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), Ours("", ONE_JOB)),
    **dict.fromkeys(("callbacks", "compute_metrics", "data_collator", "optimizers"), Ours("", NO_PLUGINS)),
    "metric": Ours("metric_for_best_model"),
    "dataset_name": Ours("train_jsonl val_jsonl", "the prefetch job downloads a data set and writes its manifests"),
    "audio_column_name": Ours("audio_column", "the prepare job has it as --audio_column"),
    "text_column_name": Ours("text_column", "the prepare job has it as --text_column"),
    "max_duration_in_seconds": Ours("max_sec", "prepare --max_sec leaves longer clips out of the manifests"),
    "min_duration_in_seconds": Ours("min_sec", "prepare --min_sec leaves shorter clips out of the manifests"),
    "preprocessing_num_workers": Ours("num_actors"),
    "freeze_feature_encoder": Ours("freeze_encoder freeze_whisper"),
    "apply_spec_augment": Ours("time_masks", f"{SPECAUGMENT}; --freq_masks is for frequencies"),
    "mask_time_prob": Ours("time_masks", f"it is a number of masks; {SPECAUGMENT}"),
    "mask_feature_prob": Ours("freq_masks", f"it is a number of masks; {SPECAUGMENT}"),
}
"""Names of ``Seq2SeqTrainingArguments``, and of transformers' scripts for speech recognition."""

PEFT: Mapping[str, Ours] = {
    "r": Ours("lora_r"),
    "target_modules": Ours("lora_targets", "only train_whisper lets you choose the layers"),
    "use_dora": Ours("tuning", "--tuning dora"),
    "use_rslora": Ours("tuning", "--tuning rslora"),
    "bias": Ours("", "voxray trains no biases beside LoRA"),
    "modules_to_save": Ours("", "voxray trains no whole modules beside LoRA; --tuning full trains all weights"),
    "init_lora_weights": Ours("", "LoRA starts as PEFT does by default, with B at zero"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules"), Ours("", ONE_RANK)),
    **dict.fromkeys(("peft_type", "task_type", "loftq_config", "eva_config"), Ours("", LORA_ONLY)),
}
"""Names of ``LoraConfig``."""

GENERATION: Mapping[str, Ours] = {
    "max_new_tokens": Ours("gen_max_new_tokens eval_max_new_tokens"),
    "num_beams": Ours("", GREEDY),
    "do_sample": Ours("temperature", "answers are sampled with a value above 0"),
    "top_k": Ours("top_p", "voxray samples by --temperature and --top_p"),
    **dict.fromkeys(("repetition_penalty", "no_repeat_ngram_size", "length_penalty"), Ours("", NO_PENALTY)),
    "num_return_sequences": Ours("", "every row gets one answer"),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), Ours("", GENERATION_CONFIG)),
    "forced_decoder_ids": Ours("", "prompts hold language and task; --language is for rows that name none"),
}
"""Names of ``GenerationConfig``."""

ELSEWHERE: Mapping[str, Ours] = {
    "batch_size": Ours("per_device_bsz batch_size"),
    **dict.fromkeys(("train_batch_size", "micro_batch_size"), Ours("per_device_bsz")),
    "accumulate_grad_batches": Ours("grad_accum"),
    "lr_scheduler": Ours("lr_schedule"),
    **dict.fromkeys(("max_epochs", "num_epochs"), Ours("epochs")),
    **dict.fromkeys(("max_seq_length", "cutoff_len"), Ours("max_len")),
    **dict.fromkeys(("lora_rank", "rank"), Ours("lora_r")),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), Ours("quantize")),
    **dict.fromkeys(("precision", "torch_dtype"), Ours("bf16")),
    "finetuning_type": Ours("tuning"),
    **dict.fromkeys(("model", "pretrained_model_name_or_path"), Ours("model_id")),
    **dict.fromkeys(("lora", "adapter", "adapter_name_or_path", "peft_model"), Ours("lora_dir init_adapter")),
    **dict.fromkeys(("dataset", "data"), Ours("train_jsonl val_jsonl input jsonl")),
    **dict.fromkeys(("train_file", "train_data"), Ours("train_jsonl")),
    **dict.fromkeys(("validation_file", "eval_data"), Ours("val_jsonl")),
    "test_file": Ours("val_jsonl test_output"),
    "manifest": Ours("val_jsonl jsonl input"),
    "output": Ours("output_dir output_path train_output"),
    "audio": Ours("audio_path"),
    "file": Ours("audio_path input"),
    "beam_size": Ours("num_beams", GREEDY),
    "lang": Ours("language"),
    **dict.fromkeys(("num_gpus", "gpus", "devices", "nproc_per_node", "num_processes"), Ours("num_workers")),
    "save_every": Ours("save_steps"),
    "eval_every": Ours("eval_steps"),
}
"""Names of other programs."""

OTHER_NAMES: Mapping[str, Ours] = {**ELSEWHERE, **TRAINER, **PEFT, **GENERATION}


def explain_other_name(name: str, known: Mapping[str, str], dashes: str = "--") -> str | None:
    """What to answer to a flag that the job does not have but another program has.

    Args:
        known: {name or alias of the job's settings: name}.
        dashes: What stands before a flag; "" for the keys of a YAML file and for Python.
    Returns:
        The end of a message; "" if there is nothing to say, None if the name is not in the table.
    """
    ours = OTHER_NAMES.get(name)
    if ours is None:
        return None
    flag = next((known[flag] for flag in ours.flag_names if flag in known), "")
    note = ours.note if dashes else ours.note.replace("--", "")
    if flag:
        return f"; did you mean {dashes}{flag}?{f' ({note})' if note else ''}"
    return f"; {note}" if note else ""


def table_rows(names: Mapping[str, Ours]) -> list[str]:
    """The rows of a table of docs/trainer.md: names with the same counterpart share a row."""
    groups: dict[Ours, list[str]] = {}
    for name, ours in names.items():
        groups.setdefault(ours, []).append(f"`{name}`")
    return [
        f"| {', '.join(theirs)} | {' or '.join(f'`--{flag}`' for flag in ours.flag_names) or 'none'} | {ours.note} |"
        for ours, theirs in groups.items()
    ]
