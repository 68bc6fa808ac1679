"""What the demo answers: the same as infer does, with the adapter and without; what it refuses, and how it says so."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import jiwer
import numpy as np
import pytest
import soundfile
from conftest import SPEECH, TINY, read_rows
from helpers.adapters import random_adapter

from voxray.audio.decode import header_seconds
from voxray.commands.infer import run_inference
from voxray.config.demo import DemoSettings
from voxray.config.evaluate import InferSettings
from voxray.demo.answers import DemoAnswer, DemoModel, DemoRequest, Unanswered, open_model
from voxray.models.adapters.lora import save_adapter, train_fully
from voxray.models.registry import get_family
from voxray.models.voxtral.family import Voxtral

SAMPLE = str(SPEECH / "sample.wav")
QUESTION = "숫자는 모두 몇 개입니까?"
MAX_NEW_TOKENS = 16

pytestmark = pytest.mark.usefixtures("one_thread")
Open = Callable[..., DemoModel]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an adapter."""
    folder = tmp_path_factory.mktemp("run")
    random_adapter(folder / "adapter")
    return folder


def opened(**flags: Any) -> DemoModel:
    usual = {"max_new_tokens": MAX_NEW_TOKENS} | ({} if "lora_dir" in flags else {"model_id": TINY})
    return open_model(DemoSettings.model_validate({**usual, **flags}))[0]


@pytest.fixture(scope="module")
def answering(run: Path) -> DemoModel:
    return opened(lora_dir=str(run))


def inferred(**flags: Any) -> str:
    usual = {"max_new_tokens": MAX_NEW_TOKENS} | ({} if "lora_dir" in flags else {"model_id": TINY})
    [row] = run_inference(InferSettings.model_validate({**usual, **flags}), "")
    return row["prediction"]


def told(answering: DemoModel, **asked: Any) -> list[DemoAnswer]:
    return list(answering.answers(DemoRequest(**asked)))


def refusal(answering: DemoModel, **asked: Any) -> str:
    with pytest.raises(Unanswered) as refused:
        told(answering, **asked)
    return str(refused.value)


@pytest.mark.parametrize(
    ("asked", "flags"),
    [
        ({"audio_path": SAMPLE}, {"audio_path": SAMPLE}),
        ({"audio_path": SAMPLE, "language": "Korean"}, {"audio_path": SAMPLE, "language": "ko"}),
        ({"audio_path": SAMPLE, "question": QUESTION}, {"audio_path": SAMPLE, "question": QUESTION}),
        ({"question": f" {QUESTION}\n"}, {"question": QUESTION}),
    ],
)
def test_both_sides_answer_as_infer_does(
    asked: dict[str, str], flags: dict[str, str], answering: DemoModel, run: Path
) -> None:
    base, tuned = told(answering, **asked, compare=True)
    assert (base.is_base, tuned.is_base) == (True, False)
    assert base.text == inferred(**flags) and tuned.text == inferred(**flags, lora_dir=str(run))
    assert base.text != tuned.text, "else it does not show which is which"
    assert [answer.text for answer in told(answering, **asked)] == [tuned.text], "the adapter is on again"


def test_requests_at_a_time_do_not_mix(answering: DemoModel) -> None:
    """The adapter is one switch for the whole model; each request must find it where it wants it."""
    clips = [row["audio_path"] for row in read_rows(str(SPEECH / "asr.val.jsonl"))[:6]]
    alone = {clip: [answer.text for answer in told(answering, audio_path=clip, compare=True)] for clip in clips}
    found: dict[str, list[str]] = {}

    def ask(clip: str) -> None:
        found[clip] = [answer.text for answer in told(answering, audio_path=clip, compare=True)]

    threads = [threading.Thread(target=ask, args=(clip,)) for clip in clips]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_figures_of_an_answer(answering: DemoModel) -> None:
    truth = "접수 번호 육 사 팔"
    [answer] = told(answering, audio_path=SAMPLE, reference=truth, language="ko")
    assert answer.audio_sec == pytest.approx(soundfile.info(SAMPLE).duration, abs=1e-3)
    assert answer.sec > 0 and answer.rtfx == pytest.approx(answer.audio_sec / answer.sec)
    assert 0 < answer.num_tokens < MAX_NEW_TOKENS and not answer.hit_max and answer.num_chunks == 1
    assert answer.metrics["cer"] == pytest.approx(jiwer.cer(truth, answer.text))
    assert answer.metrics["wer"] == pytest.approx(jiwer.wer(truth, answer.text))
    short = opened(max_new_tokens=2)
    [cut] = told(short, audio_path=SAMPLE)
    assert cut.hit_max and cut.num_tokens == 2 and cut.metrics == {}
    [text] = told(short, question=QUESTION, reference="둘")
    assert text.audio_sec == 0 and set(text.metrics) == {"rouge_l", "exact_match"}


