"""Flag groups that several jobs share. A job's settings class inherits from some of them and adds its own fields."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from voxray.config.flags import Flag
from voxray.config.input_files import require_absolute
from voxray.config.parse import InputFiles, Settings, convert, split_commas
from voxray.core.languages import language_code
from voxray.core.tasks import parse_curriculum, parse_task_sizes, parse_task_weights

VOXTRAL = "mistralai/Voxtral-Mini-3B-2507"
SALMONN_PARTS = ("whisper_path", "beats_path", "llama_path")


def _auto_or_count(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError("must be auto or a whole number, 0 or more")
    return int(value)


TaskSizes = Annotated[dict[str, int], convert(parse_task_sizes)]
TaskWeights = Annotated[dict[str, float], convert(parse_task_weights)]


def _workers(value: Any) -> Any:
    return parse_range(value, "must be auto, a whole number, or a range such as 1:4") or _auto_or_count(value)


def parse_range(value: Any, message: str) -> str | int | None:
    """Validate a range such as ``1:4`` (lowest:highest).

    Returns:
        The range as text, a single number if both ends are equal, or None if the value has no colon.
    Raises:
        ValueError: With ``message``, if the value has a colon but is not a valid range.
    """
    low, colon, high = str(value).partition(":")
    if not colon:
        return None
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise ValueError(message)
    return f"{int(low)}:{int(high)}" if int(low) < int(high) else int(low)


def as_range(value: str | int) -> tuple[int, int]:
    """Lowest and highest number of ``2`` or ``1:4``."""
    low, _, high = str(value).partition(":")
    return int(low), int(high or low)


Workers = Annotated[Literal["auto"] | int | str, convert(_workers)]
"""``auto``, a number, or lowest:highest."""


class PlacementFlags(Settings):
    cuda_visible_devices: Annotated[
        str, Flag(no_effect="Ray places the workers; --num_workers says how many"), convert(str)
    ] = ""
    """GPUs to use, as older scripts named them."""


PRECISIONS = ("bf16", "fp16", "fp32")
"""Flags of the type to compute in."""


def _one_precision(settings: Settings) -> Settings:
    names = [f"--{name}" for name in PRECISIONS if getattr(settings, name, False)]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)}: give one of them")
    return settings


class BaseModelFlags(Settings):
    model_id: Annotated[str, Flag(("base_model", "model_name_or_path"), path="model")] = VOXTRAL
    """Base model: a folder on disk or a hub id."""


class ModelFlags(BaseModelFlags):
    bf16: bool = False
    """Load the frozen base weights and compute in bfloat16. LoRA weights and optimizer state stay float32. It is the
    default for a base that is stored in bfloat16, such as Voxtral, on GPUs that have it; otherwise float32 is."""
    fp16: bool = False
    """Same as --bf16 but in float16, for GPUs without bfloat16 such as a T4. Training then uses loss scaling."""
    fp32: bool = False
    """Load the frozen base weights and compute in float32."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Quantise the language model's layers with bitsandbytes to 8 bits (LLM.int8) or 4 bits (NF4, double quantised).
    Other weights and the computation have the type that they have without it."""
    tf32: bool = False
    """Use TF32 for float32 matrix products on GPUs that support it; warns if there is none."""

    _check_precision = model_validator(mode="after")(_one_precision)


class EncoderPrecisionFlags(Settings):
    bf16: bool = False
    """Compute the outputs of --store encoder in bfloat16, as a training run with --bf16 does. It is the default for a
    base that is stored in bfloat16, on GPUs that have it."""
    fp32: bool = False
    """Compute the outputs of --store encoder in float32."""

    _check_precision = model_validator(mode="after")(_one_precision)


class SalmonnPartsFlags(Settings):
    """The models from which a SALMONN base is assembled, as an alternative to a folder that holds one."""

    config_aliases: ClassVar[tuple[str, ...]] = ("cfg_path",)
    whisper_path: Annotated[str, Flag(path="model")] = ""
    """Whisper model whose encoder encodes speech: a folder or a hub id. Together with --beats_path and --llama_path, a
    SALMONN base is assembled in the output folder."""
    beats_path: Annotated[str, Flag(path="input")] = ""
    """BEATs checkpoint (.pt), whose encoder encodes all other sound."""
    llama_path: Annotated[str, Flag(path="model")] = ""
    """Language model with its tokenizer: a folder or a hub id."""
    end_sym: str = "</s>"
    """Token that ends an answer, for an assembled base."""

    @property
    def missing_parts(self) -> list[str]:
        """Flags of the parts that are not set."""
        return [f"--{name}" for name in SALMONN_PARTS if not getattr(self, name)]


class CompiledFlags(Settings):
    compiled: Annotated[str, Flag(path="input")] = ""
    """Folder that jobs/compile.py wrote; the audio encoder runs from its compiled programs. It must have been compiled
    from the same weights, in the same precision, on the same kind of device and with the same torch version. It
    contains machine code, so use only folders you trust."""


class OutputFlags(Settings):
    output_dir: Annotated[str, Flag(("out_dir",), path="output")] = ""
    """Folder for everything the job writes. A relative path is below --storage_path, or else the current directory."""
    storage_path: Annotated[str, AfterValidator(require_absolute)] = ""
    """Absolute path of a folder that outlives the cluster, such as a shared mount; submitted jobs with relative output
    paths need it. Training, evaluate and featurize also accept a URL (s3://bucket/voxray, gs://bucket/voxray)."""


CommaNumbers = Annotated[tuple[float, ...], convert(split_commas)]
"""``0.9,1.1`` on the command line; a list or the same string in YAML."""


def _split_counts(value: Any) -> Any:
    return split_commas(str(value) if isinstance(value, int) and not isinstance(value, bool) else value)


CommaCounts = Annotated[
    tuple[Annotated[int, Field(ge=1, le=1024)], ...],
    convert(_split_counts),
    AfterValidator(lambda counts: tuple(sorted(set(counts)))),
    Field(min_length=1),
]
"""``1,4``, or a single number as in the YAML files of older scripts; sorted in ascending order, without duplicates."""


class FeatureFlags(Settings):
    num_actors: Annotated[int, Field(ge=0)] = 0
    """Ray Data processes that compute features; 0 uses one per CPU, but no more than there is work for."""
    rows_per_shard: Annotated[int, Field(ge=1, le=4096)] = 64
    """Manifest rows per shard file."""
    strict: bool = False
    """Stop at the first bad row instead of listing it in quarantine.jsonl."""
    store: Annotated[Literal["mel", "pcm16", "encoder"], Flag(("cache",))] = "mel"
    """What feature shards store per clip: mel (log-mel in float16), pcm16 (the samples; log-mel is computed when they
    are loaded), or encoder (outputs of the frozen audio encoder, which training then skips)."""
    cache_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of stored encoder outputs. float32 reproduces the losses of mel shards bit for bit in a run without
    --bf16; float16 takes as much space as bfloat16 and is eight times as precise."""
    cache_budget_gib: Annotated[float, Field(gt=0)] = 200.0
    """Maximum disk space for the shards of --store encoder, in GiB. The job estimates it first and stops if it is
    exceeded."""
    language: Annotated[str, Flag(("language_abbr",)), AfterValidator(language_code)] = ""
    """Language of audio rows that name none, as a code such as ko or as an English name; empty leaves their language
    out of the prompt."""
    features_cache_dir: Annotated[str, Flag(path="output")] = "~/.cache/voxray/shards"
    """Folder for local copies of shards that are read from a URL."""
    features_cache_gib: Annotated[float, Field(gt=0)] = 50.0
    """Maximum total size of those copies, in GiB; the least recently used are deleted first."""


class TrimFlags(Settings):
    trim_audio_tokens: bool = False
    """Drop the audio tokens of the padding in the last window (30 s for Voxtral), which are most of the tokens of a
    short clip. This changes the model's input, so it is saved with the adapter and applied by every job that loads the
    adapter."""


class ClipLimitFlags(Settings):
    min_chars_per_sec: Annotated[float, Field(ge=0)] = 0.5
    """Slowest acceptable transcript, in characters (without spaces) per second of audio."""
    max_chars_per_sec: Annotated[float, Field(gt=0)] = 25.0
    """Fastest acceptable transcript, in characters (without spaces) per second of audio."""
    min_peak_db: Annotated[float, Field(le=0)] = -40.0
    """Lowest acceptable peak level, in dB relative to full scale."""
    min_rms_db: Annotated[float, Field(le=0)] = -50.0
    """Lowest acceptable root-mean-square level of a clip, in dB relative to full scale."""
    max_clip_share: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Largest acceptable share of samples at full scale (clipping)."""
    max_dc: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest acceptable constant (DC) offset, as a share of full scale."""
    max_zero_tail_sec: Annotated[float, Field(ge=0)] = 1.0
    """Longest acceptable run of exact zeros at the end of a clip, in seconds."""
    min_high_band_db: Annotated[float, Field(le=0)] = -70.0
    """Lowest acceptable power above 4.2 kHz relative to the total power, in dB, for files with a sampling rate of
    8.4 kHz or more; -160 turns the check off."""
    max_duration_error_sec: Annotated[float, Field(ge=0)] = 0.1
    """Largest acceptable difference between a row's stated duration and the decoded one, in seconds."""


def check_pairs(settings: Settings, *lows: str) -> None:
    """Check that each lower limit ``min_x`` does not exceed its upper limit ``max_x``.

    Raises:
        ValueError: It does.
    """
    for low in lows:
        high = low.replace("min_", "max_", 1)
        if getattr(settings, low) > getattr(settings, high):
            raise ValueError(f"--{low} {getattr(settings, low):g} is over --{high} {getattr(settings, high):g}")


class SharedFeatureFlags(FeatureFlags):
    features_dir: Annotated[str, Flag(path="output")] = ""
    """Folder or URL (s3://bucket/features) of feature shards to reuse and add to; by default `features` in the output
    folder."""


class VariantFlags(Settings):
    variants: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of fixed augmented variants of every training clip, computed with the features; the first is the original
    clip. Each epoch draws one variant per row."""
    speeds: Annotated[tuple[Annotated[float, Field(ge=0.5, le=2)], ...], convert(split_commas), Field(min_length=1)] = (
        0.9,
        1.1,
    )
    """Speed factors (tempo and pitch) that the augmented variants use in turn; 1 leaves the speed unchanged."""
    noise_snr: Annotated[CommaNumbers, Field(max_length=2)] = ()
    """Lowest and highest signal-to-noise ratio of added noise, in dB, such as 10,20; empty adds no noise."""
    noise_dir: Annotated[str, Flag(path="input")] = ""
    """Folder of noise recordings; empty uses white noise."""
    noise_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability that a variant gets noise."""
    room_dir: Annotated[str, Flag(path="input")] = ""
    """Folder of room impulse responses; empty adds no reverberation."""
    room_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability that a variant gets reverberation."""
    variant_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the variants; a different seed writes different shards."""


class MaskFlags(Settings):
    freq_masks: Annotated[int, Field(ge=0, le=100)] = 0
    """SpecAugment: frequency bands masked in every training clip; 0 turns it off."""
    freq_mask_bins: Annotated[int, Field(ge=1)] = 27
    """SpecAugment: maximum width of a frequency mask, in mel bins."""
    time_masks: Annotated[int, Field(ge=0, le=100)] = 0
    """SpecAugment: time spans masked in every training clip; 0 turns it off."""
    time_mask_frames: Annotated[int, Field(ge=1)] = 100
    """SpecAugment: maximum length of a time mask, in frames of 10 ms."""
    time_mask_share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """SpecAugment: maximum length of a time mask, as a share of the clip."""


class LoraFlags(Settings):
    tuning: Literal["lora", "dora", "rslora", "full"] = "lora"
    """What is trained: lora; dora, which adapts direction and magnitude of the weights separately; rslora, LoRA with
    the scale alpha / sqrt(r); or full, all weights of the projector and the language model, which needs a float32
    base."""
    lora_r: Annotated[int, Field(ge=1, le=1024)] = 16
    """LoRA rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA alpha; updates are scaled by alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout probability on the input of every LoRA branch."""

    @model_validator(mode="after")
    def _full_tuning_is_float32(self) -> "LoraFlags":
        """Small updates round to zero in 16 bits, and there is no float32 master copy of the weights."""
        conflicts = [f"--{name}" for name in ("bf16", "fp16") if getattr(self, name, False)]
        conflicts += [f"--quantize {kind}" for kind in [getattr(self, "quantize", "none")] if kind != "none"]
        if self.tuning == "full" and conflicts:
            raise ValueError(
                f"--tuning full trains the weights themselves, in float32: leave out {' and '.join(conflicts)}"
            )
        return self


class OptimizerFlags(Settings):
    lr: Annotated[float, Flag(("learning_rate",)), Field(gt=0)] = 2e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    optim: Literal["adamw_torch", "adamw_torch_fused"] = "adamw_torch"
    """PyTorch's AdamW, weight by weight or fused: faster on GPUs, rounds differently. Fixed for a run."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the total gradient norm to this value; 0 turns clipping off."""
    max_bad_steps: Annotated[int, Field(ge=1)] = 10
    """Stop after this many consecutive steps with a non-finite loss or gradient; each such step is skipped and
    counted."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability mass moved from the correct token to the whole vocabulary."""
    epochs: Annotated[int, Flag(("num_train_epochs",)), Field(ge=1)] = 3
    """Passes over the data; with --task_weights, each epoch draws as many rows as there are."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Total optimizer steps; overrides --epochs. 0 uses --epochs."""
    per_device_bsz: Annotated[int, Flag(("per_device_train_batch_size",)), Field(ge=1)] = 2
    """Rows per forward pass in one worker."""
    grad_accum: Annotated[int, Flag(("gradient_accumulation_steps",)), Field(ge=1)] = 1
    """Forward passes per worker in each optimizer step."""
    grad_ckpt: Annotated[bool, Flag(("gradient_checkpointing",))] = False
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """Compile the language model's layers (torch.compile); this takes a minute or more at the start. Losses then equal
    those of an uncompiled run, and a resumed run those of an uninterrupted one, up to rounding, not bit for bit."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the data order, the LoRA initialization and dropout."""

    @field_validator("epochs", "max_steps", mode="before")
    @classmethod
    def _counts_of_other_trainers(cls, value: Any, info: ValidationInfo) -> Any:
        """Other trainers accept a part of an epoch, and -1 steps for no limit."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            return value
        if info.field_name == "epochs" and number % 1:
            raise ValueError("must be a whole number; --max_steps ends a run within an epoch")
        if info.field_name == "max_steps" and number < 0:
            raise ValueError("must be 0 or more; 0 trains for --epochs")
        return value


class BatchingFlags(Settings):
    batching: Literal["fixed", "length", "packed"] = "fixed"
    """How rows are batched: fixed takes --per_device_bsz rows in the order they are drawn, length groups rows of
    similar length, packed concatenates rows without padding up to --pack_tokens."""
    pack_tokens: Annotated[int, Field(ge=16)] = 4096
    """Maximum tokens of a pack (prompts, audio and answers) with --batching packed; no row may be longer."""


class TaskBatchingFlags(BatchingFlags):
    per_task_bsz: TaskSizes | None = None
    """Rows per forward pass by task, such as asr=4,sqa=2,tqa=8, with --batching length; each batch then holds a single
    task."""
    curriculum: Annotated[tuple[tuple[tuple[str, ...], int], ...], convert(parse_curriculum)] = ()
    """Training phases in order, each as tasks:epochs, such as tqa:1,tqa+asr:1,tqa+asr+sqa:3; replaces --epochs."""

    @model_validator(mode="after")
    def _sizes_need_lengths(self) -> "TaskBatchingFlags":
        if self.per_task_bsz and self.batching != "length":
            raise ValueError("--per_task_bsz: needs --batching length")
        return self


class WorkerFlags(PlacementFlags):
    num_workers: Annotated[Workers, Flag(("nproc",))] = "auto"
    """Training processes: auto is one per GPU, one without GPUs (on a cluster, of all GPUs that it has or can start); 0
    trains in this process, without Ray; 1:4 is elastic, as many between 1 and 4 as fit. Elastic steps are planned for
    the highest number, so each step has the same rows with any number of workers."""
    worker_timeout_sec: Annotated[int, Field(ge=10)] = 600
    """Time in which a training process must respond to Ray. One that stands still for longer is killed, and training
    starts again from the last checkpoint."""
    loader_workers: Annotated[int, Field(ge=0)] = 1
    """Threads that read and collate batches in advance; 0 does it in the training thread."""
    pin_memory: bool = True
    """Copy batches to the GPU from page-locked memory; has no effect on a CPU."""
    drop_last: bool = False
    """Drop the rows that do not fill the last optimizer step of an epoch."""


class ScoreFlags(Settings):
    terms: Annotated[str, Flag(path="input")] = ""
    """Text file of terms (such as drugs or findings), one per line; the report states which of them the transcripts get
    right."""
    english_spelling: Annotated[str, Flag(path="input")] = ""
    """Whisper's table of British and American spellings, for English transcripts: the normalizer.json of a Whisper
    checkpoint."""
    normalizer: Literal["basic-v2", "whisper-basic-v1"] = "basic-v2"
    """Rules by which transcripts in languages other than Korean and English are normalised before scoring: basic-v2
    keeps vowel signs and other marks, whisper-basic-v1 replaces them by spaces, as Whisper's leaderboards do."""
    caption_jars: Annotated[str, Flag(path="input")] = ""
    """Folder with the two jars of Stanford CoreNLP 3.6.0; with it METEOR, SPICE and SPIDEr of captions are computed too
    (needs Java)."""


class EvaluationDataFlags(Settings):
    val_jsonl: Annotated[InputFiles, Flag(("jsonl", "test_jsonl"), path="input")] = ()
    """Manifests to evaluate on, comma separated."""
    max_len: Annotated[int, Flag(("max_length",)), Field(ge=1)] = 1280
    """Maximum length of a row in tokens (prompt, audio and answer); longer rows are listed in quarantine.jsonl, never
    truncated."""
