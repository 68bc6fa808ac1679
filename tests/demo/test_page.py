"""The demo in a real browser: one server for all tests, used as a person would use it."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

import jiwer
import numpy as np
import pytest
import soundfile
from conftest import SPEECH, TINY
from helpers.adapters import random_adapter
from helpers.browser import BROWSER, Page, browser
from helpers.running import ROOT, Driver

from voxray.commands.infer import run_inference
from voxray.config.evaluate import InferSettings

if not find_spec("gradio"):  # importing it takes seconds
    pytest.skip("needs the extra `demo`", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]

SAMPLE = SPEECH / "sample.wav"
QUESTION = "숫자는 모두 몇 개입니까?"
MAX_NEW_TOKENS = 16
MICROPHONE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
CLIP_IS_THERE = "!!document.querySelector('[data-testid=audio-player-Clip]')"
GRADIO_MESSAGES = ("Method not implemented.",)
"""Console messages of Gradio's own script at the end of every answer."""


@dataclass(frozen=True)
class Demo:
    """A running demo.

    Attributes:
        url: Address of the page.
        run: Run folder of the adapter.
        folder: Folder for temporary files of the process.
        driver: The process.
        log: File with the output of the process.
    """

    url: str
    run: Path
    folder: Path
    driver: Driver
    log: Path

    def inferred(self, *, tuned: bool = True, **flags: str) -> str:
        """The answer of ``infer``."""
        model = {"lora_dir": str(self.run)} if tuned else {"model_id": TINY}
        settings = InferSettings.model_validate({**model, "max_new_tokens": MAX_NEW_TOKENS, **flags})
        return run_inference(settings, "")[0]["prediction"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    random_adapter(folder / "run" / "adapter")
    (folder / "temporary").mkdir()
    flags = ["--lora_dir", folder / "run", "--port", 0, "--max_new_tokens", MAX_NEW_TOKENS, "--keep_sec", 300]
    flags += ["--max_audio_sec", 20, "--max_upload_mib", 1, "--concurrency", 1, "--queue_size", 2]
    command = ["env", f"TMPDIR={folder / 'temporary'}", sys.executable, ROOT / "jobs" / "demo.py", *flags]
    driver = Driver([str(word) for word in command], folder / "log.txt")
    try:
        for _ in range(600):
            output = (folder / "log.txt").read_text()
            assert driver.process.poll() is None, output
            if "demo at " in output:
                break
            time.sleep(0.2)
        url = output.partition("demo at ")[2].split()[0]
        yield Demo(url, folder / "run", folder / "temporary", driver, folder / "log.txt")
    finally:
        driver.end()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser"), *MICROPHONE) as page:
        yield page


@pytest.fixture
def page(demo: Demo, chromium: Page) -> Page:
    """The page, newly opened."""
    chromium.console.clear()
    chromium.open(demo.url)
    chromium.wait_for(f"{is_shown('#run')} && {is_shown('#compare input')} && {is_shown('#tuned-text textarea')}")
    return chromium


def upload_clip(page: Page, path: Path) -> None:
    page.choose_files("#clip input[type=file]", path)
    page.wait_for(CLIP_IS_THERE)


def text_of(side: str) -> str:
    return f"document.querySelector('#{side}-text textarea').value"


def facts_of(page: Page, side: str) -> dict[str, str]:
    """{name: value} of the facts below an answer."""
    cells = f"[...document.querySelectorAll('#{side}-facts .facts div')]"
    return dict(page.read(f"{cells}.map(cell => [...cell.children].map(part => part.innerText))"))


def wait_for_text(page: Page, side: str) -> str:
    page.wait_for(f"!!document.querySelector('#{side}-facts .facts')")
    return page.read(text_of(side))


def wait_for_refusal(page: Page) -> str:
    page.wait_for("!!document.querySelector('#status [role=alert]')?.innerText")
    return page.read("document.querySelector('#status').innerText").strip()


def is_shown(selector: str) -> str:
    """JavaScript condition: the element exists and is visible."""
    return f"!!document.querySelector({json.dumps(selector)})?.getClientRects().length"


def test_a_clip_is_transcribed_with_and_without_the_adapter(page: Page, demo: Demo) -> None:
    assert page.read("document.title") == "voxray: voxtral-tiny"
    assert "run/adapter" in page.read("document.querySelector('.top').innerText")
    assert page.read("document.querySelector('#run').innerText") == "Transcribe"
    upload_clip(page, SAMPLE)
    page.click("#run")
    assert wait_for_text(page, "tuned") == demo.inferred(audio_path=str(SAMPLE))
    assert wait_for_text(page, "base") == demo.inferred(audio_path=str(SAMPLE), tuned=False)
    assert page.read(is_shown("#base-text textarea"))
    facts = facts_of(page, "tuned")
    assert list(facts) == ["audio", "tokens", "time", "RTFx"] and facts["audio"] == "2.0 s"
    assert float(facts["RTFx"]) > 0 and float(facts["time"].removesuffix(" s")) > 0
    assert set(page.console) <= set(GRADIO_MESSAGES)
    assert page.requests and all(request.startswith((demo.url, "blob:")) for request in page.requests)


def test_after_a_refused_file_a_clip_is_transcribed(page: Page, demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_text("these are words\n" * 40)
    upload_clip(page, tmp_path / "notes.wav")
    page.click("#run")
    assert wait_for_refusal(page) == "Cannot decode notes.wav: Format not recognised. Is it an audio file?"
    assert page.read(is_shown("#status [role=alert]"))
    assert page.read(text_of("tuned")) == page.read(text_of("base")) == ""
    page.click("#clip [aria-label=Clear]")
    page.wait_for("!!document.querySelector('#clip input[type=file]')")
    upload_clip(page, SAMPLE)
    page.click("#run")
    assert wait_for_text(page, "tuned") == demo.inferred(audio_path=str(SAMPLE))
    assert not page.read(is_shown("#status [role=alert]"))


def test_limits_of_length_and_size(page: Page, demo: Demo, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", np.zeros(21 * 8_000), 8_000)
    upload_clip(page, tmp_path / "long.wav")
    page.click("#run")
    assert wait_for_refusal(page) == "long.wav is too long: clips may last 20 s."
    # The page refuses a file that is too large. The server must refuse it as well.
    before = {path for path in demo.folder.rglob("*") if path.is_file()}
    assert upload(demo, b"x" * 100_000) == 200 and upload(demo, b"x" * 1_100_000) == 413
    assert sum(path.stat().st_size for path in set(demo.folder.rglob("large.wav")) - before) == 100_000


def upload(demo: Demo, content: bytes) -> int:
    """HTTP status of an upload."""
    head = 'Content-Disposition: form-data; name="files"; filename="large.wav"\r\nContent-Type: audio/wav'
    body = f"--edge\r\n{head}\r\n\r\n".encode() + content + b"\r\n--edge--\r\n"
    return post(f"{demo.url}/gradio_api/upload", body, "multipart/form-data; boundary=edge")


def post(url: str, body: bytes, content_type: str) -> int:
    try:
        with urlopen(Request(url, body, {"Content-Type": content_type})) as response:
            return response.status
    except HTTPError as error:
        return error.code
    except URLError as error:  # the server refused the request by its length and closed the connection
        assert isinstance(error.reason, BrokenPipeError | ConnectionResetError), error
        return 413


def test_enter_submits_a_question(page: Page, demo: Demo) -> None:
    page.click("#compare input")
    page.type("#question textarea", QUESTION)
    page.wait_for("document.querySelector('#run').innerText === 'Ask'")
    page.press("Enter", 13)
    assert wait_for_text(page, "tuned") == demo.inferred(question=QUESTION)
    assert "audio" not in facts_of(page, "tuned") and not page.read(is_shown("#base-text textarea"))
    upload_clip(page, SAMPLE)
    page.click("#run")
    page.wait_for("document.querySelector('#tuned-facts .facts').innerText.includes('audio')")
    assert page.read(text_of("tuned")) == demo.inferred(question=QUESTION, audio_path=str(SAMPLE))


def test_answers_are_scored_and_input_is_escaped(page: Page, demo: Demo) -> None:
    truth = "접수 번호 육 사 팔"
    page.click("#scoring button")
    page.wait_for("!!document.querySelector('#reference textarea')")
    page.type("#reference textarea", truth)
    page.click("#example")
    page.wait_for(CLIP_IS_THERE)
    page.click("#run")
    text = wait_for_text(page, "tuned")
    assert float(facts_of(page, "tuned")["cer"]) == pytest.approx(jiwer.cer(truth, text), abs=1e-3)
    page.read("document.querySelector('#language input').select()")
    page.type("#language input", "<img src=x onerror=document.title=1>${7*7}")
    page.press("Enter", 13)
    page.click("#run")
    message = wait_for_refusal(page)
    assert message.startswith("Language '<img src=x onerror=document.title=1>${7*7}' is not known; write")
    assert page.read("document.title") == "voxray: voxtral-tiny"


def test_microphone_recordings_are_transcribed(page: Page) -> None:
    """Chromium's fake microphone only beeps: the test checks that the recording arrives and can be decoded."""
    page.click("#clip [aria-label='Record audio']")
    page.wait_for("!!document.querySelector('#clip .record-button')")
    page.click("#clip .record-button")
    page.wait_for(is_shown("#clip .stop-button"))
    time.sleep(1.2)
    page.click("#clip .stop-button")
    page.wait_for(CLIP_IS_THERE)
    page.click("#run")
    wait_for_text(page, "tuned")
    assert 0.5 < float(facts_of(page, "tuned")["audio"].removesuffix(" s")) < 10


def submit(demo: Demo, data: list[Any], session: str) -> int:
    """HTTP status of a request like that of the button."""
    with urlopen(f"{demo.url}/config") as response:
        [number] = [entry["id"] for entry in json.load(response)["dependencies"] if len(entry["inputs"]) == 5]
    body = json.dumps({"data": data, "fn_index": number, "session_hash": session}).encode()
    return post(f"{demo.url}/gradio_api/queue/join", body, "application/json")


@pytest.mark.parametrize("path", ["{sample}", "/etc/passwd", "http://192.0.2.1/a.wav", "https://example.com/a.wav"])
@pytest.mark.parametrize("field", [0, 1])
def test_requests_for_local_files_and_urls_are_refused(path: str, field: int, demo: Demo) -> None:
    """As clip and in a text field: otherwise Gradio would copy the file to where it can be downloaded."""
    session = f"{path}{field}"
    path = path.format(sample=SAMPLE.with_name("asr.val.jsonl"))
    data: list[Any] = [None, "", "", "", False]
    data[field] = {"path": path, "meta": {"_type": "gradio.FileData"}}
    before = {file for file in demo.folder.rglob("*") if file.is_file()}
    assert submit(demo, data, session) == 200
    with urlopen(f"{demo.url}/gradio_api/queue/data?session_hash={quote(session)}", timeout=30) as response:
        events = [json.loads(line[6:]) for line in response.read().decode().splitlines() if line.startswith("data: ")]
    [done] = [event for event in events if event["msg"] == "process_completed"]
    assert not done["success"]
    assert done["output"]["error"] is None, "messages of unexpected errors may name files of the machine"
    assert ("fetches nothing" if "://" in path else "was not uploaded by a user") in demo.log.read_text()
    assert {file for file in demo.folder.rglob("*") if file.is_file()} == before


def test_other_names_and_large_requests_are_refused(demo: Demo) -> None:
    """Another name is that of a web site that lets it point to this machine. Two files are large together."""
    for path in ("", "config", "gradio_api/info"):
        with pytest.raises(HTTPError, match="HTTP Error 421"):
            urlopen(Request(f"{demo.url}/{path}", headers={"Host": "evil.example"}))
    part = 'Content-Disposition: form-data; name="files"; filename="two.wav"\r\nContent-Type: audio/wav'
    body = b"".join(f"--edge\r\n{part}\r\n\r\n".encode() + b"x" * 1_040_000 + b"\r\n" for _ in range(3))
    kind = "multipart/form-data; boundary=edge"
    assert post(f"{demo.url}/gradio_api/upload", body + b"--edge--\r\n", kind) == 413
    assert not any(demo.folder.rglob("two.wav"))


def test_only_the_page_is_served(demo: Demo) -> None:
    for path in ("docs", "redoc", "openapi.json", "gradio_api/file=/etc/passwd", f"gradio_api/file={ROOT}/README.md"):
        with pytest.raises(HTTPError, match=r"HTTP Error 40[34]"):
            urlopen(f"{demo.url}/{path}")
    with urlopen(f"{demo.url}/gradio_api/info") as response:
        assert json.load(response) == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_a_full_queue_is_reported(demo: Demo) -> None:
    statuses = [submit(demo, [None, QUESTION, "", "", True], "busy") for _ in range(12)]
    assert statuses[0] == 200 and 503 in statuses


def test_sigterm_exits_with_0_and_deletes_all_clips(page: Page, demo: Demo) -> None:
    """With an open page, which keeps a connection open, and clips in the folder."""
    assert upload(demo, b"x") == 200 and any(demo.folder.rglob("large.wav"))
    demo.driver.process.send_signal(signal.SIGTERM)
    assert demo.driver.process.wait(20) == 0
    lines = demo.log.read_text().splitlines()
    assert [line for line in lines if line.startswith("demo ")] == [f"demo at {demo.url}", "demo stopped"]
    assert lines[-1] == "demo stopped"
    assert list(demo.folder.iterdir()) == []
