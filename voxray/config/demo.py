"""Settings of jobs/demo.py."""

import ipaddress
from typing import Annotated

from pydantic import AfterValidator, Field

from voxray.config.evaluate import AdapterFlags, SearchFlags
from voxray.config.parse import Flag


def _address(value: str) -> str:
    if value == "localhost":
        return value
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("must be localhost or the number of one of this machine's addresses") from None


class DemoSettings(AdapterFlags, SearchFlags):
    host: Annotated[str, AfterValidator(_address)] = "127.0.0.1"
    """Address to listen on. 127.0.0.1 takes requests from this machine alone; with 0.0.0.0 anybody on the network can
    use the demo, which has no password."""
    port: Annotated[int, Field(ge=0, le=65535)] = 7860
    """Port to listen on; 0 takes any free one and says which."""
    language: str = ""
    """Language that the page starts with, as a two-letter code; empty lets the model find out."""
    max_new_tokens: Annotated[int, Flag(("gen_max_new_tokens",)), Field(ge=1)] = 256
    """Longest answer in tokens; the page says so where the output is cut off at it."""
    max_upload_mib: Annotated[float, Field(gt=0)] = 50.0
    """Largest file that may be uploaded, MiB."""
    max_audio_sec: Annotated[float, Field(gt=0)] = 600.0
    """Longest clip that is answered, in seconds."""
    max_len: Annotated[int, Field(ge=1)] = 16_384
    """Longest prompt in tokens, audio included; more is refused, never cut."""
    batch_size: Annotated[int, Flag(("per_device_bsz",)), Field(ge=1)] = 8
    """Chunks of a long recording that are answered together."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 2
    """Requests that are worked on at a time: clips are read side by side, the model answers one after the other."""
    queue_size: Annotated[int, Field(ge=1)] = 16
    """Requests that may wait for that; further ones are told that the demo is busy."""
    keep_sec: Annotated[int, Field(ge=1)] = 600
    """How long an uploaded clip is kept for playing it again, in seconds; all are deleted when the demo ends."""
