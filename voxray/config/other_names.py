"""Names that other training programs give to the settings, for the suggestion after an unknown flag."""

OTHER_NAMES = {
    "batch_size": ("per_device_bsz", "batch_size"),
    "train_batch_size": ("per_device_bsz",),
    "micro_batch_size": ("per_device_bsz",),
    "accumulate_grad_batches": ("grad_accum",),
    "lr_scheduler_type": ("lr_schedule",),
    "lr_scheduler": ("lr_schedule",),
    "max_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "max_seq_length": ("max_len",),
    "cutoff_len": ("max_len",),
    "lora_rank": ("lora_r",),
    "rank": ("lora_r",),
    "load_in_4bit": ("quantize",),
    "load_in_8bit": ("quantize",),
    "precision": ("bf16",),
    "torch_dtype": ("bf16",),
    "finetuning_type": ("tuning",),
    "model": ("model_id",),
    "pretrained_model_name_or_path": ("model_id",),
    "adapter": ("lora_dir",),
    "adapter_name_or_path": ("lora_dir",),
    "peft_model": ("lora_dir",),
    "dataset": ("train_jsonl", "val_jsonl", "input", "jsonl"),
    "data": ("train_jsonl", "val_jsonl", "input", "jsonl"),
    "train_file": ("train_jsonl",),
    "train_data": ("train_jsonl",),
    "validation_file": ("val_jsonl",),
    "eval_data": ("val_jsonl",),
    "test_file": ("val_jsonl", "test_output"),
    "manifest": ("val_jsonl", "jsonl", "input"),
    "output": ("output_dir", "output_path", "train_output"),
    "audio": ("audio_path",),
    "file": ("audio_path", "input"),
    "beam_size": ("num_beams",),
    "max_new_tokens": ("gen_max_new_tokens", "eval_max_new_tokens"),
    "lang": ("language",),
    "num_gpus": ("num_workers",),
    "gpus": ("num_workers",),
    "devices": ("num_workers",),
    "nproc_per_node": ("num_workers",),
    "num_processes": ("num_workers",),
    "dataloader_num_workers": ("loader_workers",),
    "save_every": ("save_steps",),
    "eval_every": ("eval_steps",),
    "deepspeed": ("strategy",),
}
"""{name elsewhere: names here, of which the first that the job has is suggested}."""


def find_other_name(name: str, known: dict[str, str]) -> str:
    """The setting that has this name in other programs, "" if the job has none.

    Args:
        known: {name or alias of the job's settings: name}.
    """
    return next((ours for ours in OTHER_NAMES.get(name, ()) if ours in known), "")
