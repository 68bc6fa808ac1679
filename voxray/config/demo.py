"""Settings of jobs/demo.py."""

import ipaddress
from typing import Annotated

from pydantic import AfterValidator, Field

from voxray.config.evaluate import AdapterFlags, SamplingFlags
from voxray.config.flags import Flag
from voxray.config.parse import CommaStrings
from voxray.core.languages import language_code


def _address(value: str) -> str:
    if value == "localhost":
        return value
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("must be localhost or the number of one of this machine's addresses") from None


class DemoSettings(AdapterFlags, SamplingFlags):
    host: Annotated[str, AfterValidator(_address)] = "127.0.0.1"
    """Address to listen on. 127.0.0.1 accepts requests from this machine only; with 0.0.0.0 everyone on the network can
    use the demo, which has no password."""
    port: Annotated[int, Field(ge=0, le=65535)] = 7860
    """Port to listen on; 0 picks a free one and prints it."""
    allowed_hosts: CommaStrings = ()
    """Names by which browsers reach the demo, comma separated, such as that of a proxy in front of it. Requests by its
    addresses, by localhost and by the name of this machine are always answered."""
    language: Annotated[str, AfterValidator(language_code)] = ""
    """Language selected when the page opens, as a code such as ko or as an English name; empty lets the model detect
    it."""
    max_new_tokens: Annotated[int, Flag(("gen_max_new_tokens",)), Field(ge=1)] = 256
    """Maximum length of an answer in tokens; the page says if an output was cut off there."""
    max_upload_mib: Annotated[float, Field(gt=0)] = 50.0
    """Maximum size of an uploaded file, and of all files of a request together, in MiB."""
    max_audio_sec: Annotated[float, Field(gt=0)] = 600.0
    """Maximum length of a clip, in seconds."""
    max_len: Annotated[int, Field(ge=1)] = 16_384
    """Maximum length of a prompt in tokens, audio included; longer prompts are rejected, never truncated."""
    batch_size: Annotated[int, Flag(("per_device_bsz",)), Field(ge=1)] = 8
    """Chunks of a long recording that are generated together."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 2
    """Requests handled at the same time: their audio is decoded in parallel, the model answers one after the other."""
    queue_size: Annotated[int, Field(ge=1)] = 16
    """Maximum number of waiting requests; further ones get the answer that the demo is busy."""
    keep_sec: Annotated[int, Field(ge=1)] = 600
    """How long uploaded clips stay available for playback, in seconds; all are deleted when the demo ends."""
