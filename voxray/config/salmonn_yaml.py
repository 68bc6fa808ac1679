"""Reads the YAML settings files of SALMONN's own trainers and evaluators: which keys become flags, which have no effect
in voxray, and which voxray supports with one value only.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class YamlReader:
    """How one voxray job reads such a file.

    Attributes:
        job: What the job does, for messages.
        flags: The flag that each key sets.
        no_effect: Keys that only print a warning, with the reason.
        only: The single supported value of each key; any other value is an error.
    """

    job: str
    flags: Mapping[str, str]
    no_effect: Mapping[str, str]
    only: Mapping[str, Any]


SECTIONS = ("model", "datasets", "run", "generate")
MODEL_FLAGS: Mapping[str, str] = {
    "model.llama_path": "llama_path",
    "model.llm_path": "llama_path",
    "model.whisper_path": "whisper_path",
    "model.beats_path": "beats_path",
    "model.end_sym": "end_sym",
}
FIXED_MODEL: Mapping[str, Any] = {
    "model.freeze_whisper": True,
    "model.freeze_beats": True,
    "model.use_speech_Qformer": True,
    "model.freeze_speech_QFormer": False,
    "model.window_level_Qformer": True,
    "model.num_speech_query_token": 1,
    "model.second_per_window": 0.333333,
    "model.second_stride": 0.333333,
    "model.speech_llama_proj_model": "",
    "model.speech_llm_proj_model": "",
    "model.freeze_speech_llama_proj": False,
    "model.freeze_speech_llm_proj": False,
    "model.lora": True,
    "model.prompt_template": "USER: {}\nASSISTANT:",
    "model.Ced_path": "",
}
"""voxray has one SALMONN architecture and one way to train it."""
_PROCESSES = "--num_workers says how many processes train"
_COMPILES = "--compile compiles the language model's layers"
_KERNEL = "there is no such kernel here"
NO_EFFECT: Mapping[str, str] = {
    "project_name": "nothing is sent anywhere",
    "model.token": "no token is read from a file, nor kept",
    "model.multi_prompt": "every row has its own prompt",
    "model.max_txt_len": "answers are never cut; --max_len leaves longer rows out",
    "model.only_preprocessor": "all of the model is loaded",
    "model.liger_kernel": _KERNEL,
    "datasets.whisper_path": "the model's own Whisper makes the features",
    "run.device": "a GPU is used where there is one",
    "run.amp": "--fp16 or --bf16 say how to compute",
    "run.exp_name": "--output_dir names the run",
    "run.log_level_warning": "what is logged is the same always",
    "run.use_liger_kernel": _KERNEL,
    "run.dist_url": "Ray brings the processes together",
}
"""Keys that have no effect in any job."""
SCHEDULE = ("run.epoch_based", "run.iters_per_epoch", "run.optims.max_epoch", "run.save_ep")
"""Keys that together set how long to train, and how often to validate and save."""
RATE_FLAGS: Mapping[str, str] = {
    "run.optims.init_lr": "lr",
    "run.optims.min_lr": "min_lr",
    "run.optims.warmup_steps": "warmup_steps",
    "run.optims.warmup_start_lr": "warmup_start_lr",
    "run.optims.weight_decay": "weight_decay",
}
TEST_FILES = ("datasets.test_ann_path", "datasets.test_ann_path_asr", "datasets.test_ann_path_aac")
PARALLEL = ("run.use_distributed", "run.distributed", "run.world_size", "run.world-size")
SEARCH = tuple(
    f"generate.{name}"
    for name in (
        *("max_new_tokens", "num_beams", "do_sample", "min_length", "temperature", "top_p"),
        *("repetition_penalty", "length_penalty", "end_sym"),
    )
)
SAMPLING = ("generate.do_sample", "generate.temperature", "generate.top_p")
TENSORRT = ("run.tensorrt", "run.optimization_level", "run.tensorrt_device", "run.jit_mode")

TRAINER = YamlReader(
    "trains SALMONN",
    {
        **MODEL_FLAGS,
        **RATE_FLAGS,
        "stage": "stage",
        "model.lora_rank": "lora_r",
        "model.lora_alpha": "lora_alpha",
        "model.lora_dropout": "lora_dropout",
        "model.prompt_path": "prompts",
        "model.ckpt": "init_adapter",
        "datasets.train_ann_path": "train_jsonl",
        "datasets.valid_ann_path": "val_jsonl",
        "datasets.prefix": "audio_prefix",
        "run.seed": "seed",
        "run.output_dir": "output_dir",
        "run.log_freq": "log_steps",
        "run.accum_grad_iters": "grad_accum",
        "run.batch_size_train": "per_device_bsz",
    },
    {
        **NO_EFFECT,
        "model.test_prompt_path": "jobs/evaluate.py takes it as --prompts",
        "model.torch_compile_mode": _COMPILES,
        "run.torch_compile_mode": _COMPILES,
        "run.batch_size_eval": "validation goes by --per_device_bsz",
        "run.num_workers": "--loader_workers threads read batches, --num_workers processes train",
        **dict.fromkeys(TEST_FILES, "jobs/evaluate.py takes it as --val_jsonl"),
        **dict.fromkeys(PARALLEL, _PROCESSES),
        **dict.fromkeys(SEARCH, "jobs/evaluate.py searches so; validation takes the likeliest tokens"),
        **dict.fromkeys(TENSORRT, "training computes with PyTorch"),
    },
    {**FIXED_MODEL, "run.evaluate": False, "run.optims.beta2": 0.999, "run.use_apollo": False},
)
_TRAINS = "it is for training"
_CHECKPOINT = "a checkpoint says how its LoRA was trained (alpha 32 if it does not)"
TRAINING_ONLY: Mapping[str, str] = {
    **dict.fromkeys(RATE_FLAGS, _TRAINS),
    **dict.fromkeys(SCHEDULE, _TRAINS),
    **dict.fromkeys(("stage", "model.prompt_path", "datasets.train_ann_path", "run.evaluate"), _TRAINS),
    **dict.fromkeys(("run.log_freq", "run.accum_grad_iters", "run.batch_size_train"), _TRAINS),
    **dict.fromkeys(("run.optims.beta2", "run.use_apollo"), _TRAINS),
    **dict.fromkeys(("model.torch_compile_mode", "run.torch_compile_mode"), _TRAINS),
    **dict.fromkeys(("model.lora_rank", "model.lora_alpha", "model.lora_dropout"), _CHECKPOINT),
    "run.output_dir": "it is the trainer's; --output_dir names this job's own folder",
}
EVALUATOR = YamlReader(
    "evaluates SALMONN",
    {
        **MODEL_FLAGS,
        "model.ckpt": "lora_dir",
        "model.test_prompt_path": "prompts",
        "datasets.prefix": "audio_prefix",
        "run.seed": "seed",
        "run.batch_size_eval": "per_device_bsz",
        "generate.max_new_tokens": "gen_max_new_tokens",
        "generate.num_beams": "num_beams",
        "generate.end_sym": "end_sym",
    },
    {
        **NO_EFFECT,
        **TRAINING_ONLY,
        "run.num_workers": "--num_models says how many models answer",
        **dict.fromkeys(PARALLEL, "--num_models says how many models answer"),
        **dict.fromkeys(TENSORRT, "--compiled names what jobs/compile.py has compiled"),
        **dict.fromkeys(SAMPLING, "nothing is drawn with several beams, or without do_sample"),
    },
    {**FIXED_MODEL, "generate.min_length": 1, "generate.repetition_penalty": 1.0, "generate.length_penalty": 1.0},
)
EFFICIENCY = YamlReader(
    "measures SALMONN",
    {
        **MODEL_FLAGS,
        "model.ckpt": "lora_dir",
        "model.test_prompt_path": "prompts",
        "run.seed": "seed",
        "run.batch_size_eval": "batch_sizes",
    },
    {
        **NO_EFFECT,
        **TRAINING_ONLY,
        **EVALUATOR.no_effect,
        **dict.fromkeys(("datasets.prefix", "datasets.valid_ann_path", *TEST_FILES), "--audio_path names the clip"),
        **dict.fromkeys(SEARCH, "--new_tokens of the likeliest tokens are generated, whatever the model says"),
        "run.num_workers": "one process is measured",
        **dict.fromkeys(PARALLEL, "one process is measured"),
    },
    FIXED_MODEL,
)


COMPILER = YamlReader(
    "compiles SALMONN",
    {
        **MODEL_FLAGS,
        "model.ckpt": "lora_dir",
        "run.seed": "seed",
        "run.batch_size_eval": "windows",
        "run.optimization_level": "optimization_level",
        "run.tensorrt_device": "tensorrt_device",
    },
    {
        **{key: reason for key, reason in EFFICIENCY.no_effect.items() if key not in TENSORRT},
        **dict.fromkeys(("model.test_prompt_path", "datasets.prefix", *TEST_FILES, *SEARCH), "nothing is answered"),
        **dict.fromkeys(("run.tensorrt", "run.jit_mode"), "--backend tensorrt compiles with TensorRT"),
    },
    FIXED_MODEL,
)


def is_nested(loaded: Mapping[Any, Any]) -> bool:
    """Whether a file has SALMONN's nested sections instead of voxray's flags."""
    return any(isinstance(loaded.get(section), Mapping) for section in SECTIONS)


def trainer_flags(loaded: dict[Any, Any], path: Path) -> tuple[dict[Any, Any], list[str]]:
    """Translate a file of SALMONN's trainer into flags of train_salmonn (see ``_flags``)."""
    if not is_nested(loaded):
        return loaded, []
    keys = _dotted(loaded)
    flags, errors = _flags({name: value for name, value in keys.items() if name not in SCHEDULE}, path, TRAINER)
    flags.setdefault("stage", 2 if "init_adapter" in flags else 1)
    return flags | _schedule_flags(keys, path, errors), errors


