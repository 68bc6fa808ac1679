"""The task table: detection of a row's task, prompts and task weights."""

import math

import pytest

from voxray.core.errors import BadRow
from voxray.core.manifest import check_values
from voxray.core.tasks import TASKS, detect_task, parse_task_weights
from voxray.features.shards import TASK_CODES

ASR = {"audio_path": "a.wav", "transcript": "안녕"}
SQA = {"audio_path": "a.wav", "question": "q", "answer": "a"}
TQA = {"instruction": "i", "output": "o"}
AAC = {"audio_path": "a.wav", "caption": "a dog barks"}
AST = {"audio_path": "a.wav", "translation": "hello", "target_language": "en"}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (ASR, "asr"),
        (SQA, "sqa"),
        (TQA, "tqa"),
        ({**TQA, "input": "more"}, "tqa"),
        ({**ASR, "id": 1, "speaker": "s", "duration": 2.0}, "asr"),
        ({**SQA, **ASR}, "asr"),
        ({**TQA, **SQA}, "sqa"),
        ({**TQA, **ASR, **SQA}, "asr"),
        ({**TQA, "audio_path": "a.wav"}, "tqa"),
        (AAC, "aac"),
        ({**AAC, "question": "What is heard?"}, "aac"),
        ({**AAC, **SQA}, "sqa"),
        ({**AAC, **ASR}, "asr"),
        (AST, "ast"),
        ({**AST, **ASR}, "ast"),
        ({**AST, **ASR, **SQA, **AAC}, "ast"),
        ({**ASR, "translation": "hello"}, "asr"),
        ({**ASR, "target_language": "en"}, "asr"),
        ({"transcript": None, "audio_path": None}, "asr"),  # the manifest checks the values
    ],
)
def test_a_row_is_of_the_first_task_whose_keys_it_has(row: dict, name: str):
    assert detect_task(row).name == name
    assert detect_task(dict(reversed(row.items()))).name == name


@pytest.mark.parametrize(
    "row", [{}, {"audio_path": "a"}, {"question": "q", "answer": "a"}, {"Transcript": "x", "Audio_path": "y"}]
)
def test_the_error_lists_the_keys_of_each_task(row: dict):
    with pytest.raises(ValueError, match="match no task") as error:
        detect_task(row)
    message = str(error.value)
    assert all(key in message for task in TASKS.values() for key in task.keys)
    assert all(key in message for key in row) and ("(none)" in message) == (not row)


def test_prompts():
    assert TASKS["asr"].prompt(ASR) == ""
    assert TASKS["sqa"].prompt(SQA) == "q"
    assert TASKS["tqa"].prompt(TQA) == "i"
    assert TASKS["tqa"].prompt({**TQA, "input": "x"}) == "i\nx"
    assert TASKS["tqa"].prompt({**TQA, "input": ""}) == TASKS["tqa"].prompt({**TQA, "input": None}) == "i"
    assert TASKS["ast"].prompt(AST) == "Translate the speech into English."
    assert TASKS["ast"].prompt({**AST, "target_language": "KOR"}) == "Translate the speech into Korean."
    assert [name for name, task in TASKS.items() if task.has_audio] == ["asr", "sqa", "aac", "ast", "chat"]


def test_a_caption_row_has_its_own_question_or_salmonns():
    assert TASKS["aac"].prompt(AAC) == TASKS["aac"].prompt({**AAC, "question": ""}) == "Please describe the audio."
    assert TASKS["aac"].prompt({**AAC, "question": "What is heard?"}) == "What is heard?"
    wrong = [({**AAC, "question": " "}, "question is empty"), ({**SQA, "question": ""}, "question is empty")]
    wrong += [({**AAC, "caption": None}, "caption is null"), ({**AAC, "question": 3}, "question is int, not text")]
    for row, message in wrong:
        with pytest.raises(BadRow, match=message):
            check_values(row)
    assert check_values(AAC) is check_values({**AAC, "question": None}) is TASKS["aac"]


