"""jobs/submit.py with a fake of Ray's client; test_submit.py uses a real head."""

import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.running import ROOT, load_job

from voxray.commands import submit
from voxray.config.submit import SubmitSettings


@dataclass
class Details:
    status: str
    driver_exit_code: int | None


class Client:
    """A cluster on which a job prints three lines and ends with ``ends``; its log stream fails once in between."""

    def __init__(self, *ends: Details | Exception) -> None:
        self.ends, self.submitted, self.stops, self.breaks = list(ends), {}, 0, 1

    def submit_job(self, **submitted: Any) -> None:
        self.submitted = submitted

    def get_job_info(self, name: str) -> Details:
        end = self.ends[0] if len(self.ends) == 1 else self.ends.pop(0)
        if isinstance(end, BaseException):
            raise end
        return end

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        yield "one\ntwo\n"
        if self.breaks:
            self.breaks -= 1
            raise RuntimeError("connection lost")
        yield "three\n"

    def get_job_logs(self, name: str) -> str:
        return "one\ntwo\nthree\n"

    def stop_job(self, name: str) -> None:
        self.stops += 1


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the job with such a client; returns the client, the exit status and the output."""
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)

    def run(*ends: Details | BaseException, argv: str = "-- train_text --train_jsonl a") -> tuple[Client, Any, str]:
        client = Client(*ends)
        monkeypatch.setattr(submit, "_client", lambda settings: client)
        monkeypatch.setattr(submit, "_confirmed_address", lambda job: submit.LOCAL_ADDRESS)
        monkeypatch.setattr(submit, "check_flags", lambda job, flags: None)  # tests/config/test_parse.py has a test
        status: Any = 0
        try:
            load_job("submit").main(argv.split())
        except SystemExit as ended:
            status = ended.code
        out, err = capsys.readouterr()
        return client, status, out + err

    return run


def test_it_exits_as_the_job_did(end: Any) -> None:
    """Ray's own command always exits with 1."""
    for details, status in (
        (Details("SUCCEEDED", 0), 0),
        (Details("FAILED", 3), 3),
        (Details("FAILED", None), 1),
        (Details("STOPPED", None), 130),
    ):
        client, exit_status, output = end(Details("RUNNING", None), details)
        assert exit_status == status and client.stops == 0
        assert output.count("one\ntwo\n") == 1 and output.count("three") == 1, "a break repeats and loses nothing"


