"""The writer on a real disk: modes, links, what is left behind, errors."""

import os
import time
from pathlib import Path

import pytest
from torch import nn

from lightning_pet import LoRACallback, apply, extract_delta, inspect_delta, last_good, load_delta, save_delta
from lightning_pet.errors import ArgumentError, DeltaFileError
from lightning_pet.store.files import atomic_folder, atomic_write, durable_link, reap_stale


def write(content: bytes):
    return lambda file: file.write(content)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_the_mode_follows_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        atomic_write(tmp_path / "x", write(b"1"))
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    ("old", "new"), [(0o600, 0o600), (0o640, 0o640), (0o644, 0o644), (0o666, 0o644), (0o400, 0o400)]
)
def test_the_mode_never_gets_wider(tmp_path, old, new):
    """A file that was private stays so, also by a link to it."""
    before = os.umask(0o022)
    try:
        (tmp_path / "x").write_bytes(b"old")
        (tmp_path / "x").chmod(old)
        (tmp_path / "link").symlink_to("x")
        for name in ("x", "link"):
            atomic_write(tmp_path / name, write(b"new"))
            assert (tmp_path / name).lstat().st_mode & 0o777 == new
            assert (tmp_path / name).read_bytes() == b"new"
    finally:
        os.umask(before)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    atomic_write("~/deep/x", write(b"1"))
    durable_link("~/deep/x", "~/y")
    assert sorted(os.listdir(tmp_path)) == ["deep", "y"]


def test_it_replaces_and_counts(tmp_path):
    assert atomic_write(tmp_path / "x", write(b"first")) == 5
    assert atomic_write(str(tmp_path / "x"), write(b"2")) == 1
    assert (tmp_path / "x").read_bytes() == b"2"
    assert os.listdir(tmp_path) == ["x"]


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    atomic_write("x", write(b"1"))
    durable_link("x", "y")
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_a_symbolic_link_is_replaced_and_its_target_kept(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    atomic_write(tmp_path / "link", write(b"new"))
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a folder", "link to a device"])
def test_only_files_are_replaced(tmp_path, kind):
    """A rename would put a file in the place of a pipe, or of the machine's null device."""
    place = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/null" if kind == "link to a device" else tmp_path)
    before = place.lstat()
    with pytest.raises(DeltaFileError, match=f"{place} is a .*a save would put a file in its place") as caught:
        atomic_write(place, write(b"1"))
    assert caught.value.code == "io"
    assert (place.lstat().st_ino, place.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [("a\0b", DeltaFileError, "NUL"), (3, ArgumentError, "no path"), (None, ArgumentError, "no path")],
)
def test_what_is_no_path_is_refused_by_every_verb(path, error, message):
    model = nn.Sequential(nn.Linear(2, 2))
    apply(model, [LoRACallback(r=1, target_modules=["0"])])
    for verb in (
        lambda: save_delta(model, path),
        lambda: load_delta(nn.Sequential(nn.Linear(2, 2)), path),
        lambda: inspect_delta(path),
        lambda: extract_delta(path, "out"),
        lambda: last_good(path),
    ):
        with pytest.raises(error, match=message):
            verb()


def test_the_longest_name_works(tmp_path):
    name = "ä" * 125 + ".ckpt"
    atomic_write(tmp_path / name, write(b"1"))
    assert os.listdir(tmp_path) == [name]


class Odd(Exception):
    pass


@pytest.mark.parametrize("error", [Odd("x"), KeyboardInterrupt(), RuntimeError("no disk behind it"), ValueError("x")])
def test_other_exceptions_propagate_without_a_trace(tmp_path, error):
    atomic_write(tmp_path / "x", write(b"old"))

    def fail(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)) as caught:
        atomic_write(tmp_path / "x", fail)
    assert caught.value is error
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def refused(call, *texts):
    with pytest.raises(DeltaFileError) as caught:
        call()
    assert caught.value.code == "io"
    for text in texts:
        assert text in str(caught.value)