def evaluator_flags(loaded: dict[Any, Any], path: Path, mode: str) -> tuple[dict[Any, Any], list[str]]:
    """Translate a file of SALMONN's evaluator into flags of evaluate (see ``_flags``).

    Args:
        mode: ``--mode``, such as ``submission_asr``; selects the annotation files.
    """
    if not is_nested(loaded):
        return loaded, []
    keys = _dotted(loaded)
    manifests, sampling = _manifests(keys, mode), _sampling_flags(keys)
    handled = {*TEST_FILES, "datasets.valid_ann_path", *(SAMPLING if sampling else ())}
    flags, errors = _flags({name: value for name, value in keys.items() if name not in handled}, path, EVALUATOR)
    return flags | sampling | ({"val_jsonl": manifests} if manifests else {}), errors


def efficiency_flags(loaded: dict[Any, Any], path: Path) -> tuple[dict[Any, Any], list[str]]:
    """Translate a file of SALMONN's evaluator into flags of efficiency (see ``_flags``)."""
    return _flags(_dotted(loaded), path, EFFICIENCY) if is_nested(loaded) else (loaded, [])


def compiler_flags(loaded: dict[Any, Any], path: Path) -> tuple[dict[Any, Any], list[str]]:
    """Translate a file of SALMONN's evaluator into flags of compile (see ``_flags``)."""
    return _flags(_dotted(loaded), path, COMPILER) if is_nested(loaded) else (loaded, [])


