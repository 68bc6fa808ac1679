"""Rules that hold over the whole code: nothing executes what it reads (contract 13), Ray at the edges, sizes."""

import ast
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
CODE = sorted([*REPOSITORY.glob("voxray/**/*.py"), *REPOSITORY.glob("jobs/*.py"), *REPOSITORY.glob("tools/*.py")])
RAY_FILES = {
    "commands/submit.py",
    "sweep/ray_tune.py",
}
RAY_FOLDERS = {"cluster", "launch"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "marshal.loads",
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(kind: Any) -> Iterator[tuple[Path, Any]]:
    """Each syntax node of a kind in the product's files, with its file."""
    return ((path, node) for path in CODE for node in ast.walk(tree(path)) if isinstance(node, kind))


def test_nothing_executes_what_it_reads():
    for path, node in nodes(ast.Call):
        name, values = ast.unparse(node.func), {keyword.arg or "**": keyword.value for keyword in node.keywords}
        texts = {name: ast.unparse(value) for name, value in values.items()}
        assert name not in UNSAFE_CALLS, f"{path}:{node.lineno}: {name}"
        assert name != "torch.load" or texts.get("weights_only") == "True", f"{path}:{node.lineno}"
        assert texts.get("trust_remote_code", "False") == "False", f"{path}:{node.lineno}"
        assert texts.get("shell", "False") == "False", f"{path}:{node.lineno}"


def test_files_stay_short():
    assert not [path for path in CODE if path.read_text(encoding="utf-8").count("\n") > 400]


def test_ray_stays_at_the_edges():
    for path, node in nodes(ast.Import | ast.ImportFrom):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        if any(name.partition(".")[0] == "ray" for name in names):
            inside = path.relative_to(REPOSITORY / "voxray")
            assert inside.parts[0] in RAY_FOLDERS or str(inside) in RAY_FILES, f"{path}:{node.lineno}: imports Ray"


MEANINGLESS = {"found", "told", "said", "asked", "kept", "given", "made", "heard"}


def test_names_say_what_a_thing_is():
    """No variable is named by what happened to it, and no public function "<something>_of"."""
    for path, node in nodes(ast.Name | ast.arg | ast.FunctionDef):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assert node.id not in MEANINGLESS, f"{path}:{node.lineno}: {node.id}: name what it is"
        if isinstance(node, ast.arg):
            assert node.arg not in MEANINGLESS, f"{path}:{node.lineno}: {node.arg}: name what it is"
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert not node.name.endswith("_of"), f"{path}:{node.lineno}: {node.name}: name what it returns"


def test_a_type_name_means_one_thing():
    places: dict[str, list[str]] = {}
    for path in REPOSITORY.glob("voxray/**/*.py"):
        for node in tree(path).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.ClassDef):
                names = [node.name]
            for name in names:
                if name[0].isupper() and not name.isupper():
                    places.setdefault(name, []).append(str(path.relative_to(REPOSITORY)))
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_folders_are_layers_without_circles():
    """The contracts of pyproject.toml: no folder imports one above it, no files import each other in a circle."""
    result = subprocess.run([sys.executable, "-m", "importlinter.cli"], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_module_is_tracked():
    """A pattern in .gitignore that matches a folder of voxray/ would drop it from every clone."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "voxray/**/*.py", "tests/**/*.py"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not result.stdout, f"git ignores {result.stdout}"


def test_without_ray_the_library_still_imports(tmp_path):
    """A GPU box without Ray runs recipe and loop; importing them must not need it."""
    (tmp_path / "ray.py").write_text("raise ImportError('no Ray here')")
    code = "import voxray.commands.train, voxray.recipes.run_stage, voxray.commands.infer, voxray.features.featurize"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_bomb_in_a_checkpoint_does_not_go_off(tmp_path):
    from voxray.core.errors import RunError
    from voxray.training.checkpoint import read_optimizer_state

    mark = tmp_path / "exploded"
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(Bomb(mark)))
    pickle.loads(pickle.dumps(Bomb(tmp_path / "proof")))
    assert (tmp_path / "proof").exists(), "the bomb works where pickles are trusted"
    with pytest.raises(RunError, match="damaged checkpoint"):
        read_optimizer_state(tmp_path)
    assert not mark.exists()


def test_a_model_folder_cannot_bring_code(tmp_path):
    """A config that names its own Python files is of no known family; its code is not imported."""
    import json

    from voxray.core.errors import SettingsError
    from voxray.models.registry import get_family

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(SettingsError, match="model type 'evil' is not supported: supported are voxtral"):
        get_family(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_settings_and_provenance_hold_no_environment(tmp_path, monkeypatch):
    """Tokens in the environment do not reach what a run writes."""
    import json

    from voxray.runs.run_folder import provenance

    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    assert "hf_secret_value" not in json.dumps(provenance())
