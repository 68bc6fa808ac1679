"""The demo answers as ``infer`` does, with and without the adapter; requests that it refuses, and their messages."""

import threading
from collections.abc import Callable
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
from voxray.demo.answers import AnswerError, DemoAnswer, DemoModel, DemoRequest, open_model
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


def load_demo(**flags: Any) -> DemoModel:
    defaults = {"max_new_tokens": MAX_NEW_TOKENS} | ({} if "lora_dir" in flags else {"model_id": TINY})
    return open_model(DemoSettings.model_validate({**defaults, **flags}))[0]


@pytest.fixture(scope="module")
def answering(run: Path) -> DemoModel:
    return load_demo(lora_dir=str(run))


def inferred(**flags: Any) -> str:
    defaults = {"max_new_tokens": MAX_NEW_TOKENS} | ({} if "lora_dir" in flags else {"model_id": TINY})
    [row] = run_inference(InferSettings.model_validate({**defaults, **flags}), "")
    return row["prediction"]


def answers(answering: DemoModel, **request: Any) -> list[DemoAnswer]:
    return list(answering.answers(DemoRequest(**request)))


def refusal(answering: DemoModel, **request: Any) -> str:
    with pytest.raises(AnswerError) as error:
        answers(answering, **request)
    return str(error.value)


@pytest.mark.parametrize(
    ("request_values", "flags"),
    [
        ({"audio_path": SAMPLE}, {"audio_path": SAMPLE}),
        ({"audio_path": SAMPLE, "language": "Korean"}, {"audio_path": SAMPLE, "language": "ko"}),
        ({"audio_path": SAMPLE, "question": QUESTION}, {"audio_path": SAMPLE, "question": QUESTION}),
        ({"question": f" {QUESTION}\n"}, {"question": QUESTION}),
    ],
)
def test_base_and_tuned_answers_equal_infer(
    request_values: dict[str, str], flags: dict[str, str], answering: DemoModel, run: Path
) -> None:
    base, tuned = answers(answering, **request_values, compare=True)
    assert (base.is_base, tuned.is_base) == (True, False)
    assert base.text == inferred(**flags) and tuned.text == inferred(**flags, lora_dir=str(run))
    assert base.text != tuned.text, "otherwise the test could not tell them apart"
    assert [answer.text for answer in answers(answering, **request_values)] == [tuned.text], "the adapter is on again"


def test_concurrent_requests_do_not_interfere(answering: DemoModel) -> None:
    """Disabling the adapter for one request must not affect the others."""
    clips = [row["audio_path"] for row in read_rows(str(SPEECH / "asr.val.jsonl"))[:6]]
    expected = {clip: [answer.text for answer in answers(answering, audio_path=clip, compare=True)] for clip in clips}
    texts: dict[str, list[str]] = {}

    def ask(clip: str) -> None:
        texts[clip] = [answer.text for answer in answers(answering, audio_path=clip, compare=True)]

    threads = [threading.Thread(target=ask, args=(clip,)) for clip in clips]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == expected


def test_values_of_an_answer(answering: DemoModel) -> None:
    truth = "접수 번호 육 사 팔"
    [answer] = answers(answering, audio_path=SAMPLE, reference=truth, language="ko")
    assert answer.audio_sec == pytest.approx(soundfile.info(SAMPLE).duration, abs=1e-3)
    assert answer.sec > 0 and answer.rtfx == pytest.approx(answer.audio_sec / answer.sec)
    assert 0 < answer.num_tokens < MAX_NEW_TOKENS and not answer.hit_max and answer.num_chunks == 1
    assert answer.metrics["cer"] == pytest.approx(jiwer.cer(truth, answer.text))
    assert answer.metrics["wer"] == pytest.approx(jiwer.wer(truth, answer.text))
    short = load_demo(max_new_tokens=2)
    [cut] = answers(short, audio_path=SAMPLE)
    assert cut.hit_max and cut.num_tokens == 2 and cut.metrics == {}
    [text] = answers(short, question=QUESTION, reference="둘")
    assert text.audio_sec == 0 and set(text.metrics) == {"rouge_l", "exact_match"}


def test_long_recordings_are_answered_in_chunks(answering: DemoModel, run: Path, tmp_path: Path, monkeypatch) -> None:
    clips = [soundfile.read(row["audio_path"]) for row in read_rows(str(SPEECH / "asr.val.jsonl"))[:3]]
    long = str(tmp_path / "long.wav")
    soundfile.write(long, np.concatenate([samples for samples, _ in clips]), clips[0][1])
    monkeypatch.setattr(type(get_family(TINY).front_end(TINY)), "max_audio_sec", 4.0)
    [answer] = answers(answering, audio_path=long)
    assert answer.num_chunks > 1 and answer.audio_sec == pytest.approx(header_seconds(long), abs=0.01)
    assert answer.text == inferred(audio_path=long, lora_dir=str(run))
    message = refusal(answering, audio_path=long, question=QUESTION)
    assert message == "long.wav is too long: clips may last 600 s, and 4 s with a question."


