"""The process in which vLLM runs. It needs vLLM, numpy and the standard library, and not voxray.

It reads requests on standard input and writes answers to the standard output that it was started with. Both are lines
of JSON; the samples of a request, float32 one clip after the other, follow its line. The first line holds the
arguments of vLLM's engine. Whatever libraries print goes to standard error.
"""

import json
import os
import sys
import threading
import time
from typing import Any, BinaryIO

SAMPLE_RATE_HZ = 16_000
POLL_SEC = 1.0


def exit_with_parent() -> None:
    """End this process when the one that started it has ended, even in the middle of an answer."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SEC)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_request(stream: BinaryIO) -> tuple[dict[str, Any], list[Any]] | None:
    """The next request and the samples of its rows (None for a row without audio); None at the end of the stream."""
    import numpy as np

    line = stream.readline()
    if not line:
        return None
    request, clips = json.loads(line), list[Any]()
    for row in request.get("rows", ()):
        count = row["num_samples"]
        clips.append(np.frombuffer(stream.read(4 * count), np.float32) if count else None)
    return request, clips


def vllm_prompt(row: dict[str, Any], samples: Any, is_encoder_decoder: bool) -> dict[str, Any]:
    """The prompt of a row, as vLLM's engine takes it."""
    audio = {"multi_modal_data": {"audio": (samples, SAMPLE_RATE_HZ)}} if samples is not None else {}
    if is_encoder_decoder:
        return {
            "encoder_prompt": {"prompt": "", **audio},
            "decoder_prompt": {"prompt_token_ids": row["prompt_ids"]},
        }
    return {"prompt_token_ids": row["prompt_ids"], **audio}


def sampling_options(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``SamplingParams``. JSON has no numbers as keys, which ``logit_bias`` needs."""
    biases = {int(token): bias for token, bias in options.get("logit_bias", {}).items()}
    return {**options, "logit_bias": biases or None}


def answer(engine: Any, options: dict[str, Any], request: dict[str, Any], clips: list[Any]) -> list[dict[str, Any]]:
    """Token ids of the answers to the rows of a request."""
    from vllm import SamplingParams  # type: ignore[import-not-found]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    rows = request["rows"]
    prompts = [vllm_prompt(row, clip, options["is_encoder_decoder"]) for row, clip in zip(rows, clips, strict=True)]
    sampling = [SamplingParams(detokenize=False, **sampling_options(row["sampling"])) for row in rows]
    lora = LoRARequest("tuned", 1, options["adapter"]) if options["adapter"] else None
    outputs = engine.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
    return [{"ids": list(output.outputs[0].token_ids)} for output in outputs]


def main() -> None:
    exit_with_parent()
    sys.path.pop(0)  # the folder of this file, whose modules are voxray's
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(value: object) -> None:
        answers.write(json.dumps(value) + "\n")

    try:
        options = json.loads(sys.stdin.buffer.readline())
        from vllm import LLM  # type: ignore[import-not-found]

        engine = LLM(**options["arguments"])
        reply({"is_ready": True})
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    while request := read_request(sys.stdin.buffer):
        try:
            reply({"rows": answer(engine, options, *request)})
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
