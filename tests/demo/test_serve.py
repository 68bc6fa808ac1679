"""Errors that keep the demo from starting, the address that it prints, and a page with the tasks of the model."""

import os
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from conftest import SPEECH, TINY
from helpers.running import load_job
from pydantic import ValidationError

from voxray.commands import demo as serve
from voxray.config.demo import DemoSettings

SAMPLE = str(SPEECH / "sample.wav")


@dataclass
class Model:
    """The attributes of ``DemoModel`` that the page uses when it is built."""

    tasks: tuple[str, ...]
    has_base: bool
    base_name: str = "<base>"
    adapter_name: str = ""
    seen: list[Any] = field(default_factory=list)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio's folder is set in the environment; restore the environment after every test."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")


def exit_code_and_error(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        load_job("demo").main(["--model_id", TINY, *argv])
    code = end.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err


def test_errors_at_the_start_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, error = exit_code_and_error(capsys, "--language", "kr")
    assert code == 2 and "--language: language 'kr' is not known; did you mean 'ko' (korean)?" in error
    code, error = exit_code_and_error(capsys, "--host", "my.machine", "--port", "70000", "--max_upload_mib", "0")
    assert code == 2 and [line.split()[1] for line in error.splitlines()[:3]] == [
        "--host:",
        "--port:",
        "--max_upload_mib:",
    ]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        message = f"error: --host 127.0.0.1 --port {port}: Address already in use; --port 0 takes a free one\n"
        assert exit_code_and_error(capsys, "--port", port) == (1, message)
    code, error = exit_code_and_error(capsys, "--host", "192.0.2.1", "--port", "0")
    assert (code, error) == (1, "error: --host 192.0.2.1 --port 0: Cannot assign requested address\n")
    code, error = exit_code_and_error(capsys, "--port", "0", "--lora_dir", "/nowhere")
    assert code == 1 and error.startswith("error: --lora_dir /nowhere: no adapter here")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert exit_code_and_error(capsys, "--port", "0") == (
        1,
        "error: the demo needs Gradio: pip install 'voxray[demo]'\n",
    )
    assert not os.path.exists(os.environ["GRADIO_TEMP_DIR"]), "the folder for uploads is gone"


@pytest.mark.parametrize(
    ("host", "url", "warns"),
    [
        ("127.0.0.1", "http://127.0.0.1:7860", False),
        ("localhost", "http://localhost:7860", False),
        ("::1", "http://[::1]:7860", False),
        ("0.0.0.0", "http://127.0.0.1:7860", True),
        ("::", "http://127.0.0.1:7860", True),
        ("192.168.1.5", "http://192.168.1.5:7860", True),
    ],
)
def test_address_and_warning(host: str, url: str, warns: bool, capsys: pytest.CaptureFixture[str]) -> None:
    serve._print_address(DemoSettings(host=host).host, 7860)
    output = capsys.readouterr()
    assert output.out == f"demo at {url}\n"
    assert ("anybody on the network can use this demo" in output.err) == warns
    with pytest.raises(ValidationError, match="must be localhost or the number"):
        DemoSettings(host=f"{host}x")


def build(model: Model, example: str = "", **flags: Any) -> tuple[Any, dict[str, Any]]:
    """The page, and the properties of its components as the browser gets them: {id: properties}."""
    pytest.importorskip("gradio")
    from voxray.demo.page import build_page

    page = build_page(model, DemoSettings(**flags), example)  # type: ignore[arg-type]
    parts = [part["props"] for part in page.get_config_file()["components"]]
    return page, {part["elem_id"]: part for part in parts if part.get("elem_id")}


def test_the_page_offers_the_tasks_of_the_model() -> None:
    _, parts = build(Model(("asr",), has_base=False))
    assert not any(parts[name]["visible"] for name in ("question", "compare", "base")) and "example" not in parts
    assert parts["tuned-text"]["label"] == "Answer"
    _, parts = build(Model(("asr", "sqa"), has_base=True), SAMPLE)
    assert all(parts[name]["visible"] for name in ("question", "compare", "base", "example"))
    assert parts["question"]["info"] == "About the clip" and parts["tuned-text"]["label"] == "With the adapter"
    _, parts = build(Model(("asr", "sqa", "tqa"), has_base=True))
    assert parts["question"]["info"] == "About the clip, or by itself"


def test_names_and_notes_in_the_header() -> None:
    from voxray.demo.page import _header

    assert "<b>&lt;base&gt;</b>" in _header(Model(("asr",), False))  # type: ignore[arg-type]
    assert "no base to compare with" in _header(Model(("asr",), False, adapter_name="run/full"))  # type: ignore[arg-type]
    assert "no base" not in _header(Model(("asr",), True, adapter_name="run/adapter"))  # type: ignore[arg-type]


def test_notes_below_an_answer() -> None:
    from voxray.demo.answers import DemoAnswer
    from voxray.demo.page import _facts

    complete = _facts(DemoAnswer(True, "text", 12.0, 3.0, 5, False, 1, {"cer": 0.25}), 48)
    assert "<dt>RTFx</dt><dd>4.0</dd>" in complete and "<dt>cer</dt><dd>0.250</dd>" in complete
    assert "note" not in complete
    cut_off = _facts(DemoAnswer(True, "", 0.0, 3.0, 48, True, 3, {}), 48)
    assert "RTFx" not in cut_off and "scores" not in cut_off
    assert all(note in cut_off for note in ("cut off at 48 tokens", "answered in 3 chunks", "the answer is empty"))


def test_flags_reach_the_page() -> None:
    page, parts = build(Model(("asr",), False), language="ko", concurrency=3, queue_size=5, keep_sec=30)
    assert parts["language"]["value"] == "ko" and page.delete_cache == (30, 30)
    [limit] = {fn.concurrency_limit for fn in page.fns.values() if len(fn.inputs) == 5}
    assert (limit, page._queue.max_size) == (3, 5)
    page, _ = build(Model(("asr",), False), keep_sec=7200)
    assert page.delete_cache == (60, 7200)
    from voxray.demo.page import _footer

    assert "up to 90 s and 2.5 MiB" in _footer(DemoSettings(max_audio_sec=90, max_upload_mib=2.5))