def _flags(keys: Mapping[str, Any], path: Path, reader: YamlReader) -> tuple[dict[Any, Any], list[str]]:
    """Translate dotted keys into flags. Keys without effect print a warning on standard error, one per reason.

    Returns:
        {flag: value}, and one line for each error.
    """
    flags: dict[Any, Any] = {}
    errors: list[str] = []
    ignored: dict[str, list[str]] = {}
    for key, value in keys.items():
        if key in reader.flags:
            name = reader.flags[key]
            if value not in ("", None) and flags.setdefault(name, value) != value:
                errors.append(f"{path}: {key}: is {value!r}, and another key of the same meaning {flags[name]!r}")
        elif key in reader.no_effect:
            ignored.setdefault(reader.no_effect[key], []).append(key)
        elif key in reader.only:
            if value not in (reader.only[key], None):
                required = reader.only[key]
                errors.append(f"{path}: {key}: must be {required!r}, as this job {reader.job} (got {value!r})")
        else:
            errors.append(f"{path}: {key}: unknown key")
    for reason, names in ignored.items():
        have = "has" if len(names) == 1 else "have"
        print(f"warning: {path}: {', '.join(names)} {have} no effect: {reason}", file=sys.stderr, flush=True)
    return flags, errors


def _dotted(loaded: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested file to {"run.optims.init_lr": value}."""
    keys: dict[str, Any] = {}
    for key, value in loaded.items():
        name = f"{prefix}{key}"
        keys |= _dotted(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return keys


def _manifests(keys: Mapping[str, Any], mode: str) -> list[Any]:
    """Annotation files that a mode evaluates; without a mode, all test files."""
    kind, _, task = mode.partition("_")
    if kind == "valid" and keys.get("datasets.valid_ann_path"):
        return [keys["datasets.valid_ann_path"]]
    all_tasks, *by_task = TEST_FILES
    names = [all_tasks] if keys.get(all_tasks) else [name for name in by_task if not task or name.endswith(task)]
    return [keys[name] for name in names if keys.get(name)]


def _sampling_flags(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling flags, if the file samples with a single beam. voxray does not support sampling with several beams."""
    if keys.get("generate.do_sample") is not True or keys.get("generate.num_beams", 4) != 1:
        return {}
    return {name: keys.get(f"generate.{name}", default) for name, default in (("temperature", 1.0), ("top_p", 0.9))}


def _schedule_flags(keys: Mapping[str, Any], path: Path, errors: list[str]) -> dict[str, int]:
    """Flags for the length of training: ``max_epoch`` epochs of ``iters_per_epoch`` steps, or passes over the data if
    ``epoch_based``. Appends a line to ``errors`` for an invalid number.
    """
    numbers = {}
    for key, default in (("run.optims.max_epoch", 30), ("run.iters_per_epoch", 3000), ("run.save_ep", 1)):
        value = keys.get(key, default)
        if isinstance(value, bool) or not str(value).isdecimal() or not int(value):
            errors.append(f"{path}: {key}: must be a whole number, 1 or more (got {value!r})")
            return {}
        numbers[key] = int(value)
    epochs, steps, epochs_per_save = numbers.values()
    if keys.get("run.epoch_based") is True:
        return {"epochs": epochs, "max_steps": 0, "eval_steps": 0}
    return {"max_steps": epochs * steps, "eval_steps": steps, "save_steps": epochs_per_save * steps}