def test_a_clip_without_length_in_its_header(answering: DemoModel, tmp_path: Path, monkeypatch) -> None:
    """Browsers write a recording while it is made, so its header has no length."""
    clip = tmp_path / "recorded.webm"
    with open(clip, "wb") as file, av.open(_NoSeek(file), "w", format="webm") as container:
        stream = container.add_stream("libopus", rate=48_000)
        for frame in av.open(SAMPLE).decode(audio=0):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="does not say how long it is"):
        header_seconds(str(clip))
    monkeypatch.setattr(answering, "max_audio_sec", 10.0)
    [answer] = answers(answering, audio_path=str(clip))
    assert answer.text and answer.audio_sec == pytest.approx(soundfile.info(SAMPLE).duration, abs=0.1)
    monkeypatch.setattr(type(get_family(TINY).front_end(TINY)), "max_audio_sec", 1.5)
    assert answers(answering, audio_path=str(clip))[0].num_chunks == 2
    monkeypatch.setattr(answering, "max_audio_sec", 1.0)
    assert refusal(answering, audio_path=str(clip)).startswith("recorded.webm is too long: clips may last 1 s")


class _NoSeek:
    """A file without ``seek``, like a network connection."""

    def __init__(self, file: Any) -> None:
        self.write = file.write


def test_refusals_are_one_line(answering: DemoModel, tmp_path: Path, monkeypatch) -> None:
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
    assert refusal(answering, audio_path=str(tmp_path / "empty.wav")) == "empty.wav has no samples."
    assert len(answers(answering, audio_path=str(tmp_path / "silence.wav"))) == 1, "silence is a valid clip"
    message = refusal(answering, audio_path=str(tmp_path / "hour.flac"))
    assert message == "hour.flac is too long: clips may last 600 s."
    assert refusal(answering, audio_path=str(tmp_path / "gone.wav")) == (
        "gone.wav was deleted meanwhile: choose it once more."
    )
    assert refusal(answering, audio_path=SAMPLE, language="Klingon").startswith("Language 'Klingon' is not known")
    assert refusal(answering) == "Record or upload a clip first, or write a question."
    monkeypatch.setattr(answering, "max_len", 20)
    assert refusal(answering, audio_path=SAMPLE).endswith("tokens, over --max_len 20.")


def test_tasks_that_a_family_does_not_answer_are_refused(answering: DemoModel, monkeypatch) -> None:
    monkeypatch.setattr(answering, "tasks", ("asr",))
    assert refusal(answering) == refusal(answering, question=QUESTION) == "Record or upload a clip first."
    assert "answers no questions" in refusal(answering, audio_path=SAMPLE, question=QUESTION)
    monkeypatch.setattr(answering, "tasks", ("sqa", "tqa"))
    assert refusal(answering, audio_path=SAMPLE) == "Write a question about the clip."


def test_after_a_failure_the_next_request_is_answered(answering: DemoModel, monkeypatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("too much")

    import torch

    with monkeypatch.context() as failing:
        failing.setattr(Voxtral, "prefill", fail)
        message = refusal(answering, audio_path=SAMPLE, compare=True)
    assert message == "The model failed: OutOfMemoryError: too much"
    assert len(answers(answering, audio_path=SAMPLE, compare=True)) == 2


def test_fully_tuned_weights_have_no_base(tmp_path: Path) -> None:
    import torch

    model = Voxtral().load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    save_adapter(train_fully(model, Voxtral(), ("projector",)), tmp_path / "full")
    answering = load_demo(lora_dir=str(tmp_path / "full"))
    assert not answering.has_base and answering.adapter_name == f"{tmp_path.name}/full"
    [answer] = answers(answering, audio_path=SAMPLE, compare=True)
    assert not answer.is_base and not load_demo().has_base


def test_stopping_aborts_an_answer(run: Path, monkeypatch) -> None:
    """Between two tokens, so that Ctrl-C does not wait for a long answer."""
    answering = load_demo(lora_dir=str(run), max_new_tokens=100_000)
    eos = answering._extractor.front_end.eos_id
    monkeypatch.setattr(answering._extractor.front_end, "eos_id", -eos - 1)  # so that the answer never ends
    messages: list[str] = []
    thread = threading.Thread(target=lambda: messages.append(refusal(answering, audio_path=SAMPLE)))
    thread.start()
    thread.join(1.0)
    assert thread.is_alive()
    answering.stop()
    thread.join(10)
    assert messages == ["The demo is being stopped."]


def test_flags_reach_the_model() -> None:
    flags = {"num_beams": 3, "seed": 5, "batch_size": 2, "bf16": True, "max_new_tokens": 7, "max_len": 99}
    answering = load_demo(**flags, max_audio_sec=12)
    config = answering.config
    assert (config.sampling.num_beams, config.sampling.seed, config.sampling.max_new_tokens) == (3, 5, 7)
    assert (config.batch_size, config.bf16, answering.max_len, answering.max_audio_sec) == (2, True, 99, 12)
    config = load_demo(temperature=0.5, top_p=0.9, quantize="8bit", tf32=True, trim_audio_tokens=True).config
    assert (config.sampling.temperature, config.sampling.top_p) == (0.5, 0.9)
    assert (config.quantize, config.tf32, config.trim_audio) == ("8bit", True, True)
    assert load_demo(fp16=True).config.fp16
