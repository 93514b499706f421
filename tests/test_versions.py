"""What a result is said to be made with."""

import subprocess
from importlib.metadata import version

from farss import versions


def test_the_commit_is_that_of_the_sources(tmp_path, monkeypatch):
    package = tmp_path / "farss"
    package.mkdir()
    monkeypatch.setattr(versions, "__file__", str(package / "versions.py"))
    assert versions.versions()["farss"] == version("farss")  # in nobody's repository
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert versions.versions()["farss"] == f"{version('farss')} ({commit})"
    inner = tmp_path / ".venv" / "farss"
    inner.mkdir(parents=True)
    monkeypatch.setattr(versions, "__file__", str(inner / "versions.py"))
    assert versions.versions()["farss"] == version("farss")  # installed inside somebody else's


def test_a_machine_without_git_is_no_problem(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert versions.versions()["farss"] == version("farss")
