"""records.py: which commit of the code a number is of."""

import subprocess

import pytest

from support import records


@pytest.fixture
def repository(tmp_path, monkeypatch):
    who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    for words in (["init", "--quiet"], [*who, "commit", "--quiet", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    monkeypatch.setattr(records, "ROOT", tmp_path)
    head = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return head.stdout.strip()


@pytest.mark.parametrize("owner", ["own", "another's"])
def test_the_commit_is_named_of_another_owners_repository_too(repository, monkeypatch, owner):
    if owner == "another's":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert records.git_commit() == dict(commit=repository, dirty=False)


def test_outside_a_repository_there_is_none_and_other_failures_are_told(tmp_path, monkeypatch, repository):
    monkeypatch.setenv("PATH", "")
    assert records.git_commit()["commit"] is None and "git" in records.git_commit()["why"]
    monkeypatch.undo()
    (tmp_path / "deep").mkdir()
    monkeypatch.setattr(records, "ROOT", tmp_path / "deep")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert records.git_commit() is None
