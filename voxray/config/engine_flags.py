"""Flags of the engine that answers rows."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from voxray.config.flag_groups import SALMONN_PARTS
from voxray.config.flags import Flag
from voxray.config.parse import Settings

_OF_OUR_LOOP = ("quantize", "trim_audio_tokens", "compiled", "merge_adapter", "static_cache", "lora_scale", "tf32")
REFUSED = {
    "vllm": (*_OF_OUR_LOOP, "num_beams"),
    "ct2": (*_OF_OUR_LOOP, "temperature", "top_p", "bf16", "fp16"),
    "server": (*_OF_OUR_LOOP, "num_beams", "bf16", "fp16", "gpus_per_model", "model_id", "lora_dir", *SALMONN_PARTS),
}
"""{engine: flags that it does not have}."""
_ADDRESS = re.compile(r"https?://[^/?#@\s]+(/[^?#\s]*)?")
STORES = {"vllm": ("pcm16",), "server": ("pcm16",), "ct2": ("mel", "pcm16")}
"""{engine: values of --store that it reads, first the default}. vLLM and servers compute features from samples."""


class EngineFlags(Settings):
    engine: Literal["transformers", "vllm", "ct2"] = "transformers"
    """What answers: transformers is voxray's own loop over a model of transformers; vllm is vLLM, for Whisper and for
    Voxtral in Mistral's format; ct2 is CTranslate2, for Whisper. `export` writes what the latter two load, with
    --format mistral and --format ct2."""
    engine_python: Annotated[str, Flag(path="model")] = ""
    """Python of an environment with vLLM, for --engine vllm, because vLLM does not install beside voxray. voxray does
    not have to be installed there. Empty uses the Python of this job."""
    server: str = ""
    """Address of a server with OpenAI's API, such as http://localhost:8000/v1, that answers instead of an engine here:
    transcriptions at /audio/transcriptions, questions at /chat/completions with input_audio. --per_device_bsz
    (--batch_size) is the number of requests at a time."""
    served_model: str = ""
    """Name of the model on the --server."""
    server_key: str = "OPENAI_API_KEY"
    """Environment variable that holds the key of the --server; the key is not stored or printed."""
    server_timeout_sec: Annotated[float, Field(gt=0)] = 120.0
    """Longest time to wait for one response of the --server."""
    server_retries: Annotated[int, Field(ge=0)] = 4
    """How often a request is sent again after an error that may pass, such as status 429 or 503, each time after a
    longer pause."""

    @property
    def engine_name(self) -> str:
        """``engine``, or ``server`` if a server answers."""
        return "server" if self.server else self.engine

    @model_validator(mode="after")
    def _can_answer(self) -> "EngineFlags":
        if self.server and self.engine != "transformers":
            raise ValueError("--server and --engine: give one of them")
        if bool(self.server) != bool(self.served_model):
            raise ValueError("--server and --served_model: give both of them")
        if self.server and not self.server.startswith(("http://", "https://")):
            raise ValueError(f"--server {self.server}: must start with http:// or https://")
        if self.server and not _ADDRESS.fullmatch(self.server):
            raise ValueError("--server: needs an address without user, password and query; --server_key is for the key")
        if not re.fullmatch(r"[A-Za-z_]\w*", self.server_key, re.ASCII):
            raise ValueError("--server_key: the name of an environment variable, not the key itself")
        if not self.server:
            for name in sorted({"server_key", "server_timeout_sec", "server_retries"} & self.model_fields_set):
                raise ValueError(f"--{name}: needs --server")
        if self.engine_python and self.engine != "vllm":
            raise ValueError("--engine_python: needs --engine vllm")
        flag = "--server" if self.server else f"--engine {self.engine}"
        for name in REFUSED.get(self.engine_name, ()):
            if name not in self.model_fields_set:
                continue
            if name == "model_id" or getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{flag}: not with --{name}")
        if self.engine_name in REFUSED and getattr(self, "perplexity", "none") == "all":
            raise ValueError(f"{flag}: not with --perplexity, because the engine does not score references")
        stores = STORES.get(self.engine_name, ())
        if stores and "store" in self.model_fields_set and getattr(self, "store", "") not in stores:
            raise ValueError(f"{flag}: needs --store {' or '.join(stores)}")
        return self