def test_long_recordings_are_answered_in_chunks(answering: DemoModel, run: Path, tmp_path: Path, monkeypatch) -> None:
    clips = [soundfile.read(row["audio_path"]) for row in read_rows(str(SPEECH / "asr.val.jsonl"))[:3]]
    long = str(tmp_path / "long.wav")
    soundfile.write(long, np.concatenate([samples for samples, _ in clips]), clips[0][1])
    monkeypatch.setattr(type(get_family(TINY).front_end(TINY)), "max_audio_sec", 4.0)
    [answer] = told(answering, audio_path=long)
    assert answer.num_chunks > 1 and answer.audio_sec == pytest.approx(header_seconds(long), abs=0.01)
    assert answer.text == inferred(audio_path=long, lora_dir=str(run))
    said = refusal(answering, audio_path=long, question=QUESTION)
    assert said == "long.wav is too long: clips may last 600 s, and 4 s with a question."


def test_a_clip_that_does_not_say_how_long_it_is(answering: DemoModel, tmp_path: Path, monkeypatch) -> None:
    """What browsers record is written while it comes in, so its header knows no length."""
    clip = tmp_path / "recorded.webm"
    with open(clip, "wb") as file, av.open(_NoSeek(file), "w", format="webm") as written:
        stream = written.add_stream("libopus", rate=48_000)
        for frame in av.open(SAMPLE).decode(audio=0):
            written.mux(stream.encode(frame))
        written.mux(stream.encode(None))
    with pytest.raises(ValueError, match="does not say how long it is"):
        header_seconds(str(clip))
    monkeypatch.setattr(answering, "max_audio_sec", 10.0)
    [answer] = told(answering, audio_path=str(clip))
    assert answer.text and answer.audio_sec == pytest.approx(soundfile.info(SAMPLE).duration, abs=0.1)
    monkeypatch.setattr(type(get_family(TINY).front_end(TINY)), "max_audio_sec", 1.5)
    assert told(answering, audio_path=str(clip))[0].num_chunks == 2
    monkeypatch.setattr(answering, "max_audio_sec", 1.0)
    assert refusal(answering, audio_path=str(clip)).startswith("recorded.webm is too long: clips may last 1 s")


class _NoSeek:
    """A file as a network connection would be."""

    def __init__(self, file: Any) -> None:
        self.write = file.write


