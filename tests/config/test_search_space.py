"""The search space: YAML, validated by the training job's settings, with all errors reported at once."""

import math
import pickle
import random
from collections import Counter
from typing import Any

import pytest
from helpers.running import parse_only

from voxray.config.flags import flag_metadata
from voxray.config.recipes import recipes
from voxray.config.search_space import FIXED, Domain, format_choice, format_value, parse_space
from voxray.config.train import MultitaskSettings
from voxray.config.tune import derive_sweep, trial_values

FLAGS = ["--train_jsonl", "t", "--val_jsonl", "v", "--output_dir", "o"]


def space(text: str) -> dict[str, Domain]:
    return parse_space(text, MultitaskSettings)


def test_choices_and_ranges_of_any_flag() -> None:
    domains = space(
        '{lora_r: [4, "8"], learning-rate: {log: [1e-5, 1e-3]}, lora_dropout: {range: [0, 0.2]}, grad_accum: {range: '
        '[1, 4]}, task_weights: ["1,1,1", {asr: 2, tqa: 1}, null], grad_ckpt: [true, false], lora_alpha: 8, '
        "curriculum: ['tqa:1,tqa+asr:2'], lr_schedule: {choice: [linear, cosine]}}"
    )
    assert domains["lora_r"] == Domain("lora_r", "choice", (4, 8))
    assert domains["lr"] == Domain("lr", "log", (1e-5, 1e-3)), "an old spelling, and 1e-5, which YAML takes for a text"
    assert domains["grad_accum"] == Domain("grad_accum", "range", (1, 4), whole=True)
    assert domains["task_weights"].values == ({"asr": 1.0, "sqa": 1.0, "tqa": 1.0}, {"asr": 2.0, "tqa": 1.0}, None)
    assert domains["lora_alpha"].values == (8.0,) and domains["grad_ckpt"].values == (True, False)
    assert [domains[name].size for name in ("lora_r", "lr", "grad_accum")] == [2, math.inf, 4]
    assert format_value(domains["task_weights"].values[1]) == "asr=2,tqa=1"
    assert format_choice({"lr": 0.0001234567, "grad_ckpt": True, "task_weights": None}) == (
        "lr 0.000123457, grad_ckpt true, task_weights none"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "needs flags and their values"),
        ("{lora_x: [1]}", "lora_x: no flag of the training job"),
        ("{lr: [1e-3], learning_rate: [1]}", "learning_rate: given twice"),
        ("{lr: [0]}", "lr: 0: Input should be greater than 0"),
        ("{lr: [.inf]}", "lr: inf: "),
        ("{lr: []}", "lr: has no choices"),
        ("{lr: [1e-3, 0.001]}", "lr: 0.001 is given twice"),
        ("{lr: {log: [1e-3, 1e-5]}}", "lr: log: 0.001 is not below 1e-05"),
        ("{lora_dropout: {log: [0, 0.1]}}", "lora_dropout: log: 0.0 is not above 0"),
        ("{lora_dropout: {range: [0, 1]}}", "lora_dropout: 1: Input should be less than 1"),
        ("{lora_dropout: {range: [0, 0.1, 0.5]}}", "lora_dropout: range needs two numbers"),
        ("{lora_dropout: {range: 0.1}}", "lora_dropout: range needs two numbers"),
        ("{lora_dropout: {range: [0, 0.1], log: [1, 2]}}", "lora_dropout: write a list of choices"),
        ("{lr: {uniform: [1, 2]}}", "lr: write a list of choices, {range:"),
        ("{batching: {range: [1, 2]}}", "batching: range is for numbers; give a list of choices"),
        ("{batching: [packed, tight]}", "batching: 'tight': Input should be 'fixed', 'length' or 'packed'"),
        ("{grad_ckpt: {range: [0, 1]}}", "grad_ckpt: range is for numbers"),
        ("{lora_r: [true]}", "lora_r: True: is not true or false"),
        ("{lora_r: {range: [1, 2.5]}}", "lora_r: 2.5: Input should be a valid integer"),
        ("{task_weights: [{asr: 1, xxx: 2}]}", "unknown task 'xxx'"),
        ("{cuda_visible_devices: [0]}", "cuda_visible_devices: cannot be swept: "),
        ("{output_dir: [a]}", "output_dir: cannot be swept: every trial has a folder of its own"),
        ("{lr: ", "while parsing a flow"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        space(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_everything_wrong_is_named_at_once_and_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_only(
            "tune", [*FLAGS, "--space", "{lr: [0], batching: [x], nope: 1}", "--grace_steps", "0", "--seeds", "1"]
        )
    message = capsys.readouterr().err
    assert end.value.code == 2 and "tune: 5 bad setting(s)" in message
    for line in (
        "--space: lr: 0: ",
        "--space: batching: 'x': ",
        "--space: nope: no flag",
        "--grace_steps: ",
        "--seeds: ",
    ):
        assert f"error: {line}" in message, line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--space {lr:{log:[1e-5,1e-3]}}", "--space: lr has infinitely many values; give --num_trials, or choices"),
        ("--search grid --num_trials 3", "--search grid: runs every combination; leave out --num_trials"),
        ("--search random", "--search random: needs --num_trials"),
        ("--search optuna", "--search optuna: needs --num_trials"),
        ("--space {lr:[1e-3]} --lr 1", "--lr: given by itself and in --space"),
        ("--space {lora_r:[4]} --lora_r 4,8", "--lora_r: given by itself and in --space"),
        ("--space {seed:[1,2]} --top_k 2", "--top_k: trains choices again with other seeds"),
        ("--tuning full", "--tuning full: a sweep over LoRA ranks"),
        ("--metric asr/rouge_l", "--metric: must be one of asr/cer_nospace"),
        ("--recipe text --metric asr/cer", "--metric asr/cer: train_text validates tqa/rouge_l"),
        ("--recipe salmonn --model_id m --space {lr:[1e-6]}", "--min_lr 1e-05 is over --lr 1e-06"),
        ("--recipe salmonn --model_id m --space {beats_path:[a]}", "beats_path: cannot be swept: the base is put"),
    ],
)
def test_combinations_that_cannot_be(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    spaced = flags.replace(":", ": ").replace(",", ", ") if "{" in flags else flags
    argv = []
    for word in spaced.split(" --"):
        name, _, value = word.removeprefix("--").partition(" ")
        argv += [f"--{name}", value.replace(", ", ",") if name == "lora_r" else value]
    with pytest.raises(SystemExit) as end:
        parse_only("tune", [*FLAGS, *argv])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_checks_over_flags_see_a_choice_that_the_job_takes() -> None:
    """The first learning rate is below --min_lr: only that combination is refused, not the sweep."""
    line = ["--recipe", "salmonn", "--model_id", "m", "--space", "{lr: [1e-6, 1e-4]}"]
    settings = parse_only("tune", [*FLAGS, *line])
    assert settings.lr == 1e-4 and [domain.values for domain in settings.domains.values()] == [(1e-6, 1e-4)]
    line = ["--space", "{batching: [fixed, length]}", "--per_task_bsz", "asr=2"]
    assert parse_only("tune", [*FLAGS, *line]).batching == "length"


def test_ranks_and_shares_are_choices_as_ever() -> None:
    def swept(*flags: str) -> dict[str, Any]:
        return {name: domain.values for name, domain in parse_only("tune", [*FLAGS, *flags]).domains.items()}

    shares = {"asr": 1.0, "sqa": 1.0, "tqa": 1.0}
    assert swept() == {"task_weights": (shares,), "lora_r": (8, 16)}
    assert swept("--lora_r", "4") == {"task_weights": (shares,), "lora_r": (4,)}
    assert swept("--space", "{lr: [0.1, 1]}") == {"task_weights": (shares,), "lr": (0.1, 1.0)}, "no rank was asked for"
    assert swept("--space", "{lr: [1]}", "--lora_r", "4,8")["lora_r"] == (4, 8)
    assert swept("--space", "{task_weights: ['1,1,1'], lora_r: [2]}") == {"task_weights": (shares,), "lora_r": (2,)}
    values = trial_values(parse_only("tune", [*FLAGS, "--space", "{lr: [0.1, 1]}", "--grad_accum", "2"]), {"lr": 1})
    assert set(values) == {"train_jsonl", "val_jsonl", "output_dir", "grad_accum", "lr"}, "what was said, no defaults"


@pytest.mark.parametrize("recipe", recipes())
def test_every_flag_of_every_recipe_can_be_swept_or_says_why_not(recipe: str) -> None:
    trains = derive_sweep(recipes()[recipe]).trains
    for name, field in trains.model_fields.items():
        default = {"output_dir": "o", "train_jsonl": ["t"]}.get(name, field.default)
        if name in FIXED or flag_metadata(field).no_effect:
            with pytest.raises(ValueError, match="cannot be swept"):
                parse_space({name: [default]}, trains)
        else:
            assert parse_space({name: [default]}, trains)[name].size == 1


def test_draws_are_even_and_tidy() -> None:
    rng = random.Random(0)
    log, whole = Domain("lr", "log", (1e-5, 1e-1)), Domain("r", "log", (1, 64), whole=True)
    decades = Counter(math.floor(math.log10(log.sample(rng))) for _ in range(4000))
    assert set(decades) == {-5, -4, -3, -2} and all(900 < count < 1100 for count in decades.values())
    samples = Counter(whole.sample(rng) for _ in range(4000))
    assert set(samples) <= set(range(1, 65)) and {1, 64} <= set(samples) and samples[1] > 10 * samples[30]
    assert all(float(f"{value:.4g}") == value for value in (log.sample(rng) for _ in range(100)))
    low, high = 0.123456, 0.123457
    assert all(low <= Domain("x", "range", (low, high)).sample(rng) <= high for _ in range(100)), (
        "rounded within the ends"
    )


def test_tasks_in_the_recipe_table_are_those_of_the_stage() -> None:
    from voxray.config.train import AsrAdapterSettings, TextSettings
    from voxray.recipes.stages import asr_adapter_stage, text_stage

    usual = {"train_jsonl": ["t"], "output_dir": "o"}
    assert recipes()["text"].tasks == text_stage(TextSettings(**usual)).tasks
    assert recipes()["asr_adapter"].tasks == asr_adapter_stage(AsrAdapterSettings(**usual)).tasks


@pytest.mark.parametrize("name", recipes())
def test_settings_of_a_sweep_travel_to_other_processes(name: str) -> None:
    """They are looked up by the name of their class."""
    line = {"train_jsonl": ["t"], "output_dir": "o", "val_jsonl": ["v"], "model_id": "m"}
    settings = derive_sweep(recipes()[name]).model_validate(line)
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_several_numbers_for_a_flag_are_choices() -> None:
    settings = parse_only("tune", [*FLAGS, "--lr", "1e-3,3e-3", "--grad_accum", "1;2"])
    values = {name: domain.values for name, domain in settings.domains.items()}
    assert values.keys() == {"task_weights", "lr", "grad_accum"}
    assert (values["lr"], values["grad_accum"], settings.lr) == ((1e-3, 3e-3), (1, 2), 1e-3)
    assert "lr" not in parse_only("tune", [*FLAGS, "--lr", "1e-3"]).domains
    ranges = ["--space", "{lora_dropout: {range: [0, 0.1]}}", "--num_trials", "3"]
    settings = parse_only("tune", [*FLAGS, "--lr", "1e-3,3e-3", *ranges])
    assert settings.domains["lora_dropout"].kind == "range" and settings.domains["lr"].values == (1e-3, 3e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "1e-3,x"], "lr: "),
        (["--lr", "1e-3,2e-3", "--space", "{lr: [1e-4]}"], "--lr: given by itself and in --space"),
        (["--num_workers", "1,2"], "num_workers"),
    ],
)
def test_wrong_choices_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_only("tune", [*FLAGS, *flags])
    assert end.value.code == 2 and message in capsys.readouterr().err
