"""Decode the clips of strangers in a process of their own, with limits of memory and time.

A decoder that crashes, hangs or takes too much memory ends this process only. Run as a program, the module is that
process.
"""

import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import soundfile

from voxray.audio.decode import decode
from voxray.core.errors import BadRow

MEMORY_BYTES = 4 << 30
"""Address space of the process. 10 min of two channels at 48 kHz take a tenth."""
DECODE_SEC = 60.0
"""Longest time that decoding may take, start of the process included."""
IMPORT_FOLDER = Path(__file__).parents[2]


class IsolatedDecoder:
    """Decodes every clip in a new process. One process is always started in advance, since its imports take a while."""

    def __init__(self) -> None:
        self._lock, self._is_closed = threading.Lock(), False
        self._next: subprocess.Popen[str] | None = _start()

    def decode(self, path: str, sample_rate_hz: int, target: Path, *, max_sec: float) -> None:
        """Decode a clip into a WAV file of float samples.

        Args:
            path, sample_rate_hz, max_sec: See ``decode.decode``.
            target: The file to write.
        Raises:
            BadRow: The clip is refused, or its decoder crashed, took too long or took too much memory
                (``audio_unreadable``).
        """
        with self._lock:
            process, self._next = self._next, None
        if process is None or process.poll() is not None:
            process = _start()
        request = {"path": path, "sample_rate_hz": sample_rate_hz, "target": str(target), "max_sec": max_sec}
        request["memory_bytes"] = MEMORY_BYTES
        try:
            output, _ = process.communicate(json.dumps(request), timeout=DECODE_SEC)
        except subprocess.TimeoutExpired:
            raise BadRow("audio_unreadable", f"cannot decode {path}: it takes over {DECODE_SEC:g} s") from None
        finally:
            process.kill()
            process.wait()
            with self._lock:  # not earlier: it would compete with the decoder for the CPU
                if self._next is None and not self._is_closed:
                    self._next = _start()
        if process.returncode:
            raise BadRow("audio_unreadable", f"cannot decode {path}: its decoder crashed, or takes too much memory")
        if output:
            raise BadRow(**json.loads(output))

    def close(self) -> None:
        """End the process that waits."""
        with self._lock:
            self._is_closed = True
            if self._next:
                self._next.kill()


def _start() -> "subprocess.Popen[str]":
    paths = [str(IMPORT_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "voxray.audio.isolated"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,  # Ctrl-C is for the demo, which ends its processes
    )


def main() -> None:
    """Read a request from standard input and decode its clip. A refusal is written to standard output."""
    import av  # noqa: F401  # the import takes a while, so it comes before the request

    if not (line := sys.stdin.read()):
        return
    request = json.loads(line)
    resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"], request["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        samples = decode(request["path"], request["sample_rate_hz"], max_sec=request["max_sec"])
        soundfile.write(request["target"], samples, request["sample_rate_hz"], format="WAV", subtype="FLOAT")
    except BadRow as error:
        print(json.dumps({"reason": error.reason, "message": error.message}), flush=True)
    os._exit(0)  # without the tidying up of the interpreter


if __name__ == "__main__":
    main()
