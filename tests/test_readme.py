"""What the README says exists, and its script runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from farss.cli import app
from farss.configfile import _Loader, from_dict

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    commands = set(get_command(app).commands)
    for block in re.findall(r"```bash\n(.*?)```|`(farss [^`]*)`", page.read_text(encoding="utf-8"), re.DOTALL):
        for word in re.findall(r"(?m)^farss (\w+)", "\n".join(block)):
            assert word in commands


def test_make_targets_exist():
    targets = set(re.findall(r"(?m)^([\w ]+):", (ROOT / "Makefile").read_text()))
    named = set(re.findall(r"make (\w+)", (ROOT / "README.md").read_text()))
    assert named <= {word for target in targets for word in target.split()}


def test_the_configurations_that_ship_are_valid(monkeypatch):
    from farss.configfile import load

    for path in (ROOT / "configs").glob("*.yaml"):
        config = load(path)
        assert config.data.train or config.prune.text  # what it learns from


def test_the_run_file_that_the_readme_shows_is_valid():
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    config = from_dict(yaml.load(block, _Loader))
    assert config.evaluate.knowledge[0].answers == "answers"
    assert config.train.learning_rate == 2e-5


def test_own_trainer_example_runs(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / "own_trainer.py", tmp_path, "2"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "largest logit difference" in result.stdout
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
