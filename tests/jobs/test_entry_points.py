"""Job scripts are short and fast to start, and their parsers accept the recipes and the README's commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.running import JOBS, ROOT, commands, environment, load_job, parse_only, start

PAGES = ("README.md", "README.ko.md")
PAGES += tuple(f"docs/{name}.md" for name in ("data", "training", "salmonn", "evaluation", "cluster", "trainer"))
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
SAMPLE_PAGE = r"""
Run `python jobs/nothing.py` in the text counts for nothing, and neither does this:
    python jobs/nothing.py
```bash
make demo
python jobs/train_multitask.py --train_jsonl a.jsonl,b.jsonl --output_dir runs/a --task_weights 1.0,1.5,1.2 # a comment
.venv/bin/python jobs/evaluate.py \
    --val_jsonl "a file.jsonl" \
    --lora_dir runs/a > log.txt
python jobs/infer.py --audio_path x.wav --question "Which number; and why?" | tee out.txt
```
```console
ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env runtime_env.yaml -- python jobs/tune.py
cd voxray && python3.11 jobs/featurize.py --manifest a.jsonl && ls
```
"""


def job_of(config: Path) -> str:
    """The job of a recipe file, by its name: demo.yaml is train_multitask, others are demo_<job> or <job>_<variant>."""
    name = config.stem.removeprefix("demo").removeprefix("_") or "train_multitask"
    name = {"train": "train_multitask"}.get(name, f"train_{name}" if name.startswith("salmonn") else name)
    return max((job for job in JOBS if name == job or name.startswith(f"{job}_")), key=len)


@pytest.mark.parametrize("job", JOBS)
def test_script_is_thin(job: str) -> None:
    lines = (ROOT / "jobs" / f"{job}.py").read_text().splitlines()
    assert len(lines) <= 40
    assert not any(line.lstrip().startswith(("for ", "while ")) for line in lines), "a job holds no loop"


@pytest.mark.parametrize("job", JOBS)
def test_help_and_refusals_come_before_heavy_imports(job: str) -> None:
    program = (
        "import json, runpy, sys\n"
        "for arguments in (['--help'], ['--nonsense', '1', '--seeed=2', 'stray']):\n"
        "    sys.argv = [sys.argv[0], *arguments]\n"
        "    try:\n"
        "        runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        heavy = sorted({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules))\n"
        "        print('\\n' + json.dumps([end.code, heavy]))\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = {str(ROOT / 'jobs' / f'{job}.py')!r}\n{program}"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    helped, refused = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("[")]
    assert helped == [0, []] and refused == [2, []], process.stderr
    assert f"python jobs/{job}.py" in process.stdout and "output" in process.stdout
    for name in ("--nonsense", "--seeed", "stray"):
        assert name in process.stderr, "every fault is named at once"
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("command", ["jobs/train_text.py --help", "jobs/tune.py --help-all", "jobs/infer.py --schema"])
def test_a_pipe_that_closes_early_is_no_error(command: str) -> None:
    line = f"set -o pipefail; {sys.executable} {ROOT}/{command} | head -c 0"
    process = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment(), timeout=120)
    assert (process.returncode, process.stderr) == (0, "")


def test_help_shows_every_flag_with_its_text() -> None:
    shown = start("train_multitask", ["--help-all"]).stdout
    settings = parse_only("train_multitask", [])
    for name, field in type(settings).model_fields.items():
        assert f"--{name} " in shown
        assert field.description, f"{name} has no docstring"


@pytest.mark.parametrize(
    ("job", "argv", "named"),
    [
        (
            "train_multitask",
            "--train_jsonl a.jsonl --output_dir o --lora_r 0 --lr nan --epochs two --bf16=maybe --task_weights 1,2",
            ("--lora_r", "--lr", "--epochs", "--bf16", "--task_weights"),
        ),
        (
            "train_text",
            "--output_dir o --lora_r 0 --task_weights 1,1,1",
            ("--lora_r", "--task_weights", "--train_jsonl"),
        ),
        (
            "train_asr_adapter",
            "--train_jsonl a --output_dir o --grad_accum 0 --freeze_whisper",
            ("--grad_accum", "--freeze_whisper"),
        ),
        (
            "evaluate",
            "--val_jsonl a.jsonl --per_device_bsz 0 --mode other --num_models",
            ("--per_device_bsz", "--mode"),
        ),
        (
            "train_salmonn",
            "--train_jsonl a --output_dir o --stage 3 --lr_schedule step --dryrun=maybe --cfg-path",
            ("--stage", "--lr_schedule", "--dryrun", "--cfg-path"),
        ),
        ("featurize", "--rows_per_shard 0 --num_actors -1", ("--manifest", "--rows_per_shard", "--num_actors")),
        ("infer", "--temperature -1 --batch_size x --max_new_tokens 0", ("--temperature", "--batch_size", "--max_new")),
        ("demo", "--host here --port -1 --concurrency 0", ("--host", "--port", "--concurrency")),
        (
            "tune",
            "--train_jsonl a.jsonl --output_dir o --lora_r 4,0 --metric_mode best --grace_steps 0",
            ("--lora_r", "--metric_mode", "--grace_steps"),
        ),
        ("compare", "a b --seed -1 --num_resamples 1 --max_rows x", ("--seed", "--num_resamples", "--max_rows")),
        (
            "prefetch",
            "--language x --splits test --max_rows -1 --min_sec 3 --max_sec 2 --store wav",
            ("--dataset", "--language", "--splits", "--max_rows", "--store"),
        ),
        (
            "compile",
            "--windows 0 --backend onnx --optimization_level 9 --seed -1",
            ("--windows", "--backend", "--optimization_level", "--seed"),
        ),
        (
            "efficiency",
            "--batch_sizes two --clip_sec 0 --new_tokens 15 --repeats 0 --warmup -1 --task tqa --language klingon",
            ("--batch_sizes", "--clip_sec", "--new_tokens", "--repeats", "--warmup", "--task", "--language"),
        ),
        (
            "preflight",
            "--train_jsonl a.jsonl --price_per_hour -1 --memory_gib x --recipe none --lora_r 0",
            ("--output_dir", "--price_per_hour", "--memory_gib", "--recipe", "--lora_r"),
        ),
        (
            "quickstart",
            "--train_jsonl a.jsonl --output_dir o --num_workers 0 --eval_bsz 0 --lora_dropout 1",
            ("--num_workers", "--eval_bsz", "--lora_dropout"),
        ),
    ],
)
def test_bad_settings_are_all_named_at_once(
    job: str, argv: str, named: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        load_job(job).main(argv.split())
    stderr = capsys.readouterr().err
    assert end.value.code == 2
    for name in named:
        assert f"error: {name}" in stderr


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_recipe_parses(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = parse_only(job_of(config), ["--config", str(config)])
    assert settings.model_fields_set, config


def test_every_job_has_a_recipe() -> None:
    assert {job_of(config) for config in CONFIGS} == set(JOBS)


def test_commands_are_found_in_a_page() -> None:
    argvs = commands(SAMPLE_PAGE)
    assert [job for job, _ in argvs] == ["train_multitask", "evaluate", "infer", "tune", "featurize"]
    assert argvs[0][1][-2:] == ["--task_weights", "1.0,1.5,1.2"]
    assert argvs[1][1] == ["--val_jsonl", "a file.jsonl", "--lora_dir", "runs/a"]
    assert argvs[2][1] == ["--audio_path", "x.wav", "--question", "Which number; and why?"]
    assert argvs[3][1] == [] and argvs[4][1] == ["--manifest", "a.jsonl"]
    for job, argv in argvs:
        parse_only(job, argv)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_parses(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page_commands = commands((ROOT / page).read_text(encoding="utf-8"))
    assert page_commands, f"{page} has no command of a job"
    for job, argv in page_commands:
        assert job in JOBS, f"{page} runs jobs/{job}.py, which does not exist"
        assert parse_only(job, argv), (job, argv)


def test_both_readmes_have_the_same_commands() -> None:
    english, korean = (commands((ROOT / page).read_text(encoding="utf-8")) for page in ("README.md", "README.ko.md"))
    assert english == korean and len(english) >= 5
