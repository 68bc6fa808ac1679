"""The settings files of SALMONN's own trainers and evaluators: which of their keys become flags, which change nothing
here, and which ask for what there is not.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class YamlReader:
    """What one of our jobs makes of such a file.

    Attributes:
        job: What it does, for messages.
        flags: Keys and the flags that they are.
        no_effect: Keys that are warned about, with what holds instead.
        only: Keys that may have one value: another one asks for what is not here.
    """

    job: str
    flags: Mapping[str, str]
    no_effect: Mapping[str, str]
    only: Mapping[str, Any]


SECTIONS = ("model", "datasets", "run", "generate")
MODEL: Mapping[str, str] = {
    "model.llama_path": "llama_path",
    "model.llm_path": "llama_path",
    "model.whisper_path": "whisper_path",
    "model.beats_path": "beats_path",
    "model.end_sym": "end_sym",
}
ONE_MODEL: Mapping[str, Any] = {
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
"""There is one SALMONN here, and one way to train it."""
_PROCESSES = "--num_workers says how many processes train"
_COMPILES = "--compile compiles the language model's layers"
_KERNEL = "there is no such kernel here"
NOWHERE: Mapping[str, str] = {
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
"""Keys without effect in any job."""
SCHEDULE = ("run.epoch_based", "run.iters_per_epoch", "run.optims.max_epoch", "run.save_ep")
"""Keys that together say how long to train, and how often to validate and save."""
RATES: Mapping[str, str] = {
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
DRAWS = ("generate.do_sample", "generate.temperature", "generate.top_p")
TENSORRT = ("run.tensorrt", "run.optimization_level", "run.tensorrt_device", "run.jit_mode")

TRAINER = YamlReader(
    "trains SALMONN",
    {
        **MODEL,
        **RATES,
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
        **NOWHERE,
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
    {**ONE_MODEL, "run.evaluate": False, "run.optims.beta2": 0.999, "run.use_apollo": False},
)
_TRAINS = "it is for training"
_CHECKPOINT = "a checkpoint says how its LoRA was trained (alpha 32 if it does not)"
OF_TRAINING: Mapping[str, str] = {
    **dict.fromkeys(RATES, _TRAINS),
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
        **MODEL,
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
        **NOWHERE,
        **OF_TRAINING,
        "run.num_workers": "--num_models says how many models answer",
        **dict.fromkeys(PARALLEL, "--num_models says how many models answer"),
        **dict.fromkeys(TENSORRT, "--compiled names what jobs/compile.py has compiled"),
        **dict.fromkeys(DRAWS, "nothing is drawn with several beams, or without do_sample"),
    },
    {**ONE_MODEL, "generate.min_length": 1, "generate.repetition_penalty": 1.0, "generate.length_penalty": 1.0},
)
EFFICIENCY = YamlReader(
    "measures SALMONN",
    {
        **MODEL,
        "model.ckpt": "lora_dir",
        "model.test_prompt_path": "prompts",
        "run.seed": "seed",
        "run.batch_size_eval": "batch_sizes",
    },
    {
        **NOWHERE,
        **OF_TRAINING,
        **EVALUATOR.no_effect,
        **dict.fromkeys(("datasets.prefix", "datasets.valid_ann_path", *TEST_FILES), "--audio_path names the clip"),
        **dict.fromkeys(SEARCH, "--new_tokens of the likeliest tokens are generated, whatever the model says"),
        "run.num_workers": "one process is measured",
        **dict.fromkeys(PARALLEL, "one process is measured"),
    },
    ONE_MODEL,
)


COMPILER = YamlReader(
    "compiles SALMONN",
    {
        **MODEL,
        "model.ckpt": "lora_dir",
        "run.seed": "seed",
        "run.batch_size_eval": "windows",
        "run.optimization_level": "optimization_level",
        "run.tensorrt_device": "tensorrt_device",
    },
    {
        **{key: why for key, why in EFFICIENCY.no_effect.items() if key not in TENSORRT},
        **dict.fromkeys(("model.test_prompt_path", "datasets.prefix", *TEST_FILES, *SEARCH), "nothing is answered"),
        **dict.fromkeys(("run.tensorrt", "run.jit_mode"), "--backend tensorrt compiles with TensorRT"),
    },
    ONE_MODEL,
)


def is_nested(loaded: Mapping[Any, Any]) -> bool:
    """Whether a file is one of SALMONN's, rather than one of flags."""
    return any(isinstance(loaded.get(section), Mapping) for section in SECTIONS)


