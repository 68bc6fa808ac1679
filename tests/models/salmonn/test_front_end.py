"""The front end against the reference's token ids and features, and its folder."""

import json
import pickle
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ASSETS

from voxray.core.chat import CLIP, Turn
from voxray.core.errors import BadRow, RunError, SettingsError
from voxray.core.manifest import Sample
from voxray.core.tasks import TASKS, parse_own_tasks, use_own_tasks
from voxray.corpora.importers.salmonn import OTHER_CAPTION_REQUEST
from voxray.models.parts.logmel_windows import padded_windows, window_lengths
from voxray.models.salmonn.folder import load_folder, write_folder
from voxray.models.salmonn.front_end import SalmonnFrontEnd
from voxray.models.salmonn.prompts import QUESTION, read_prompts

pytestmark = pytest.mark.usefixtures("one_thread")
OFFICIAL = json.loads((ASSETS / "salmonn-reference" / "prompts.json").read_text())
TEXTS = ("it was a quiet well conducted little stream", "Chapter one missus rachel lynde is surprised")
WINDOW = 480_000
QUESTIONS = {"asr": "", "audiocaption": TASKS["aac"].default_prompt, "QA": "What is it?"}


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory) -> str:
    """A folder that names the reference's parts."""
    path = tmp_path_factory.mktemp("salmonn")
    write_folder(path, **{name: file for name, file in files.items() if name != "pad_rows"}, alone=False)
    return str(path)


@pytest.fixture(scope="module")
def front_end(folder) -> SalmonnFrontEnd:
    return SalmonnFrontEnd(folder)


def sample(task: str, prompt: str = "") -> Sample:
    audio = "x.wav" if TASKS[task].has_audio else ""
    return Sample("id", TASKS[task], prompt, "", audio, "", "m.jsonl:1")


@pytest.mark.parametrize(("official", "task"), [("asr", "asr"), ("audiocaption", "aac"), ("QA", "sqa")])
def test_prompts_equal_the_references(front_end, expected, official, task):
    ids = front_end.prompt_ids(sample(task, QUESTIONS[official]), 80_000)
    audio = [front_end.audio_id] * 88
    assert ids == [expected["tok.bos"], *expected["tok.before"], *audio, *expected[f"tok.after_{official}"]]
    assert front_end.prompts.default(task, QUESTIONS[official]) == OFFICIAL[official][0]


def test_own_tasks_ask_their_own_question(front_end):
    chat = {"keys": ["audio_path", "s"], "prompt": "Sum up.", "answer": "s", "metrics": ["rouge_l"]}
    verbatim = {"keys": ["audio_path", "v"], "template": "transcription", "answer": "v", "metrics": ["wer"]}
    use_own_tasks(parse_own_tasks({"s": chat, "v": verbatim}))
    try:
        assert front_end.prompt_ids(sample("s", "Sum up."), 80_000) == front_end.prompt_ids(
            sample("sqa", "Sum up."), 80_000
        )
        assert front_end.prompt_ids(sample("v"), 80_000) == front_end.prompt_ids(sample("asr"), 80_000)
    finally:
        use_own_tasks({})


def test_a_translation_is_a_question(front_end):
    text = TASKS["ast"].prompt({"target_language": "zh"})
    assert text == "Translate the speech into Chinese."
    ids = front_end.prompt_ids(sample("ast", text), 80_000)
    assert ids == front_end.prompt_ids(sample("sqa", text), 80_000) != front_end.prompt_ids(sample("asr"), 80_000)


def test_tokenizing_in_one_piece_gives_other_tokens(front_end, expected):
    """The reason why the texts around the audio are tokenized separately."""
    whole = front_end.template.replace("{}", OFFICIAL["asr"][0]).replace("<SpeechHere>", "")
    assert front_end._encode(whole, False) != expected["tok.before"] + expected["tok.after_asr"]


def test_answers_equal_the_references(front_end, expected):
    for text, ids in zip(TEXTS, expected["tok.text"], strict=True):
        assert front_end.target_ids(text) == ids
        assert front_end.decode([*ids, front_end.audio_id, front_end.pad_id]) == text
    assert front_end.eos_id == expected["tok.eos"]
    assert (front_end.pad_id, front_end.audio_id) == (expected["tok.pad"], expected["tok.len"])


def test_each_window_of_a_long_recording_has_its_positions(front_end):
    for num_samples, windows in ((1, 1), (WINDOW, 1), (WINDOW + 1, 2), (5 * WINDOW, 5)):
        ids = front_end.prompt_ids(sample("asr"), num_samples)
        assert ids.count(front_end.audio_id) == 88 * windows
    assert front_end.max_audio_sec == 300.0
    assert window_lengths(WINDOW * 2 + 5, WINDOW) == [WINDOW, WINDOW, 5]


