"""Messages of transformers and PEFT are in a file, and not on the terminal."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from helpers.running import environment

PROGRAM = f"""
from voxray.models.registry import get_family
get_family({TINY!r})
from transformers.utils import logging
logging.get_logger("transformers.generation.utils").warning("a message of the library")
import logging
logging.getLogger("peft.tuners").warning("a message of PEFT")
print("an answer of voxray")
"""


def run(home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    variables = {**environment(), "HOME": str(home), **variables}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("home", ["home", pytest.param("not-a-folder", marks=pytest.mark.slow)])
def test_messages_go_to_the_file(tmp_path: Path, home: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "not-a-folder").touch()
    process = run(tmp_path / home)
    assert (process.returncode, process.stdout, process.stderr) == (0, "an answer of voxray\n", "")
    if home == "home":
        log = (tmp_path / "home" / ".cache" / "voxray" / "libraries.log").read_text()
        assert "transformers.generation.utils WARNING a message of the library" in log
        assert "peft.tuners WARNING a message of PEFT" in log


@pytest.mark.slow
def test_users_may_ask_for_them(tmp_path: Path) -> None:
    process = run(tmp_path, TRANSFORMERS_VERBOSITY="warning")
    assert "a message of the library" in process.stderr
