"""A hub in a folder and on a loopback server, with a model and a small Common Voice, for the tests of prefetch."""

import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import soundfile
import soxr
from conftest import SPEECH, TINY, read_rows

MODEL, DATASET = "openai/whisper-small", "mozilla-foundation/common_voice_17_0"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
COLUMNS = "client_id path sentence_id sentence up_votes down_votes age gender accents variant locale segment".split()  # noqa: SIM905
SIZES = {"train": 8, "dev": 2, "test": 2}
LARGE = 100_000
"""Files of a server from this size on are "large": the server states their SHA-256."""


@cache
def clips(language: str = "ko") -> list[tuple[str, str, bytes]]:
    """(name, sentence, MP3 at 48 kHz) of as many of the assets' clips as ``SIZES`` says."""
    rows, encoded = read_rows(str(SPEECH / "asr.val.jsonl"))[: sum(SIZES.values())], []
    for number, row in enumerate(rows):
        samples, rate_hz = soundfile.read(row["audio_path"], dtype="float32")
        packed = io.BytesIO()
        soundfile.write(packed, soxr.resample(samples, rate_hz, 48_000, quality="HQ"), 48_000, format="MP3")
        encoded.append((f"common_voice_{language}_{number}.mp3", row["transcript"], packed.getvalue()))
    return encoded


def table(rows: Sequence[tuple[str, str, bytes]], split: str, locale: str = "ko") -> str:
    """A table of Common Voice; every second row is of another speaker, none of them of two splits."""
    lines = ["\t".join(COLUMNS)]
    for number, (name, sentence, _) in enumerate(rows):
        values = {"client_id": f"{split}{number % 2}", "path": name, "sentence": sentence, "locale": locale}
        lines.append("\t".join(values.get(column, "") for column in COLUMNS))
    return "\n".join(lines) + "\n"


def by_split(rows: list[tuple[str, str, bytes]]) -> dict[str, list[tuple[str, str, bytes]]]:
    """The clips of every split."""
    splits, start = {}, 0
    for split, size in SIZES.items():
        splits[split], start = rows[start : start + size], start + size
    return splits


def release(folder: Path, language: str = "ko") -> Path:
    """A release as it lies on disk after unpacking; returns the folder that holds ``<language>/``."""
    home = folder / "cv-corpus-17.0-2024-03-15" / language
    (home / "clips").mkdir(parents=True)
    rows = by_split(clips(language))
    for split, some in rows.items():
        (home / f"{split}.tsv").write_text(table(some, split, language), encoding="utf-8")
        for name, _, sound in some:
            (home / "clips" / name).write_bytes(sound)
    (home / "validated.tsv").write_text(table(clips(language), "v", language), encoding="utf-8")
    return home.parent


def archive(folder: Path, path: Path) -> Path:
    """A release as it is downloaded."""
    with tarfile.open(path, "w:gz") as packed:
        packed.add(folder, folder.name)
    return path


def hub(folder: Path) -> Path:
    """A folder laid out as a hub: a model, with weights that nobody needs, and Common Voice in two languages."""
    model = folder / MODEL
    shutil.copytree(TINY, model)
    for name in ("pytorch_model.bin", "model.fp32-00001-of-00001.safetensors", "flax_model.msgpack", "onnx/a.onnx"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"other weights")
    (model / "README.md").write_text("a model")
    rows, home = by_split(clips()), folder / "datasets" / DATASET
    for language in ("en", "ko"):
        for split, some in rows.items():
            transcript = home / "transcript" / language / f"{split}.tsv"
            transcript.parent.mkdir(parents=True, exist_ok=True)
            transcript.write_text(table(some, split, language), encoding="utf-8")
            packed = home / "audio" / language / split / f"{language}_{split}_0.tar"
            packed.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(packed, "w") as tar:
                for name, _, sound in some:
                    member = tarfile.TarInfo(f"{language}_{split}_0/{name}")
                    member.size = len(sound)
                    tar.addfile(member, io.BytesIO(sound))
    (home / "transcript" / "ko" / "invalidated.tsv").write_text(table(rows["dev"], "i"), encoding="utf-8")
    (home / "README.md").write_text("a data set")
    return folder


class HubServer(ThreadingHTTPServer):
    """The part of the hub's API that fetching needs, over a folder laid out as one.

    Attributes:
        requests: (method, path, Range, Authorization) of everything asked.
        stop_after: {end of a path: bytes after which sending it stops until ``resume`` is set}.
        damaged: Ends of paths whose bytes arrive wrong.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[tuple[str, str, str, str]] = []
        self.stop_after: dict[str, int] = {}
        self.damaged: set[str] = set()
        self.resume = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self, end: str) -> list[str]:
        """The Range of every download of a file whose path ends so."""
        return [byte_range for method, path, byte_range, _ in self.requests if method == "GET" and path.endswith(end)]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = self.headers
        self.server.requests.append((self.command, path, headers.get("Range", ""), headers.get("Authorization", "")))
        if path.startswith("/api/"):
            self._api(path)
        else:
            self._file(path)

    def _api(self, path: str) -> None:
        kind, _, rest = path.removeprefix("/api/").partition("/")
        repo_id, _, what = rest.partition("/tree/")
        repo_id, _, revision = repo_id.partition("/revision/")
        home = self._home(kind, repo_id)
        if not home.is_dir() or revision not in ("", "main", "v1", COMMIT):
            code = "RevisionNotFound" if home.is_dir() else "RepoNotFound"
            self._send(b"{}", status=404, **{"X-Error-Code": code})
        elif what:
            paths = (file for file in sorted(home.rglob("*")) if file.is_file())
            self._send(json.dumps([self._entry(file, home) for file in paths]).encode())
        else:
            self._send(json.dumps({"id": repo_id, "sha": COMMIT, "siblings": []}).encode())

    def _home(self, kind: str, repo_id: str) -> Path:
        return self.server.folder / (repo_id if kind == "models" else f"datasets/{repo_id}")

    def _entry(self, file: Path, home: Path) -> dict:
        raw = file.read_bytes()
        git_id = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
        entry = {"type": "file", "path": file.relative_to(home).as_posix(), "size": len(raw), "oid": git_id}
        if len(raw) >= LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 130}
        return entry

    def _file(self, path: str) -> None:
        repo_id, _, rest = path.strip("/").partition("/resolve/")
        file = self.server.folder / repo_id / rest.partition("/")[2]
        raw = file.read_bytes()
        if any(path.endswith(end) for end in self.server.damaged):
            raw = raw[:-1] + bytes([raw[-1] ^ 1])
        start, extra = 0, {}
        if range_header := self.headers.get("Range"):
            start = int(range_header.removeprefix("bytes=").partition("-")[0])
            extra = {"Content-Range": f"bytes {start}-{len(raw) - 1}/{len(raw)}"}
        stop = next((at for end, at in self.server.stop_after.items() if path.endswith(end)), None)
        self._send(raw[start:], status=206 if range_header else 200, stop=stop, **extra, **{"X-Repo-Commit": COMMIT})

    def _send(self, raw: bytes, *, status: int = 200, stop: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(raw[:stop])
        if stop is not None:
            self.wfile.flush()
            self.server.resume.wait(60)
            self.close_connection = True


@contextmanager
def serving(folder: Path) -> Iterator[HubServer]:
    """The server, answering until the end of the block."""
    with HubServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.resume.set()
            server.shutdown()