def test_show(front_end):
    ids = front_end.prompt_ids(sample("sqa", "What is it?"), 1)
    shown = front_end.show(ids + front_end.target_ids("a bell"))
    assert shown == "<s> USER: <Speech><SpeechHere>x88</Speech> What is it?\nASSISTANT: a bell</s>"


def test_marks_and_control_tokens_in_a_question_are_text(front_end):
    plain = front_end.prompt_ids(sample("sqa", "x"), 1)
    for question in ("<SpeechHere>", "{}", "</s>", "[PAD] <s>"):
        ids = front_end.prompt_ids(sample("sqa", question), 1)
        assert ids.count(front_end.audio_id) == 88
        assert not {front_end.eos_id, front_end.pad_id} & set(ids) and ids.count(plain[0]) == 1
        assert ids[:94] == plain[:94]
    assert front_end.target_ids("a</s>b").count(front_end.eos_id) == 1
    with pytest.raises(BadRow, match="surrogate"):
        front_end.target_ids("a\ud800")


def test_conversations_are_refused(front_end):
    turns = (Turn("user", (CLIP, "a")), Turn("assistant", ("b",)), Turn("user", ("c",)))
    with pytest.raises(BadRow, match="SALMONN answers one question per clip; this row's task is chat") as error:
        front_end.prompt_ids(replace(sample("chat"), turns=turns), 1)
    assert error.value.reason == "unsupported_task"


def test_a_question_without_audio_has_no_speech_marks(front_end):
    assert "Speech" not in front_end.show(front_end.prompt_ids(sample("tqa", "What is it?"), 0))


def test_a_rows_own_question_replaces_the_prompt(front_end):
    assert "How loud?" in front_end.show(front_end.prompt_ids(sample("aac", "How loud?"), 1))


def test_sampled_prompts(folder, tmp_path):
    """Deterministic by row, epoch and seed, and uniform over many rows."""
    path = tmp_path / "prompts.yaml"
    path.write_text(
        "asr: ['<Speech><SpeechHere></Speech> a', '<SpeechHere> b', no audio]\n"
        "audiocaption: <SpeechHere> c\n"
        "audiocaption_v2: [<SpeechHere> d]\n"
        "gender: [<SpeechHere> e]\n"
    )
    prompts = read_prompts(path)
    assert prompts.by_task["asr"] == ("<Speech><SpeechHere></Speech> a", "<SpeechHere> b")
    assert prompts.by_task["aac"] == ("<SpeechHere> c",) and prompts.choices("aac", "How loud?") == (QUESTION,)
    assert prompts.default("aac", OTHER_CAPTION_REQUEST) == "<SpeechHere> d"
    other = path.with_name("others.yaml")
    other.write_text("asr: ['<SpeechHere> b']")
    assert OTHER_CAPTION_REQUEST in read_prompts(other).default("aac", OTHER_CAPTION_REQUEST)
    assert len({prompts.fingerprint, read_prompts(path).fingerprint, read_prompts(other).fingerprint}) == 2
    assert prompts.left_out == ("asr: no audio", "task gender")
    sampled = [[prompts.sample("asr", "", f"row{n}", seed=1, epoch=e) for n in range(2_000)] for e in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert 900 < sum(prompt.endswith("a") for prompt in sampled[0]) < 1_100
    assert prompts.sample("asr", "", "row0", seed=1, epoch=0).endswith("b")  # the same on every machine
    front_end = SalmonnFrontEnd(folder, prompts=prompts)
    row = SimpleNamespace(id="row0", task="asr", prompt="", num_windows=2)
    shown = front_end.show(front_end.sampled_prompt_ids(row, seed=1, epoch=0))
    assert shown == "<s> USER: <SpeechHere>x176b\nASSISTANT:"
    assert front_end.fingerprint != SalmonnFrontEnd(folder).fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "needs {task: prompts}"), ("asr: 3", "asr: needs a prompt"), ("a: [b", "no YAML"), (None, "cannot read")],
)
def test_bad_prompt_files_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "prompts.yaml").write_text(text)
    with pytest.raises(RunError, match=re.escape(message)):
        read_prompts(tmp_path / "prompts.yaml")


