"""Flag groups that several jobs share. A job's settings class is a sum of these and a few fields of its own."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from voxray.config.parse import CommaStrings, Flag, Settings
from voxray.core.manifest import language_code
from voxray.core.tasks import parse_curriculum, parse_task_sizes, parse_task_weights

VOXTRAL = "mistralai/Voxtral-Mini-3B-2507"
SALMONN_PARTS = ("whisper_path", "beats_path", "llama_path")


def _auto_or_count(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError("must be auto or a whole number, 0 or more")
    return int(value)


TaskSizes = Annotated[dict[str, int], BeforeValidator(parse_task_sizes)]
TaskWeights = Annotated[dict[str, float], BeforeValidator(parse_task_weights)]


def _workers(value: Any) -> Any:
    return parse_range(value, "must be auto, a whole number, or a range such as 1:4") or _auto_or_count(value)


def parse_range(value: Any, message: str) -> str | int | None:
    """Read ``1:4``, fewest:most; one number if the two are equal, None if it is no range at all.

    Raises:
        ValueError: With the message, for a range that is none.
    """
    low, colon, high = str(value).partition(":")
    if not colon:
        return None
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise ValueError(message)
    return f"{int(low)}:{int(high)}" if int(low) < int(high) else int(low)


def as_range(value: str | int) -> tuple[int, int]:
    """Fewest and most of ``2`` or ``1:4``."""
    low, _, high = str(value).partition(":")
    return int(low), int(high or low)


Workers = Annotated[Literal["auto"] | int | str, BeforeValidator(_workers)]
"""``auto``, a number, or fewest:most."""


class PlacementFlags(Settings):
    cuda_visible_devices: Annotated[
        str, Flag(no_effect="Ray places the workers; --num_workers says how many"), BeforeValidator(str)
    ] = ""
    """GPUs to use, as older scripts named them."""


class BaseModelFlags(Settings):
    model_id: Annotated[str, Flag(("base_model", "model_name_or_path"), path="model")] = VOXTRAL
    """Base model: a folder on disk or a hub id."""


class ModelFlags(BaseModelFlags):
    bf16: bool = False
    """Hold the frozen base weights and compute in bfloat16 (else float32). LoRA weights and optimizer stay float32."""
    fp16: bool = False
    """The same in float16, for GPUs without bfloat16 such as a T4; training scales the loss."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Hold the language model's layers in 8 bits (LLM.int8) or 4 bits (NF4, double quantised), by bitsandbytes; the
    rest, and computing, is float32, or as --bf16 or --fp16 say."""
    tf32: bool = False
    """Let float32 matrix products use TF32 on GPUs that have it; warns where there is none."""

    @model_validator(mode="after")
    def _one_half_precision(self) -> "ModelFlags":
        if self.bf16 and self.fp16:
            raise ValueError("--bf16 and --fp16: give one of them")
        return self


class SalmonnPartsFlags(Settings):
    """What a SALMONN is put together from, in the place of a folder that holds it."""

    config_spellings: ClassVar[tuple[str, ...]] = ("cfg_path",)
    whisper_path: Annotated[str, Flag(path="model")] = ""
    """Whisper model whose encoder hears speech: a folder, or a hub id. With the next two, a SALMONN is put together in
    the output folder."""
    beats_path: Annotated[str, Flag(path="input")] = ""
    """BEATs file (.pt), which hears all other sound."""
    llama_path: Annotated[str, Flag(path="model")] = ""
    """Language model with its tokenizer: a folder, or a hub id."""
    end_sym: str = "</s>"
    """Token that ends an answer, for a base that is put together."""

    @property
    def missing_parts(self) -> list[str]:
        """Flags of the parts that are not given."""
        return [f"--{name}" for name in SALMONN_PARTS if not getattr(self, name)]


class CompiledFlags(Settings):
    compiled: Annotated[str, Flag(path="input")] = ""
    """Folder that jobs/compile.py wrote: what hears the audio runs as it was compiled there. It is refused unless it is
    of these weights and this precision, made on such a device by this version of torch. What it holds is a program, so
    give none that you would not run."""


class OutputFlags(Settings):
    output_dir: Annotated[str, Flag(("out_dir",), path="output")] = ""
    """Folder for everything the job writes; relative ones stand under --storage_path, or the current directory."""
    storage_path: str = ""
    """Absolute folder that outlives the cluster, a shared mount; relative outputs of submitted jobs need it. Training,
    evaluate and featurize take a URL as well (s3://bucket/voxray, gs://bucket/voxray)."""


def _numbers(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


CommaNumbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
"""``0.9,1.1`` on the command line, a list or the same string in YAML."""


def _sizes(value: Any) -> Any:
    return _numbers(str(value) if isinstance(value, int) and not isinstance(value, bool) else value)


CommaCounts = Annotated[
    tuple[Annotated[int, Field(ge=1, le=1024)], ...],
    BeforeValidator(_sizes),
    AfterValidator(lambda sizes: tuple(sorted(set(sizes)))),
    Field(min_length=1),
]
"""``1,4``, or one number, as older scripts' YAML files have it; in ascending order."""


class FeatureFlags(Settings):
    num_actors: Annotated[int, Field(ge=0)] = 0
    """Ray Data processes that make features; 0 takes one per CPU, as far as there is work for them."""
    rows_per_shard: Annotated[int, Field(ge=1, le=4096)] = 64
    """Manifest rows per shard file."""
    strict: bool = False
    """End the job at the first bad row instead of listing it in quarantine.jsonl."""
    store: Annotated[Literal["mel", "pcm16", "encoder"], Flag(("cache",))] = "mel"
    """What feature shards hold of a clip: mel (float16 log-mel), pcm16 (the samples; log-mel is made at loading), or
    encoder (outputs of the frozen audio encoder, so that training skips it)."""
    cache_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of stored encoder outputs: float32 gives the losses of mel shards to the last bit in a run without --bf16,
    float16 is as small as bfloat16 and eight times as precise."""
    cache_budget_gib: Annotated[float, Field(gt=0)] = 200.0
    """Largest size of the shards of --store encoder, GiB; the need is estimated first, and more is refused."""
    language: Annotated[str, Flag(("language_abbr",)), AfterValidator(language_code)] = ""
    """Language of the audio rows that name none, as a two-letter code; without it nothing is said of them."""
    features_cache_dir: Annotated[str, Flag(path="output")] = "~/.cache/voxray/shards"
    """Where copies of shards are kept that are read from a URL."""
    features_cache_gib: Annotated[float, Field(gt=0)] = 50.0
    """Largest size of those copies, GiB; the ones used longest ago go first."""


class TrimFlags(Settings):
    trim_audio_tokens: bool = False
    """Leave out the audio tokens that stand for the padding of the last window (30 s for Voxtral), which are most of a
    short clip's. It changes what the model reads, so an adapter remembers it, and jobs that use the adapter follow."""


class ClipLimitFlags(Settings):
    min_chars_per_sec: Annotated[float, Field(ge=0)] = 0.5
    """Slowest transcript that is fine, in characters without spaces per second of audio."""
    max_chars_per_sec: Annotated[float, Field(gt=0)] = 25.0
    """Fastest transcript that is fine, in characters without spaces per second of audio."""
    min_peak_db: Annotated[float, Field(le=0)] = -40.0
    """Quietest peak that is fine, in dB of full scale."""
    min_rms_db: Annotated[float, Field(le=0)] = -50.0
    """Quietest clip that is fine, as root mean square in dB of full scale."""
    max_clip_share: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Largest share of samples at full scale."""
    max_dc: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest constant offset, as a share of full scale."""
    max_zero_tail_sec: Annotated[float, Field(ge=0)] = 1.0
    """Longest run of exact zeros at the end of a clip, in seconds."""
    min_high_band_db: Annotated[float, Field(le=0)] = -70.0
    """Least power above 4.2 kHz against all power, in dB, for files that say 8.4 kHz or more; -160 turns it off."""
    max_duration_error_sec: Annotated[float, Field(ge=0)] = 0.1
    """Largest difference between the length a row states and the one decoded, in seconds."""


def check_pairs(settings: Settings, *lows: str) -> None:
    """Refuse a lower limit over its upper one; ``min_x`` and ``max_x`` are a pair."""
    for low in lows:
        high = low.replace("min_", "max_", 1)
        if getattr(settings, low) > getattr(settings, high):
            raise ValueError(f"--{low} {getattr(settings, low):g} is over --{high} {getattr(settings, high):g}")


class SharedFeatureFlags(FeatureFlags):
    features_dir: Annotated[str, Flag(path="output")] = ""
    """Folder of feature shards to reuse and fill, or its URL (s3://bucket/features); by default `features` in the
    output folder."""


class VariantFlags(Settings):
    variants: Annotated[int, Field(ge=1, le=100)] = 1
    """Fixed variants of every training clip, made when featurized; the first is the clip as it is. Each epoch draws one
    of them for every row."""
    speeds: Annotated[
        tuple[Annotated[float, Field(ge=0.5, le=2)], ...], BeforeValidator(_numbers), Field(min_length=1)
    ] = (0.9, 1.1)
    """Factors of tempo and pitch that the other variants take in turn; 1 leaves it."""
    noise_snr: Annotated[CommaNumbers, Field(max_length=2)] = ()
    """Lowest and highest level of speech over added noise in dB, such as 10,20; without it no noise is added."""
    noise_dir: Annotated[str, Flag(path="input")] = ""
    """Folder of recordings that noise is taken from; without it noise is white."""
    noise_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability that a variant has noise."""
    room_dir: Annotated[str, Flag(path="input")] = ""
    """Folder of room impulse responses; without it no room is added."""
    room_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability that a variant is heard in a room."""
    variant_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the variants; another one makes other shards."""


class MaskFlags(Settings):
    freq_masks: Annotated[int, Field(ge=0, le=100)] = 0
    """SpecAugment: bands of mel bins masked in every training clip; 0 turns it off."""
    freq_mask_bins: Annotated[int, Field(ge=1)] = 27
    """Widest such band, in bins."""
    time_masks: Annotated[int, Field(ge=0, le=100)] = 0
    """SpecAugment: stretches of frames masked in every training clip; 0 turns it off."""
    time_mask_frames: Annotated[int, Field(ge=1)] = 100
    """Longest such stretch, in frames of 10 ms."""
    time_mask_share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Largest share of the clip that one such stretch covers."""


class LoraFlags(Settings):
    tuning: Literal["lora", "dora", "rslora", "full"] = "lora"
    """What trains: LoRA; DoRA, which adapts direction and length of weights apart; rsLoRA, with scale alpha / sqrt(r);
    or full, all weights of the projector and the language model themselves, which needs a float32 base."""
    lora_r: Annotated[int, Field(ge=1, le=1024)] = 16
    """LoRA rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA scale; updates are multiplied by alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout on the input of every LoRA branch, as a probability."""

    @model_validator(mode="after")
    def _full_tuning_is_float32(self) -> "LoraFlags":
        """Small updates vanish in 16 bits, and there is no second copy of the weights in float32."""
        given = [f"--{name}" for name in ("bf16", "fp16") if getattr(self, name, False)]
        given += [f"--quantize {kind}" for kind in [getattr(self, "quantize", "none")] if kind != "none"]
        if self.tuning == "full" and given:
            raise ValueError(
                f"--tuning full trains the weights themselves, in float32: leave out {' and '.join(given)}"
            )
        return self


class OptimizerFlags(Settings):
    lr: Annotated[float, Flag(("learning_rate",)), Field(gt=0)] = 2e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the norm of all gradients to this; 0 turns clipping off."""
    max_bad_steps: Annotated[int, Field(ge=1)] = 10
    """Stop after so many steps in a row whose loss or gradients are not finite; each of them is skipped and counted."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability mass taken from the right token and spread over the vocabulary."""
    epochs: Annotated[int, Flag(("num_train_epochs",)), Field(ge=1)] = 3
    """Passes over the data; with --task_weights, as many draws as there are rows each."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Total optimizer steps, instead of --epochs; 0 leaves it to --epochs."""
    per_device_bsz: Annotated[int, Flag(("per_device_train_batch_size",)), Field(ge=1)] = 2
    """Rows per forward pass in one worker."""
    grad_accum: Annotated[int, Flag(("gradient_accumulation_steps",)), Field(ge=1)] = 1
    """Forward passes per worker and optimizer step."""
    grad_ckpt: Annotated[bool, Flag(("gradient_checkpointing",))] = False
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """Compile the language model's layers (torch.compile), which takes a minute or more at the start. Losses, and those
    of a run that was resumed, are the same to rounding, not to the last bit."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the data order, the LoRA start and dropout."""


class BatchingFlags(Settings):
    batching: Literal["fixed", "length", "packed"] = "fixed"
    """Which rows share a forward pass: fixed takes --per_device_bsz rows as they are drawn, length those of similar
    length, packed puts rows one after the other, without padding, up to --pack_tokens."""
    pack_tokens: Annotated[int, Field(ge=16)] = 4096
    """Tokens of a pack (prompts, audio and answers) with --batching packed; no row may be longer."""


class TaskBatchingFlags(BatchingFlags):
    per_task_bsz: TaskSizes | None = None
    """Rows of a forward pass by task, asr=4,sqa=2,tqa=8, with --batching length; each then holds one task alone."""
    curriculum: Annotated[tuple[tuple[tuple[str, ...], int], ...], BeforeValidator(parse_curriculum)] = ()
    """Tasks and epochs of one phase after the other, tqa:1,tqa+asr:1,tqa+asr+sqa:3; takes the place of --epochs."""

    @model_validator(mode="after")
    def _sizes_need_lengths(self) -> "TaskBatchingFlags":
        if self.per_task_bsz and self.batching != "length":
            raise ValueError("--per_task_bsz: needs --batching length")
        return self


class WorkerFlags(PlacementFlags):
    num_workers: Annotated[Workers, Flag(("nproc",))] = "auto"
    """Training processes: auto is one per GPU (one on a CPU machine); 0 trains in this process, without Ray; 1:4 is as
    many as the cluster has room for, and a step is then planned for the most, so that it holds the same rows with any
    number of them."""
    loader_workers: Annotated[int, Field(ge=0)] = 1
    """Threads that read and collate batches ahead of the model; 0 reads in line."""
    pin_memory: bool = True
    """Copy batches to the GPU from page-locked memory; nothing to do on a CPU."""
    drop_last: bool = False
    """Leave out the rows that do not fill the last optimizer step of an epoch."""


class StrategyFlags(Settings):
    strategy: Literal["ddp", "deepspeed"] = "ddp"
    """How several workers train together: ddp keeps the whole model and optimizer in each of them, deepspeed divides
    them up (ZeRO), which saves memory with --tuning full, and little with LoRA."""
    zero_stage: Annotated[int, Field(ge=2, le=3)] = 2
    """What --strategy deepspeed divides: 2 gradients and the optimizer's moments, 3 the weights as well, for bases
    without --quantize."""

    @model_validator(mode="after")
    def _stage_3_divides_plain_weights(self) -> "StrategyFlags":
        quantized = getattr(self, "quantize", "none")
        if self.zero_stage == 3 and self.strategy != "deepspeed":
            raise ValueError("--zero_stage 3: needs --strategy deepspeed")
        if self.zero_stage == 3 and quantized != "none":
            raise ValueError(f"--zero_stage 3: cannot divide quantised weights; leave out --quantize {quantized}")
        return self


class ScoreFlags(Settings):
    terms: Annotated[str, Flag(path="input")] = ""
    """Text file of terms (drugs, findings), one a line; which of them transcripts get right is reported."""
    english_spelling: Annotated[str, Flag(path="input")] = ""
    """Whisper's table of British and American spellings for English transcripts: a checkpoint's normalizer.json."""
    caption_jars: Annotated[str, Flag(path="input")] = ""
    """Folder with the two jars of Stanford CoreNLP 3.6.0: also computes METEOR, SPICE and SPIDEr of captions, with
    Java."""


class EvaluationDataFlags(Settings):
    val_jsonl: Annotated[CommaStrings, Flag(("jsonl", "test_jsonl"), path="input")] = ()
    """Manifests to evaluate on, comma separated."""
    max_len: Annotated[int, Flag(("max_length",)), Field(ge=1)] = 1280
    """Longest row in tokens (prompt, audio and answer); longer rows are listed in quarantine.jsonl, never cut."""
