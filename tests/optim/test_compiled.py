"""The library of compiled kernels: when it is built, where it is kept, and what happens without it."""

import logging
import os
import shutil
import stat

import pytest
import torch
from torch import nn

from netwright.core.errors import SettingError
from netwright.optim import _compiled
from netwright.optim.lion import Lion

compiled = pytest.mark.skipif(_compiled.load() is None, reason="needs a C++ compiler")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and a library that is looked for anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _compiled._attempt.cache_clear()
    yield tmp_path
    _compiled._attempt.cache_clear()


def step(gradient):
    """Where a step of Lion with learning rate 0.5 takes ones."""
    param = nn.Parameter(torch.ones(len(gradient)))
    param.grad = torch.tensor(gradient)
    Lion([param], lr=0.5).step()
    return param.tolist()


def forked(work):
    """The exit status of a forked process that is to do ``work()``, which gives True when all is well."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return child


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@compiled
def test_processes_that_build_at_once_leave_one_private_file(fresh, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "deep" / "cache"))
    children = [forked(lambda: _compiled.load() is not None) for _ in range(3)]
    assert [status(child) for child in children] == [0, 0, 0]
    (kept,) = (fresh / "deep" / "cache" / "netwright").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


def test_without_a_compiler_torch_does_the_work(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.DEBUG, "netwright.optim"):
        assert step([1.0, -1.0, 0.0]) == [0.5, 1.5, 1.0]
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "there is no C++ compiler (tried $CXX, c++, g++, clang++)" in record.getMessage()
    assert not list(fresh.rglob("*.so"))


def test_without_a_compiler_fused_is_refused(fresh, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SettingError, match=r"Lion: fused=True is not possible here: there is no C\+\+ compiler"):
        Lion([nn.Parameter(torch.ones(2))], fused=True)
    optimizer = Lion([nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["fused"] = True  # as a loaded state may say
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    with pytest.raises(SettingError, match="there is no"):
        optimizer.step()


@pytest.mark.parametrize(("script", "message"), [("exit 1", "does not work"), ("echo no >&2; exit 3", "no")])
def test_a_broken_compiler_is_named_at_debug_level_once(fresh, monkeypatch, caplog, script, message):
    broken = fresh / "broken"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", f"{broken} -O3")
    with caplog.at_level(logging.DEBUG, "netwright.optim"):
        for _ in range(2):
            assert step([1.0, -1.0]) == [0.5, 1.5]
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert message in record.getMessage()
    assert str(broken) in record.getMessage()


@pytest.mark.parametrize(("name", "value"), [("CXX", "c++ '"), ("HOME", "")])
def test_an_unusable_environment_is_no_error(fresh, monkeypatch, name, value):
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(fresh))
    monkeypatch.setenv(name, value)
    if name == "HOME":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert _compiled.load() is None
    assert ("No closing quotation" if name == "CXX" else "no home folder") in _compiled.missing()
    assert step([1.0, -1.0]) == [0.5, 1.5]


@compiled
def test_the_library_is_built_again_where_it_was_cut_short(fresh, monkeypatch):
    assert _compiled.load() is not None
    (whole,) = (fresh / "netwright").iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "other"))
    (fresh / "other" / "netwright").mkdir(parents=True, mode=0o700)
    short = fresh / "other" / "netwright" / whole.name
    short.touch(0o700)
    _compiled._attempt.cache_clear()
    assert _compiled.load() is not None
    assert short.stat().st_size == whole.stat().st_size


@compiled
def test_a_second_load_compiles_nothing(fresh, monkeypatch):
    assert _compiled.load() is not None
    _compiled._attempt.cache_clear()
    monkeypatch.setattr(_compiled, "_build", None)
    assert _compiled.load() is not None


@compiled
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_may_write_is_refused(fresh, what):
    assert _compiled.load() is not None
    folder = fresh / "netwright"
    (folder if what == "folder" else next(folder.iterdir())).chmod(0o722)
    _compiled._attempt.cache_clear()
    assert _compiled.load() is None
    assert "can be written by other users. Run chmod go-w on it." in _compiled.missing()


@compiled
def test_links_and_files_of_others_are_refused(fresh, monkeypatch):
    elsewhere = fresh / "elsewhere"
    elsewhere.mkdir()
    (fresh / "netwright").symlink_to(elsewhere)
    assert _compiled.load() is None
    assert "is a symbolic link" in _compiled.missing()
    (fresh / "netwright").unlink()
    _compiled._attempt.cache_clear()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert _compiled.load() is None
    assert "belongs to another user" in _compiled.missing()


@compiled
def test_a_folder_that_cannot_be_made_is_no_error(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    assert _compiled.load() is None
    assert _compiled.missing()


@compiled
def test_another_compiler_or_other_flags_are_another_file(fresh, monkeypatch):
    assert _compiled.load() is not None
    monkeypatch.setenv("CXX", f"{shutil.which(_compiled._compiler()[0])} -DOTHER")
    _compiled._attempt.cache_clear()
    assert _compiled.load() is not None
    assert len(list((fresh / "netwright").iterdir())) == 2