def test_a_job_is_handed_in_under_an_id_of_its_own(end: Any) -> None:
    first, _, output = end(Details("SUCCEEDED", 0), argv="--name mine -- train_text --train_jsonl 'a b.jsonl'")
    second, _, _ = end(Details("SUCCEEDED", 0), argv="--name mine -- train_text")
    assert first.submitted["submission_id"] != second.submitted["submission_id"]
    assert first.submitted["submission_id"].startswith("mine-") and first.submitted["submission_id"] in output
    assert first.submitted["entrypoint"].startswith("python jobs/train_text.py --train_jsonl ")
    assert second.submitted["entrypoint"] == "python jobs/train_text.py"
    env = first.submitted["runtime_env"]
    assert "/.git" in env["excludes"] and env["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert Path(env["working_dir"], "jobs", "submit.py").is_file()
    client, status, output = end(RuntimeError("never asked"), argv="--no_wait -- train_text")
    assert client.submitted and status == 0 and "one" not in output
    client, _, _ = end(Details("SUCCEEDED", 0), argv="")
    assert client.submitted["entrypoint"] == "python jobs/quickstart.py"


def test_words_of_a_job_stay_what_they_are(end: Any) -> None:
    """The cluster starts the job through a shell, so arguments must be quoted."""
    client = Client(Details("SUCCEEDED", 0))
    submit._client, before = (lambda settings: client), submit._client
    try:
        load_job("submit").main(
            ["--address", submit.LOCAL_ADDRESS, "--", "infer", "--question", "where; rm -rf $HOME?"]
        )
    finally:
        submit._client = before
    assert client.submitted["entrypoint"] == "python jobs/infer.py --question 'where; rm -rf $HOME?'"


def test_the_settings_file_is_sent_with_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file outside the uploaded folder, with a name relative to where the user is."""
    monkeypatch.chdir(tmp_path)
    text = "train_jsonl: a b.jsonl # $HOME 'quoted'\noutput_dir: /runs/x\n"
    (tmp_path / "my settings.yaml").write_text(text)
    client = Client(Details("SUCCEEDED", 0))
    monkeypatch.setattr(submit, "_client", lambda settings: client)
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    words = [
        "--address",
        "https://ray.example/team",
        "--",
        "train_text",
        "--config",
        "my settings.yaml",
        "--lr",
        "1e-3",
    ]
    load_job("submit").main(words)
    subprocess.run(client.submitted["entrypoint"].replace("exec python", "echo"), shell=True, check=True)
    assert (tmp_path / "submitted.yaml").read_text() == text + "\n", "the shell leaves it as it is"
    assert "jobs/train_text.py --config submitted.yaml --lr 1e-3" in capfd.readouterr().out
    (tmp_path / "my settings.yaml").write_text("train_jsonl: a\noutput_dir: b\nbogus: 1\n")
    for argv in (words, ["--check_flags", *words[2:]]):
        with pytest.raises(SystemExit, match="2"):
            load_job("submit").main(argv)
        assert "bogus" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        load_job("submit").main([*words[:4], "--train_jsonl", "/a", "--output_dir", "runs/x"])
    assert "--output_dir runs/x: a submitted job runs in a temporary copy" in capfd.readouterr().err
    recipe = str(ROOT / "jobs" / "configs" / "train_text.yaml")
    load_job("submit").main([*words[:4], f"--config={recipe}", "--storage_path=/mnt"])
    command = "python jobs/train_text.py --config=jobs/configs/train_text.yaml --storage_path=/mnt"
    assert client.submitted["entrypoint"] == command


def test_resources_of_the_jobs_own_process(end: Any) -> None:
    client, _, _ = end(Details("SUCCEEDED", 0), argv="--entrypoint_num_gpus 1 -- export --lora_dir /r")
    assert client.submitted["entrypoint_num_gpus"] == 1 and "entrypoint_num_cpus" not in client.submitted


def test_ctrl_c_stops_the_job_and_waits_for_it(end: Any) -> None:
    client, status, output = end(KeyboardInterrupt(), Details("RUNNING", None), Details("STOPPED", None))
    assert (client.stops, status) == (1, 130) and "stopping the job, which saves itself first" in output
    client, status, output = end(KeyboardInterrupt(), KeyboardInterrupt(), Details("RUNNING", None))
    assert (client.stops, status) == (1, 1) and "goes on by itself; `ray job logs train_text-" in output


def test_a_cluster_that_is_lost_is_one_line(end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, status, _ = end(Details("RUNNING", None), OSError("reset"), OSError("reset"), Details("SUCCEEDED", 0))
    assert status == 0, "it came back"
    monkeypatch.setattr(submit, "LOST_SEC", -1.0)
    _, status, output = end(OSError("reset"))
    assert status == 1 and "the cluster does not answer any more: reset" in output


def test_jobs_that_do_not_exist(end: Any) -> None:
    for argv in ("-- train_everything", "-- submit", "-- ../x"):
        _, status, output = end(Details("SUCCEEDED", 0), argv=argv)
        assert status == 2 and "not one of the jobs audit, " in output


def test_how_the_cluster_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Uses the token if this machine has one; an address where nothing listens is a one-line error."""
    requests: list[str] = []

    class Refusing:
        def __init__(self, address: str) -> None:
            requests.append(f"{address} {os.environ['RAY_AUTH_MODE']}")
            raise ConnectionError("nobody there")

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Refusing)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def refusal(**flags: str) -> str:
        monkeypatch.setenv("RAY_AUTH_MODE", "x")
        monkeypatch.delenv("RAY_AUTH_MODE")
        with pytest.raises(submit.RunError) as refused:
            submit._client(SubmitSettings.model_validate({"address": submit.LOCAL_ADDRESS, **flags}))
        return str(refused.value)

    assert refusal() == "--address http://127.0.0.1:8265: no cluster answers there: nobody there"
    assert "has none" in refusal(auth="token")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    assert "has none" in refusal(auth="token")
    (tmp_path / "elsewhere").write_text("t")
    refusal()
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    assert requests.pop() == f"{submit.LOCAL_ADDRESS} token"
    for flags in ({"address": "http://10.0.0.1:1"}, {"auth": "token"}, {"auth": "disabled"}):
        refusal(**flags)
    default = submit.LOCAL_ADDRESS
    assert requests == [f"{default} disabled", "http://10.0.0.1:1 token", f"{default} token", f"{default} disabled"]
    with pytest.raises(ValueError, match="address"):
        SubmitSettings.model_validate({"address": "http://user:secret@host"})


def test_without_an_address_it_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A Ray that runs on this machine may be somebody else's."""
    questions: list[str] = []
    answers = iter(["y", "", "no"])
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or next(answers))
    monkeypatch.setattr(submit.sys.stdin, "isatty", lambda: True)
    assert submit._confirmed_address("train_text") == submit.LOCAL_ADDRESS
    for _ in range(2):
        with pytest.raises(submit.SettingsError, match="--address: name the cluster"):
            submit._confirmed_address("train_text")
    assert questions == [f"submit train_text to {submit.LOCAL_ADDRESS}? [y/N] "] * 3
    monkeypatch.setattr(submit.sys.stdin, "isatty", lambda: False)
    with pytest.raises(submit.SettingsError, match="--address: name the cluster"):
        submit._confirmed_address("train_text")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.1.1.1:8265")
    assert submit._confirmed_address("train_text") == "http://10.1.1.1:8265"
    assert "submitting train_text to http://10.1.1.1:8265" in capsys.readouterr().out