def trainer_flags(loaded: dict[Any, Any], path: Path) -> tuple[dict[Any, Any], list[str]]:
    """Turn a file of SALMONN's trainer into flags of train_salmonn (see ``_flags``)."""
    if not is_nested(loaded):
        return loaded, []
    keys = _dotted(loaded)
    flags, errors = _flags({name: value for name, value in keys.items() if name not in SCHEDULE}, path, TRAINER)
    flags.setdefault("stage", 2 if "init_adapter" in flags else 1)
    return flags | _lengths(keys, path, errors), errors


def evaluator_flags(loaded: dict[Any, Any], path: Path, mode: str) -> tuple[dict[Any, Any], list[str]]:
    """Turn a file of SALMONN's evaluator into flags of evaluate (see ``_flags``).

    Args:
        mode: ``submission_asr`` and so on, which of the files of rows is meant.
    """
    if not is_nested(loaded):
        return loaded, []
    keys = _dotted(loaded)
    files, drawing = _rows_of(keys, mode), _drawing(keys)
    read = {*TEST_FILES, "datasets.valid_ann_path", *(DRAWS if drawing else ())}
    flags, errors = _flags({name: value for name, value in keys.items() if name not in read}, path, EVALUATOR)
    return flags | drawing | ({"val_jsonl": files} if files else {}), errors


def efficiency_flags(loaded: dict[Any, Any], path: Path) -> tuple[dict[Any, Any], list[str]]:
    """Turn a file of SALMONN's evaluator into flags of efficiency (see ``_flags``)."""
    return _flags(_dotted(loaded), path, EFFICIENCY) if is_nested(loaded) else (loaded, [])


def compiler_flags(loaded: dict[Any, Any], path: Path) -> tuple[dict[Any, Any], list[str]]:
    """Turn a file of SALMONN's evaluator into flags of compile (see ``_flags``)."""
    return _flags(_dotted(loaded), path, COMPILER) if is_nested(loaded) else (loaded, [])


def _flags(keys: Mapping[str, Any], path: Path, reading: YamlReader) -> tuple[dict[Any, Any], list[str]]:
    """Keys as flags; those without effect are warned about on standard error, once for every reason.

    Returns:
        {flag: value}, and what is wrong with the file, in lines.
    """
    flags: dict[Any, Any] = {}
    errors: list[str] = []
    idle: dict[str, list[str]] = {}
    for key, value in keys.items():
        if key in reading.flags:
            name = reading.flags[key]
            if value not in ("", None) and flags.setdefault(name, value) != value:
                errors.append(f"{path}: {key}: is {value!r}, and another key of the same meaning {flags[name]!r}")
        elif key in reading.no_effect:
            idle.setdefault(reading.no_effect[key], []).append(key)
        elif key in reading.only:
            if value not in (reading.only[key], None):
                wanted = reading.only[key]
                errors.append(f"{path}: {key}: must be {wanted!r}, as this job {reading.job} (got {value!r})")
        else:
            errors.append(f"{path}: {key}: unknown key")
    for why, names in idle.items():
        have = "has" if len(names) == 1 else "have"
        print(f"warning: {path}: {', '.join(names)} {have} no effect: {why}", file=sys.stderr, flush=True)
    return flags, errors


def _dotted(loaded: Mapping[Any, Any], above: str = "") -> dict[str, Any]:
    """{"run.optims.init_lr": value} of a nested file."""
    found: dict[str, Any] = {}
    for key, value in loaded.items():
        name = f"{above}{key}"
        found |= _dotted(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _rows_of(keys: Mapping[str, Any], mode: str) -> list[Any]:
    """Files of the rows that a mode is about; without a mode, of all that are to be tested."""
    kind, _, task = mode.partition("_")
    general, of_task = "datasets.test_ann_path", [name for name in TEST_FILES[1:] if not task or name.endswith(task)]
    if kind == "valid" and keys.get("datasets.valid_ann_path"):
        return [keys["datasets.valid_ann_path"]]
    return [keys[name] for name in ([general] if keys.get(general) else of_task) if keys.get(name)]


def _drawing(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Flags of sampling, where tokens are to be drawn; the evaluator's drawing along several beams is not done here."""
    if keys.get("generate.do_sample") is not True or keys.get("generate.num_beams", 4) != 1:
        return {}
    return {name: keys.get(f"generate.{name}", usual) for name, usual in (("temperature", 1.0), ("top_p", 0.9))}


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
