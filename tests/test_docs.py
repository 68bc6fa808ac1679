"""The documentation names files, classes and functions that exist, and the tree in docs/architecture.md is complete."""

import re
from pathlib import Path

import memory_table
import pytest

from voxray.cli import main as voxray
from voxray.config import other_names
from voxray.config.new import NewSettings
from voxray.config.parse import flag_names
from voxray.config.prepare import PrepareSettings
from voxray.config.recipes import recipes
from voxray.core.project_files import job_names
from voxray.corpora.importers import huggingface

ROOT = Path(__file__).parents[1]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in memory_table.MODELS if name != "whisper-small"]
SUBJECTS = tuple(
    f"docs/{name}.md" for name in ("data", "training", "salmonn", "evaluation", "cluster", "python", "trainer")
)
REFERENCE = tuple(f"docs/reference/{job}.md" for job in job_names())
LINKED = ("CHANGELOG.md", "benchmarks/README.md", "tests/assets/README.md", *REFERENCE)
PAGES = ("README.md", "README.ko.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/glossary.md", *SUBJECTS)
FILE = r"(?:[a-z0-9_]+/)+[a-z0-9_]+\.(?:py|md|yaml|toml)"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def find(path: str) -> Path | None:
    """The file that a page means: relative to the repository, or to voxray/."""
    return next((folder / path for folder in (ROOT, ROOT / "voxray") if (folder / path).is_file()), None)


def listed_files(tree: str) -> set[str]:
    """Python files of a tree that is drawn by indentation; a line may name several."""
    folders: list[tuple[int, str]] = []
    files = set()
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = [folder for folder in folders if folder[0] < indent]
        if match := re.match(r" *([a-z0-9_]+/)", line):
            folders.append((indent, match[1]))
        files |= {"".join(name for _, name in folders) + name for name in re.findall(r"[a-z0-9_]+\.py", line)}
    return files


def test_the_page_of_prepare_has_its_limits_and_the_readmes_its_command() -> None:
    text = read("docs/data.md")
    section = text.partition("## Prepare")[2].partition("\n## ")[0]
    limits = {name for name in PrepareSettings.model_fields if name.startswith(("min_", "max_"))}
    assert all(f"`--{name}" in section for name in limits)
    prepare, new = (kind.model_fields for kind in (PrepareSettings, NewSettings))
    shown = [f"{fields[name].default:g}" for fields in (prepare, new) for name in ("min_sec", "max_sec")]
    assert "clips under {} s or over {} s (new: {} and {} s)".format(*shown) in section
    columns = {name for names in huggingface.COLUMNS.values() for name in names}
    assert all(f"`{name}`" in section for name in columns)
    pages = ("README.md", "README.ko.md", "docs/data.md")
    assert len({line for page in pages for line in read(page).splitlines() if "prepare.py --input" in line}) == 1


def test_the_tree_lists_every_module() -> None:
    [tree] = re.findall(r"```\n(jobs/.*?)```", read("docs/architecture.md"), re.DOTALL)
    modules = [path for path in (ROOT / "voxray").rglob("*.py") if path.name != "__init__.py"]
    missing = {str(path.relative_to(ROOT)) for path in modules} - listed_files(tree)
    assert not missing, f"docs/architecture.md does not list {sorted(missing)}"
    names = {path.name for path in modules}
    gone = set(re.findall(r"^ {4,}([a-z0-9_]+\.py)", tree, re.MULTILINE)) - names
    assert not gone, f"docs/architecture.md lists {sorted(gone)}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)  # not the commands, whose files are the user's
    missing = [path for path in re.findall(rf"`({FILE})[`:]", text) if not find(path)]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page: str) -> None:
    """``path.py: name`` and, in tables, ```path.py`: `name``."""
    references = re.findall(rf"`({FILE}):? ?`?:? ?`?([A-Za-z_]+)(?:\.[a-z_]+)?`", read(page))
    missing = []
    for path, name in references:
        file = find(path)
        source = file.read_text(encoding="utf-8") if file else ""
        if not re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b", source, re.MULTILINE):
            missing.append(f"{path}: {name}")
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, *LINKED])
def test_links_lead_to_files_and_headings(page: str) -> None:
    """Links to other sites are not followed."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", read(page), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not re.match(r"https?://", link) and not (target.exists() and (not heading or heading in headings(target))):
            broken.append(link)
    assert not broken


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("job", job_names())
def test_the_reference_pages_are_those_of_the_settings(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        voxray(["reference", job])
    page = read(f"docs/reference/{job}.md")
    assert capsys.readouterr().out == page, "run python tools/write_reference.py"


@pytest.mark.parametrize("names", ["TRAINER", "PEFT", "GENERATION"])
def test_the_tables_of_other_names_are_those_of_the_messages(names: str) -> None:
    [table] = re.findall(rf"<!-- names: {names} -->\n(.*?)\n<!-- end -->", read("docs/trainer.md"), re.DOTALL)
    rows = other_names.table_rows(getattr(other_names, names))
    assert table.splitlines()[2:] == rows, "run python tools/write_reference.py"


def test_every_training_job_accepts_the_names_that_mean_the_same() -> None:
    [paragraph] = re.findall(r"These names mean the same.*?\n\n", read("docs/trainer.md"), re.DOTALL)
    names = set(re.findall(r"`([a-z]\w+)`", paragraph))
    assert len(names) > 20
    for recipe in recipes().values():
        assert not names - set(flag_names(recipe.settings_class)), recipe.name


@pytest.mark.parametrize("name", ["whisper-small", *OTHERS])
def test_the_memory_tables_are_those_of_preflight(name: str) -> None:
    row = memory_table.row(name)
    assert all(row in read(page) for page in ("README.md", "README.ko.md")), "run python tools/memory_table.py"