def test_refusals_name_path_and_reason(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    refused(lambda: atomic_write(tmp_path / "folder", write(b"1")), str(tmp_path / "folder"), "is a folder")
    refused(lambda: atomic_write(tmp_path / "file" / "x", write(b"1")), str(tmp_path / "file"), "errno")
    refused(lambda: atomic_write("s3://bucket/x", write(b"1")), "s3://bucket/x", "upload")
    refused(lambda: atomic_write(tmp_path / ("x" * 300), write(b"1")), "File name too long")
    refused(lambda: durable_link(tmp_path / "none", tmp_path / "x"), str(tmp_path / "x"), "No such file")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_folder_comes_whole(tmp_path):
    def build(folder):
        assert not (tmp_path / "deep" / "model").exists()
        Path(folder, "sub").mkdir()
        Path(folder, "sub", "weights").write_bytes(b"1")

    atomic_folder(tmp_path / "deep" / "model", build)
    assert (tmp_path / "deep" / "model" / "sub" / "weights").read_bytes() == b"1"
    assert os.listdir(tmp_path / "deep") == ["model"]
    with pytest.raises(DeltaFileError, match=r"model: writing failed with errno 39") as caught:
        atomic_folder(tmp_path / "deep" / "model", build_nothing)
    assert caught.value.code == "io"
    assert os.listdir(tmp_path / "deep") == ["model"]
    assert (tmp_path / "deep" / "model" / "sub").is_dir()


def build_nothing(folder):
    pass


def test_a_folder_that_cannot_be_built_leaves_no_trace(tmp_path):
    def build(folder):
        Path(folder, "weights").write_bytes(b"1")
        raise KeyError("tokenizer")

    with pytest.raises(KeyError):
        atomic_folder(tmp_path / "model", build)
    assert os.listdir(tmp_path) == []


def test_a_link_is_a_second_name(tmp_path):
    atomic_write(tmp_path / "a", write(b"1"))
    atomic_write(tmp_path / "b", write(b"2"))
    durable_link(tmp_path / "a", tmp_path / "last")
    durable_link(tmp_path / "b", tmp_path / "last")
    assert (tmp_path / "last").samefile(tmp_path / "b")
    (tmp_path / "b").unlink()
    assert (tmp_path / "last").read_bytes() == b"2"
    assert sorted(os.listdir(tmp_path)) == ["a", "last"]


def test_linking_twice_leaves_nothing_behind(tmp_path):
    atomic_write(tmp_path / "a", write(b"1"))
    for _ in range(2):
        durable_link(tmp_path / "a", tmp_path / "last")
    durable_link(tmp_path / "a", tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "last"]


def test_a_link_to_a_symbolic_link_is_a_file(tmp_path):
    atomic_write(tmp_path / "a", write(b"1"))
    (tmp_path / "link").symlink_to("a")
    durable_link(tmp_path / "link", tmp_path / "last")
    assert not (tmp_path / "last").is_symlink()
    assert (tmp_path / "last").read_bytes() == b"1"


def test_where_links_fail_it_copies(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a", write(b"1"))

    def refuse(source, path):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    durable_link(tmp_path / "a", tmp_path / "last")
    assert (tmp_path / "last").read_bytes() == b"1"
    assert not (tmp_path / "last").samefile(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "last"]


def test_only_abandoned_temporaries_are_reaped(tmp_path):
    dead = 4_194_303 * 2  # above the largest process number of Linux
    names = {
        f".x.ckpt.{dead}.0123abcd.tmp": True,
        f".a.b.c.{dead}.ffffffff.tmp": True,
        f".young.{dead}.0123abcd.tmp": False,
        f".alive.{os.getpid()}.0123abcd.tmp": False,
        ".init.1.0123abcd.tmp": False,
        f"visible.{dead}.0123abcd.tmp": False,
        f".x.{dead}.0123abc.tmp": False,
        f".x.{dead}.0123ABCD.tmp": False,
        ".x.0.0123abcd.tmp": False,
        ".x.-1.0123abcd.tmp": False,
        ".x.99999999999999999999.0123abcd.tmp": False,
        ".x.²2.0123abcd.tmp": False,
        ".tmp": False,
        f".x.{dead}.0123abcd.tmp.ckpt": False,
        f".folder.{dead}.0123abcd.tmp": True,
        f".link.{dead}.0123abcd.tmp": False,
    }
    for name in names:
        path = tmp_path / name
        if "folder" in name:
            (path / "sub").mkdir(parents=True)
            (path / "sub" / "weights").write_bytes(b"")
        elif "link" in name:
            path.symlink_to("sub")
        else:
            path.write_bytes(b"")
        old = time.time() - (60 if "young" in name else 7200)
        os.utime(path, (old, old), follow_symlinks=False)
    expected = sorted(str(tmp_path / name) for name, goes in names.items() if goes)
    assert list(reap_stale(tmp_path)) == expected
    assert len(os.listdir(tmp_path)) == len(names) - len(expected)
    assert reap_stale(tmp_path) == ()
    assert reap_stale(tmp_path / "none") == ()


def test_the_writers_own_temporary_has_the_pattern(tmp_path):
    seen = []
    atomic_write(tmp_path / "x.ckpt", lambda file: seen.append(os.listdir(tmp_path)))
    (name,) = seen[0]
    dot, pid, token, suffix = name.rsplit(".", 3)
    assert (dot, pid, suffix) == (".x.ckpt", str(os.getpid()), "tmp")
    assert len(token) == 8
