"""The settings files of SALMONN's own trainers: which of their keys become flags, which change nothing here, and which
ask for what there is not.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FLAGS: Mapping[str, str] = {
    "stage": "stage",
    "model.llama_path": "llama_path",
    "model.whisper_path": "whisper_path",
    "model.beats_path": "beats_path",
    "model.lora_rank": "lora_r",
    "model.lora_alpha": "lora_alpha",
    "model.lora_dropout": "lora_dropout",
    "model.prompt_path": "prompts",
    "model.end_sym": "end_sym",
    "model.ckpt": "init_adapter",
    "datasets.train_ann_path": "train_jsonl",
    "datasets.valid_ann_path": "val_jsonl",
    "datasets.prefix": "audio_prefix",
    "run.seed": "seed",
    "run.output_dir": "output_dir",
    "run.log_freq": "log_steps",
    "run.accum_grad_iters": "grad_accum",
    "run.batch_size_train": "per_device_bsz",
    "run.optims.init_lr": "lr",
    "run.optims.min_lr": "min_lr",
    "run.optims.warmup_steps": "warmup_steps",
    "run.optims.warmup_start_lr": "warmup_start_lr",
    "run.optims.weight_decay": "weight_decay",
}
"""Keys and the flags that they are."""
COUNTED = ("run.epoch_based", "run.iters_per_epoch", "run.optims.max_epoch", "run.save_ep")
"""Keys that together say how long to train, and how often to validate and save."""
NO_EFFECT: Mapping[str, str] = {
    "model.multi_prompt": "one prompt is drawn for every row",
    "model.test_prompt_path": "a SALMONN folder names the prompts of evaluation",
    "model.max_txt_len": "answers are never cut; --max_len leaves longer rows out",
    "model.token": "no token is read from a file, nor kept",
    "datasets.test_ann_path": "jobs/evaluate.py takes it as --val_jsonl",
    "datasets.whisper_path": "the model's own Whisper makes the features",
    "run.batch_size_eval": "validation goes by --per_device_bsz",
    "run.num_workers": "--loader_workers threads read batches, --num_workers processes train",
    "run.device": "a GPU is used where there is one",
    "run.amp": "--fp16 or --bf16 say how to compute",
    "run.use_distributed": "--num_workers says how many processes train",
    "run.world_size": "--num_workers says how many processes train",
    "run.dist_url": "Ray brings the processes together",
    "run.exp_name": "--output_dir names the run",
    "run.torch_compile_mode": "--compile compiles the language model's layers",
    "run.use_liger_kernel": "there is no such kernel here",
}
"""Keys that are warned about, with what holds instead."""
ONLY: Mapping[str, Any] = {
    "model.freeze_whisper": True,
    "model.freeze_beats": True,
    "model.use_speech_Qformer": True,
    "model.freeze_speech_QFormer": False,
    "model.window_level_Qformer": True,
    "model.num_speech_query_token": 1,
    "model.second_per_window": 0.333333,
    "model.second_stride": 0.333333,
    "model.speech_llama_proj_model": "",
    "model.freeze_speech_llama_proj": False,
    "model.lora": True,
    "model.prompt_template": "USER: {}\nASSISTANT:",
    "run.evaluate": False,
    "run.optims.beta2": 0.999,
    "run.use_apollo": False,
}
"""Keys that may have one value: another one asks for a model or a trainer that is not here."""
SECTIONS = ("model", "datasets", "run")


def flat(loaded: dict[Any, Any], path: Path) -> tuple[dict[Any, Any], list[str]]:
    """Turn a nested file of SALMONN's trainer into flags; a file of flags stays as it is.

    Keys without effect are warned about on standard error.

    Returns:
        {flag: value}, and what is wrong with the file, in lines.
    """
    if not any(isinstance(loaded.get(section), dict) for section in SECTIONS):
        return loaded, []
    keys, flags, errors = _dotted(loaded), {}, []
    for key, value in keys.items():
        if key in FLAGS:
            if value not in ("", None):
                flags[FLAGS[key]] = value
        elif key in NO_EFFECT:
            print(f"warning: {path}: {key} has no effect: {NO_EFFECT[key]}", file=sys.stderr, flush=True)
        elif key in ONLY:
            if value not in (ONLY[key], None):
                errors.append(f"{path}: {key}: must be {ONLY[key]!r}, as this job trains SALMONN (got {value!r})")
        elif key not in COUNTED:
            errors.append(f"{path}: {key}: unknown key")
    flags.setdefault("stage", 2 if "init_adapter" in flags else 1)
    return flags | _lengths(keys, path, errors), errors


def _dotted(loaded: Mapping[Any, Any], above: str = "") -> dict[str, Any]:
    """{"run.optims.init_lr": value} of a nested file."""
    found: dict[str, Any] = {}
    for key, value in loaded.items():
        name = f"{above}{key}"
        found |= _dotted(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _lengths(keys: Mapping[str, Any], path: Path, errors: list[str]) -> dict[str, int]:
    """How long to train: so many epochs, each a number of steps, or all rows once if ``epoch_based``."""
    numbers = {}
    for key, usual in (("run.optims.max_epoch", 30), ("run.iters_per_epoch", 3000), ("run.save_ep", 1)):
        value = keys.get(key, usual)
        if isinstance(value, bool) or not str(value).isdecimal() or not int(value):
            errors.append(f"{path}: {key}: must be a whole number, 1 or more (got {value!r})")
            return {}
        numbers[key] = int(value)
    epochs, steps, saved = numbers.values()
    if keys.get("run.epoch_based") is True:
        return {"epochs": epochs, "max_steps": 0, "eval_steps": 0}
    return {"max_steps": epochs * steps, "eval_steps": steps, "save_steps": saved * steps}