def batched(front_end, waves: list[torch.Tensor], dtype: type = np.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored rows as ``collate`` makes them: windows of all clips, and the samples in each."""
    windows, lengths = [], []
    for wave in waves:
        features = front_end.features(wave.numpy())
        mel_KF = features.mel_KF.astype(dtype)
        windows.append(padded_windows(mel_KF, features.fill, features.num_windows, front_end))
        lengths += window_lengths(len(wave), front_end.window_samples)
    return torch.from_numpy(np.concatenate(windows)), torch.tensor(lengths)


@pytest.mark.parametrize("alone", [False, True])
@torch.no_grad()
def test_stored_features_and_samples_give_the_same_embeddings(model, front_end, clips, batch_of, alone):
    ids = torch.full((2, 88), model.config.audio_token_id)
    features, lengths = batched(front_end, [clips["w10"][1], clips["w3"][1]])
    mel, wave, padding = batch_of("w10", "w3")
    model.config.alone = alone
    stored = model.embed(ids, features, num_samples=lengths)
    from_samples = model.embed(ids, mel, wave, ~padding)
    rounded = batched(front_end, [clips["w10"][1], clips["w3"][1]], np.float16)
    halves = model.embed(ids, rounded[0], num_samples=rounded[1])
    model.config.alone = False
    torch.testing.assert_close(stored, from_samples, rtol=0, atol=2e-5)
    torch.testing.assert_close(halves, from_samples, rtol=0, atol=5e-2)


@torch.no_grad()
def test_windows_of_a_long_recording_are_clips(model, front_end, clips):
    """BEATs gets each window as a clip of its own. Log-mel is computed and clamped over the whole recording."""
    wave = torch.cat([clips["w10"][1]] * 4)[: WINDOW + 60_000]
    features, lengths = batched(front_end, [wave])
    assert lengths.tolist() == [WINDOW, 60_000]
    embeds = model.embed(torch.full((1, 176), model.config.audio_token_id), features, num_samples=lengths)
    parts = torch.nn.utils.rnn.pad_sequence([wave[:WINDOW], wave[WINDOW:]], batch_first=True)
    padding = torch.arange(WINDOW) >= lengths[:, None]
    from_samples = model.audio_embeds(features[:, :80], parts, padding)
    torch.testing.assert_close(embeds.view(2, 88, -1), from_samples, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_clip_under_a_second_is_padded_to_one(model, front_end, clips):
    """As in SALMONN's own data set."""
    short = clips["w3"][1][:5_000]
    padded = torch.nn.functional.pad(short, (0, 11_000))
    ids = torch.full((1, 88), model.config.audio_token_id)
    features, lengths = batched(front_end, [short])
    from_samples = model.audio_embeds(features[:, :80], padded[None])
    torch.testing.assert_close(model.embed(ids, features, num_samples=lengths), from_samples, rtol=0, atol=2e-5)


def test_front_end_survives_pickling(front_end):
    again = pickle.loads(pickle.dumps(front_end))
    assert again.prompt_ids(sample("asr"), 1) == front_end.prompt_ids(sample("asr"), 1)
    assert again.fingerprint == front_end.fingerprint


@torch.no_grad()
def test_a_folder_loads_the_parts_that_it_names(folder, files, model, rows_of):
    from voxray.models.salmonn.loading import set_pad_rows

    again = load_folder(folder)
    set_pad_rows(again, files["pad_rows"])
    batch = rows_of(["w3"], ["asr"], [0])
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.name_or_path == folder


def test_a_folders_settings_apply_to_its_model(files, tmp_path):
    """By default a clip's embeddings do not depend on its batch."""
    parts = {name: file for name, file in files.items() if name != "pad_rows"}
    write_folder(tmp_path, **parts, prompt_template="Q: {}\nA:")
    model, front_end = load_folder(str(tmp_path), lora=False), SalmonnFrontEnd(str(tmp_path))
    assert model.config.alone
    assert model.config.prompt_template == front_end.template == "Q: {}\nA:"
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


def test_a_folder_can_hold_everything(folder, files, tmp_path):
    from voxray.models.salmonn.loading import load_tokenizer

    load_folder(folder, lora=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "parts": None}))
    load_tokenizer(files["llm"]).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text((files["whisper"] / "preprocessor_config.json").read_text())
    assert load_folder(str(tmp_path)).config.positions_per_clip == 88
    whole, named = SalmonnFrontEnd(str(tmp_path)), SalmonnFrontEnd(folder)
    for task in ("asr", "sqa", "aac", "tqa"):
        assert whole.prompt_ids(sample(task, "x"), 1) == named.prompt_ids(sample(task, "x"), 1)


def test_unsupported_settings_are_refused(folder, files, tmp_path):
    with pytest.raises(SettingsError, match="trim_audio_tokens"):
        SalmonnFrontEnd(folder, trim_audio=True)
    parts = {name: file for name, file in files.items() if name != "pad_rows"}
    message = r"--end_sym '<\|end\|>': is \d+ tokens of this language model.* its own end of text is '</s>'"
    with pytest.raises(SettingsError, match=message):
        write_folder(tmp_path / "end", **parts, end_sym="<|end|>")
    assert not (tmp_path / "end").exists()
    write_folder(tmp_path / "end", **parts)
    config = json.loads((tmp_path / "end" / "config.json").read_text())
    (tmp_path / "end" / "config.json").write_text(json.dumps({**config, "end_sym": "<|end|>"}))
    with pytest.raises(SettingsError, match=message):
        SalmonnFrontEnd(str(tmp_path / "end"))
    with pytest.raises(RunError, match="model type 'whisper' is not salmonn"):
        SalmonnFrontEnd(str(files["whisper"]))
