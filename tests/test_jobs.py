"""Several pieces of work at a time: all done, in processes of their own, and none left behind."""

import os
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch

from farss.errors import FarssError, NumericalError
from farss.jobs import do_all

HERE = Path(__file__).parent


def write(item, tell):
    """Work of the tests: write who did it, with how many threads."""
    folder, name = item
    warnings.warn("nobody can do anything about it", stacklevel=1)
    tell(name, 1, 2, "half")
    (folder / name).write_text(f"{os.getpid()} {torch.get_num_threads()} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    tell(name, 2, 2, "")


def fail(item, tell):
    raise FarssError(f"{item} cannot be done")


def fail_first(item, tell):
    """Work of which the first item cannot be done."""
    folder, place = item
    time.sleep(0.2)
    if place == 0:
        raise NumericalError("the first cannot be done")
    (folder / str(place)).touch()


def die_first(item, tell):
    """The same, but that its process is killed."""
    folder, place = item
    if place == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / str(place)).touch()
    time.sleep(1)


def die(item, tell):
    os.kill(os.getpid(), signal.SIGKILL)


def linger(item, tell):
    """Work that says where it is and takes long."""
    (Path(item) / str(os.getpid())).touch()
    time.sleep(60)


def test_every_item_has_a_process_of_its_own(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    told = []
    names = ["one", "two", "three"]
    do_all(write, [(tmp_path, name) for name in names], 2, lambda *message: told.append(message))
    found = [(tmp_path / name).read_text().split() for name in names]
    assert len({pid for pid, *_ in found} | {str(os.getpid())}) == 4
    assert {threads for _, threads, _ in found} == {"2"}
    assert sorted(told) == sorted([(name, 1, 2, "half") for name in names] + [(name, 2, 2, "") for name in names])
    assert "nobody can do" not in capfd.readouterr().err  # as the command line is silent


def test_each_gets_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    do_all(write, [(tmp_path, name) for name in "abcd"], 2, lambda *_: None)
    assert {(tmp_path / name).read_text().split()[2] for name in "abcd"} == {"3", "5"}


def test_one_job_works_here(tmp_path):
    do_all(write, [(tmp_path, "one"), (tmp_path, "two")], 1, lambda *_: None)
    assert (tmp_path / "two").read_text().split()[0] == str(os.getpid())


def test_an_error_is_the_error_of_the_work():
    with pytest.raises(FarssError, match="cannot be done"):
        do_all(fail, ["a", "b"], 2, lambda *_: None)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_one_cannot_do_stops_no_other(jobs, tmp_path, caplog):
    with pytest.raises(NumericalError, match="the first cannot be done"):
        do_all(fail_first, [(tmp_path, place) for place in range(4)], jobs, lambda *_: None)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3"}
    assert "the first cannot be done (the others go on)" in caplog.text


def test_what_failed_is_let_go_of():
    """A model that a failed run has trained would stay in memory while the others work."""
    held = []

    class Model:
        pass

    def work(item, tell):
        if any(each() for each in held):
            raise AssertionError("a model of before is still there")
        model = Model()
        held.append(weakref.ref(model))
        try:
            raise ValueError("cannot")
        except ValueError as error:
            raise FarssError(f"{item} cannot be done") from error

    with pytest.raises(FarssError, match="a cannot be done; b cannot be done; c cannot be done"):
        do_all(work, ["a", "b", "c"], 1, lambda *_: None)
    assert len(held) == 3


def test_fewer_items_than_jobs_have_more_threads_each(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    do_all(write, [(tmp_path, "one")], 2, lambda *_: None)
    assert (tmp_path / "one").read_text().split()[1] == "4"


def test_no_more_is_begun_after_a_process_was_killed(tmp_path):
    with pytest.raises(FarssError, match=r"compare\.jobs=1"):
        do_all(die_first, [(tmp_path, place) for place in range(8)], 2, lambda *_: None)
    assert len([*tmp_path.iterdir()]) <= 2


def test_several_errors_are_all_told():
    with pytest.raises(FarssError, match="a cannot be done; b cannot be done"):
        do_all(fail, ["a", "b"], 1, lambda *_: None)


def test_one_item_of_several_jobs_is_not_done_here(tmp_path):
    """On a GPU its memory would be held here for as long as the others work."""
    do_all(write, [(tmp_path, "one")], 2, lambda *_: None)
    assert (tmp_path / "one").read_text().split()[0] != str(os.getpid())


def test_a_killed_process_is_told():
    with pytest.raises(FarssError, match=r"compare\.jobs=1"):
        do_all(die, ["a", "b"], 2, lambda *_: None)


def test_nobody_works_on_when_the_parent_is_killed(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_jobs as t; t.do_all(t.linger, [{str(tmp_path)!r}] * 2, 2, print)"
    guard = f"if __name__ == '__main__':\n    exec({code!r})\n"
    script = tmp_path / "script.py"
    script.write_text(guard)
    parent = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 60
    while len([path for path in tmp_path.iterdir() if path.name.isdigit()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    workers = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in workers):
        assert time.monotonic() < deadline + 20
        time.sleep(0.2)