def test_what_cannot_be_used_is_said_in_one_line(answering: DemoModel, tmp_path: Path, monkeypatch) -> None:
    def file(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "silence.wav", np.zeros(16_000), 16_000)
    soundfile.write(tmp_path / "hour.flac", np.zeros(601 * 8_000), 8_000)
    notes = file("notes.wav", b"these are words\n" * 40)
    assert refusal(answering, audio_path=notes) == (
        "Cannot decode notes.wav: Format not recognised. Is it an audio file?"
    )
    playlist = file("list.m3u8", f"#EXTM3U\n#EXTINF:2,\n{SAMPLE}\n#EXT-X-ENDLIST\n".encode())
    assert refusal(answering, audio_path=playlist).startswith("Cannot decode list.m3u8: ")
    assert refusal(answering, audio_path=file("none.mp3", b"")).startswith("Cannot decode none.mp3: ")
    assert refusal(answering, audio_path=str(tmp_path / "empty.wav")) == "empty.wav holds no sample."
    assert len(told(answering, audio_path=str(tmp_path / "silence.wav"))) == 1, "silence is a clip like others"
    said = refusal(answering, audio_path=str(tmp_path / "hour.flac"))
    assert said == "hour.flac is too long: clips may last 600 s."
    assert refusal(answering, audio_path=str(tmp_path / "gone.wav")) == (
        "gone.wav was deleted meanwhile: choose it once more."
    )
    assert refusal(answering, audio_path=SAMPLE, language="Klingon") == ("Language 'Klingon' is not a two-letter code.")
    assert refusal(answering) == "Record or upload a clip first, or write a question."
    monkeypatch.setattr(answering, "max_len", 20)
    assert refusal(answering, audio_path=SAMPLE).endswith("tokens, over --max_len 20.")


def test_a_family_is_asked_what_it_answers(answering: DemoModel, monkeypatch) -> None:
    monkeypatch.setattr(answering, "tasks", ("asr",))
    assert refusal(answering) == refusal(answering, question=QUESTION) == "Record or upload a clip first."
    assert "answers no questions" in refusal(answering, audio_path=SAMPLE, question=QUESTION)
    monkeypatch.setattr(answering, "tasks", ("sqa", "tqa"))
    assert refusal(answering, audio_path=SAMPLE) == "Write a question about the clip."


def test_a_model_that_fails_says_why_and_answers_the_next(answering: DemoModel, monkeypatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("too much")

    import torch

    with monkeypatch.context() as failing:
        failing.setattr(Voxtral, "prefill", fail)
        said = refusal(answering, audio_path=SAMPLE, compare=True)
    assert said == "The model failed: OutOfMemoryError: too much"
    assert len(told(answering, audio_path=SAMPLE, compare=True)) == 2


def test_fully_tuned_weights_have_no_base(tmp_path: Path) -> None:
    import torch

    model = Voxtral().load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    save_adapter(train_fully(model, Voxtral(), ("projector",)), tmp_path / "full")
    answering = opened(lora_dir=str(tmp_path / "full"))
    assert not answering.has_base and answering.adapter_name == f"{tmp_path.name}/full"
    [answer] = told(answering, audio_path=SAMPLE, compare=True)
    assert not answer.is_base and not opened().has_base


def test_stopping_breaks_an_answer_off(run: Path, monkeypatch) -> None:
    """Between two tokens, so that Ctrl-C does not wait for a long answer."""
    answering = opened(lora_dir=str(run), max_new_tokens=100_000)
    eos = answering._extractor.front_end.eos_id
    monkeypatch.setattr(answering._extractor.front_end, "eos_id", -eos - 1)  # so that it never ends by itself
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(refusal(answering, audio_path=SAMPLE)))
    thread.start()
    thread.join(1.0)
    assert thread.is_alive()
    answering.stop()
    thread.join(10)
    assert said == ["The demo is being stopped."]


def test_flags_decide_how_answers_are_looked_for() -> None:
    flags = {"num_beams": 3, "seed": 5, "batch_size": 2, "bf16": True, "max_new_tokens": 7, "max_len": 99}
    answering = opened(**flags, max_audio_sec=12)
    how = answering.how
    assert (how.search.num_beams, how.search.seed, how.search.max_new_tokens) == (3, 5, 7)
    assert (how.batch_size, how.bf16, answering.max_len, answering.max_audio_sec) == (2, True, 99, 12)
    sampled = opened(temperature=0.5, top_p=0.9, quantize="8bit", tf32=True, trim_audio_tokens=True).how
    assert (sampled.search.temperature, sampled.search.top_p) == (0.5, 0.9)
    assert (sampled.quantize, sampled.tf32, sampled.trim_audio, replace(sampled, tf32=False).tf32) == (
        "8bit",
        True,
        True,
        False,
    )
    assert opened(fp16=True).how.fp16