def test_task_codes_on_disk_do_not_change():
    """Existing shards and checkpoints contain these numbers. New tasks are appended."""
    assert list(TASKS)[:5] == ["asr", "sqa", "tqa", "aac", "ast"]
    codes = {name: code for name, code in TASK_CODES.items() if code < 5}
    assert codes == {"asr": 0, "sqa": 1, "tqa": 2, "aac": 3, "ast": 4}


@pytest.mark.parametrize(
    ("value", "weights"),
    [
        ("1.0,1.5,1.2", {"asr": 1.0, "sqa": 1.5, "tqa": 1.2}),
        (" 1 , 2,3 ", {"asr": 1.0, "sqa": 2.0, "tqa": 3.0}),
        ([1, 2.5, "3"], {"asr": 1.0, "sqa": 2.5, "tqa": 3.0}),
        ((0, 0, 1), {"asr": 0.0, "sqa": 0.0, "tqa": 1.0}),
        ("asr=1,sqa=1.5", {"asr": 1.0, "sqa": 1.5}),
        ("asr=1,aac=0.5", {"asr": 1.0, "aac": 0.5}),
        ("tqa=1e-1", {"tqa": 0.1}),
        (["tqa=1", "asr=0"], {"tqa": 1.0, "asr": 0.0}),
        ({"sqa": 2}, {"sqa": 2.0}),
        ({"sqa": "2"}, {"sqa": 2.0}),
    ],
)
def test_task_weights(value, weights: dict[str, float]):
    assert parse_task_weights(value) == weights


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "needs 3 numbers"),
        ("1,2", "needs 3 numbers, for asr, sqa, tqa"),
        ("1,2,3,4", "needs 3 numbers"),
        ([], "needs 3 numbers"),
        (3, "needs 3 numbers"),
        (None, "needs 3 numbers"),
        ("1,2,x", "'x' is not a number"),
        ("1,,3", "'' is not a number"),
        ([1, 2, None], "None is not a number"),
        ([1, 2, [3]], "is not a number"),
        ("asr=1,2", "every weight as task=number, or none"),
        ("asr=1,asr=2", "'asr' is given twice"),
        ("asr=1,xyz=2", "unknown task 'xyz'; known: asr, sqa, tqa"),
        ({"xyz": 1}, "unknown task 'xyz'"),
        ("-1,1,1", "weight of asr must be 0 or more, not -1"),
        ("1,nan,1", "weight of sqa must be 0 or more"),
        ("1,1,inf", "weight of tqa must be 0 or more"),
        ([1, math.inf, 1], "weight of sqa must be 0 or more"),
        ("0,0,0", "at least one weight must be above 0"),
        ("asr=0", "at least one weight must be above 0"),
        ({}, "at least one weight must be above 0"),
    ],
)
def test_faulty_task_weights(value, message: str):
    with pytest.raises(ValueError, match=message):
        parse_task_weights(value)


NULLS = {"messages": None, "conversations": None, "audios": None, "translation": None, "target_language": None}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({**NULLS, "audio_path": "a", "transcript": "t"}, "asr"),
        ({**NULLS, "audio_path": None, "transcript": None, "instruction": "i", "output": "o"}, "tqa"),
        ({**NULLS, "audio_path": "a", "transcript": "t", "translation": "x", "target_language": "en"}, "ast"),
        ({**NULLS, "transcript": None, "conversations": [{"from": "human", "value": "x"}]}, "text_chat"),
        ({"audio_path": "a", "transcript": None}, "asr"),
        ({"audio_path": "a", "transcript": "t", "translation": "", "target_language": ""}, "asr"),
    ],
)
def test_keys_without_a_value_count_only_if_nothing_else_matches(row, name):
    """Exports of tables have every column in every row."""
    assert detect_task(row).name == name
