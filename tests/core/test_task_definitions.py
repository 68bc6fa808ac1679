"""Files that define tasks: prompts, every mistake, and the built-in file."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from voxray.core import tasks
from voxray.core.errors import BadRow
from voxray.core.manifest import check_values
from voxray.core.task_definitions import HEADLINE_METRICS, MAX_TASKS, RESERVED, Task, read_definitions
from voxray.core.tasks import BUILT_IN, TASKS, detect_task, parse_own_tasks, use_own_tasks, with_own_tasks
from voxray.evaluation.score import score
from voxray.metrics.counts import COUNT_NAMES, as_columns, metric_ratio
from voxray.metrics.names import evaluation_metrics, is_transcript, is_translation, validation_metrics
from voxray.metrics.texts import score_texts

SUMMARY: dict[str, Any] = {
    "keys": ["audio_path", "summary"],
    "prompt": "Summarise the consultation in {language_name}. {note}",
    "answer": "summary",
    "metrics": ["rouge_l", "exact_match"],
}
VERBATIM: dict[str, Any] = {
    "keys": ["audio_path", "verbatim"],
    "template": "transcription",
    "answer": "verbatim",
    "metrics": ["wer", "cer"],
    "allow_empty_answer": True,
}
INTENT: dict[str, Any] = {
    "keys": ["utterance", "intent"],
    "prompt": '{utterance}\n\nAnswer with {"intent": ...}.\n{hint}',
    "answer": "intent",
    "metrics": ["exact_match", "char_f1"],
}


@pytest.fixture
def own() -> Any:
    """Three own tasks, until the test ends."""
    definitions = {"summary": SUMMARY, "verbatim": VERBATIM, "intent": INTENT}
    use_own_tasks(parse_own_tasks(definitions))
    yield definitions
    use_own_tasks({})


TEXTS = (None, "", " ", " a ", "x\ny", "\n", "{question}", "{input}", "a  {b} ")
PROMPT_KEYS = {"asr": (), "sqa": ("question",), "tqa": ("instruction", "input"), "aac": ("question",)}
PROMPT_KEYS |= {"chat": (), "text_chat": ()}
DEFAULTS = {"aac": "Please describe the audio."}
AST_KEYS = ("audio_path", "translation", "target_language")
AST_PROMPT = "Translate the speech into {target_language}."


def test_prompts_of_built_in_tasks_are_the_texts_joined_by_a_newline() -> None:
    for question, instruction, text in itertools.product(TEXTS, repeat=3):
        row = {"question": question, "instruction": instruction, "input": text}
        for name, keys in PROMPT_KEYS.items():
            expected = "\n".join(str(row[key]) for key in keys if row.get(key)) or DEFAULTS.get(name, "")
            assert BUILT_IN[name].prompt(row) == expected and BUILT_IN[name].prompt_keys == keys
    assert BUILT_IN["tqa"].prompt({"input": "i"}) == "i" and BUILT_IN["sqa"].prompt({}) == ""


def test_the_built_in_tasks_are_those_of_earlier_versions() -> None:
    speech = ("cer_nospace", "cer", "wer", "swer", "exact_match")
    texts, captions = ("rouge_l", "exact_match"), ("rouge_l", "exact_match", "cider_d")
    assert list(BUILT_IN.values()) == [
        Task("asr", ("audio_path", "transcript"), "transcription", "", "transcript", speech, True),
        Task("sqa", ("audio_path", "question", "answer"), "chat", "{question}", "answer", texts),
        Task("tqa", ("instruction", "output"), "chat", "{instruction}\n{input}", "output", texts),
        Task("aac", ("audio_path", "caption"), "chat", "{question}", "caption", captions, False, DEFAULTS["aac"]),
        Task("ast", AST_KEYS, "translation", AST_PROMPT, "translation", ("bleu", "chrf")),
        Task("chat", ("audio_path", "messages"), "conversation", "", "messages", texts),
        Task("text_chat", ("messages",), "conversation", "", "messages", texts),
    ]


@pytest.mark.parametrize(
    ("name", "row", "prompt"),
    [
        (
            "summary",
            {"language_name": "Korean", "note": "Brief."},
            "Summarise the consultation in Korean. Brief.",
        ),
        ("summary", {"language_name": "Korean", "note": ""}, "Summarise the consultation in Korean."),
        ("summary", {"note": "{summary}"}, "Summarise the consultation in. {summary}"),
        ("verbatim", {"note": "x"}, ""),
        ("intent", {"utterance": "hi", "hint": "h"}, 'hi\n\nAnswer with {"intent": ...}.\nh'),
        ("intent", {"utterance": " a\nb ", "hint": None}, ' a\nb \n\nAnswer with {"intent": ...}.'),
    ],
)
def test_prompts_of_own_tasks(own: Any, name: str, row: dict[str, Any], prompt: str) -> None:
    assert TASKS[name].prompt(row) == prompt


def test_own_tasks_come_last_in_the_table_and_first_in_detection(own: dict[str, Any]) -> None:
    assert list(tasks.TASK_CODES.items()) == [(name, code) for code, name in enumerate((*BUILT_IN, *own))]
    assert tasks.own_definitions() == own and list(tasks.own_definitions()) == list(own)
    row = {"audio_path": "a", "transcript": "t", "summary": "s"}
    assert detect_task(row).name == "summary"
    kinds = {name: TASKS[name].kind for name in own}
    assert kinds == {"summary": "sqa", "verbatim": "asr", "intent": "tqa"}
    assert with_own_tasks(("asr",)) == ("asr", "verbatim") and with_own_tasks(("tqa",)) == ("tqa", "intent")
    assert with_own_tasks(TASKS) == tuple(TASKS)
    assert [name for name in TASKS if is_transcript(name)] == ["asr", "verbatim"]
    use_own_tasks({})
    assert list(TASKS) == list(BUILT_IN) and detect_task(row).name == "asr"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"language": "ko", "target_language": "de"}, "From Korean into German: hi"),
        ({"language": "ko-KR", "target_language": "haitian creole"}, "From Korean into Haitian Creole: hi"),
        ({"language": "auto", "target_language": "zu"}, "From into Zulu: hi"),
        ({"target_language": "Chinese"}, "From into Chinese: hi"),
    ],
)
def test_prompts_show_languages_by_their_english_names(row: dict[str, Any], prompt: str) -> None:
    definition = {**INTENT, "prompt": "From {language} into {target_language}: {utterance}"}
    [task] = parse_own_tasks({"intent": definition}).values()
    assert task.prompt({"utterance": "hi", **row}) == prompt
    with pytest.raises(BadRow, match="target_language 'Klingon' is not known") as error:
        task.prompt({"utterance": "hi", **row, "target_language": "Klingon"})
    assert error.value.reason == "bad_language"


def test_definitions_of_built_in_tasks_give_the_same_tasks() -> None:
    definitions = {name: task.definition for name, task in BUILT_IN.items()}
    assert read_definitions(definitions, {}) == BUILT_IN


def test_values_of_rows(own: Any) -> None:
    assert check_values({"audio_path": "a", "summary": "s"}).name == "summary"
    wrong = [
        ({"utterance": " ", "intent": "i"}, "utterance is empty"),
        ({"utterance": "u", "intent": None}, "intent is null"),
        ({"audio_path": "a", "summary": "s", "note": 3}, "note is int, not text"),
    ]
    for row, message in wrong:
        with pytest.raises(BadRow, match=message):
            check_values(row)


def test_metrics_of_own_tasks_are_named_once(own: Any) -> None:
    assert validation_metrics(["intent"])[:4] == tuple(
        f"intent/{name}" for name in ("exact_match", "char_f1", "bleu", "chrf")
    )
    assert len(set(evaluation_metrics("intent"))) == len(evaluation_metrics("intent"))


def test_own_tasks_may_be_scored_as_translations() -> None:
    """BLEU on raw text, which ko-v1 would make equal; a task with another headline may have BLEU too."""
    row = {"id": "1", "task": "intent", "reference": "Book a Table, please.", "prediction": "book a table please"}
    for metrics, expected in ((["bleu", "rouge_l"], False), (["rouge_l", "bleu"], True)):
        use_own_tasks(parse_own_tasks({"intent": {**INTENT, "metrics": metrics}}))
        assert is_translation("intent") != expected
        scored = score([row], num_resamples=0)
        assert (scored["intent"]["bleu"]["value"] > 99) == expected and scored["intent"]["rouge_l"]["value"] > 0.5
        assert set(scored["normalizer"]) == ({"ko-v1"} if expected else {"none"})
    use_own_tasks({})


def test_every_headline_metric_is_computed_from_sums_over_rows() -> None:
    columns = as_columns([dict.fromkeys(COUNT_NAMES, 1)])
    for name in HEADLINE_METRICS:
        assert metric_ratio("sqa", name, columns) is not None or name in score_texts("sqa", [("a", "b")])[0], name


def test_names_beside_the_tasks_in_metrics_are_reserved() -> None:
    rows = [{"id": "1", "task": "asr", "reference": "a b", "prediction": "a b", "language": "en"}]
    assert set(score(rows, terms=("b",), num_resamples=0)) - set(TASKS) <= RESERVED


def without(definition: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in definition.items() if name not in names}


@pytest.mark.parametrize(
    ("definitions", "message"),
    [
        ({"Summary": SUMMARY}, "Summary: a task's name is lower-case letters"),
        ({3: SUMMARY}, "3: a task's name is lower-case letters"),
        ({"asr": SUMMARY}, "asr: is a built-in task"),
        ({"overall": SUMMARY}, "overall: is reserved"),
        ({"s": ["audio_path"]}, "s: needs keys, prompt, answer, metrics"),
        ({"s": {**SUMMARY, "anwser": "x"}}, "s: anwser: unknown key; known: keys, prompt, "),
        ({"s": without(SUMMARY, "keys")}, "s: keys: must be a list of names"),
        ({"s": {**SUMMARY, "keys": "audio_path"}}, "s: keys: must be a list of names"),
        ({"s": {**SUMMARY, "keys": ["summary", "summary"]}}, "s: keys: a name is there twice"),
        ({"s": {**SUMMARY, "answer": "note"}}, "s: answer: 'note' is not one of keys (audio_path, summary)"),
        ({"s": without(SUMMARY, "answer")}, "s: answer: None is not one of keys"),
        ({"s": {**SUMMARY, "metrics": ["rouge"]}}, "s: metrics: 'rouge' is not one of cer_nospace, cer, wer, swer, "),
        ({"s": {**SUMMARY, "metrics": []}}, "s: metrics: must be a list of names"),
        ({"s": {**SUMMARY, "metrics": ["cider_d", "rouge_l"]}}, "s: metrics: cider_d cannot come first; "),
        ({"s": {**SUMMARY, "metrics": ["wer", "cider_d"]}}, "s: metrics: cider_d is for captions, so wer cannot"),
        ({"s": {**SUMMARY, "metrics": ["bleu", "cider_d"]}}, "s: metrics: cider_d is for captions, so bleu cannot"),
        ({"s": {**SUMMARY, "metrics": ["wer", "chrf"]}}, "s: metrics: chrf is not for transcripts, so wer cannot"),
        ({"s": without(SUMMARY, "prompt")}, "s: prompt: is missing"),
        ({"s": {**SUMMARY, "prompt": ["x"]}}, "s: prompt: must be text, not ['x']"),
        ({"s": {**SUMMARY, "prompt": "Repeat {summary}"}}, "s: prompt: holds the answer, {summary}"),
        ({"s": {**SUMMARY, "template": "asr"}}, "s: template: must be transcription or conversation, or left out"),
        (
            {"s": {**SUMMARY, "template": "translation"}},
            "s: template: must be transcription or conversation, or left out",
        ),
        ({"s": {**SUMMARY, "template": ["chat"]}}, "s: template: must be transcription or conversation, or left out"),
        ({"s": {**SUMMARY, "template": "transcription"}}, "s: template: transcription is the model's own request"),
        ({"s": {**VERBATIM, "keys": ["verbatim"]}}, "s: keys: template transcription needs audio_path"),
        ({"s": {**SUMMARY, "allow_empty_answer": "no"}}, "s: allow_empty_answer: must be true or false, not 'no'"),
        ({"s": {**SUMMARY, "default_prompt": "x"}}, "s: default_prompt: is never used"),
        ({"a": SUMMARY, "b": {**SUMMARY, "keys": ["note", *SUMMARY["keys"]]}}, "b: keys: a, which comes first, takes"),
        ({f"t{number}": {**SUMMARY, "keys": [f"k{number}", "summary"]} for number in range(101)}, "101 tasks; 100 at"),
        ({"s": {**SUMMARY, "prompt": "\ud800"}}, "holds half of a surrogate pair"),
        ({"s": {**SUMMARY, "prompt": "x" * 40_000}}, "characters as JSON; 32,000 at most"),
    ],
)
def test_mistakes(definitions: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_own_tasks(definitions)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_task_with_a_mistake_has_its_line() -> None:
    with pytest.raises(ValueError) as error:
        parse_own_tasks({"a": {**SUMMARY, "metrics": ["x"]}, "b": VERBATIM, "c": without(INTENT, "answer")})
    assert [line.partition(":")[0] for line in str(error.value).split("\n")] == ["a", "c"]


def test_codes_fit_into_eight_bits() -> None:
    assert MAX_TASKS + len(BUILT_IN) <= 128


def test_the_package_has_the_file() -> None:
    settings = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"voxray.core" = ["tasks.yaml"]' in settings


def test_own_tasks_may_be_conversations() -> None:
    definition = {
        "keys": ["messages", "topic"],
        "template": "conversation",
        "answer": "messages",
        "metrics": ["char_f1"],
    }
    tasks_by_name = parse_own_tasks({"advice": definition})
    assert tasks_by_name["advice"].definition == definition and tasks_by_name["advice"].kind == "tqa"
    use_own_tasks(tasks_by_name)
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "topic": "t"}
    assert check_values(row).name == "advice"
    with pytest.raises(BadRow, match="topic is int, not text"):
        check_values({**row, "topic": 3})
    use_own_tasks({})
    assert check_values(row).name == "text_chat"
    for changes in ({"prompt": "x"}, {"answer": "topic"}):
        with pytest.raises(ValueError, match="template: conversation needs answer: messages, and no prompt"):
            parse_own_tasks({"advice": {**definition, **changes}})
