"""Hashing, linking, atomic writing, and disk errors in words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fluxdeploy.bundle import files
from fluxdeploy.bundle.files import (
    HashCache,
    disk_errors,
    hash_files,
    link_or_copy,
    owner_problem,
    read_whole,
    sha256_file,
    write_atomic,
)
from fluxdeploy.errors import BundleError

OLD = 1_600_000_000


def _aged(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    os.utime(path, (OLD, OLD))
    return path


@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (8 << 20) + 3])
def test_hash_equals_hashlib_s_and_reports_every_byte(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    path = tmp_path / "x"
    path.write_bytes(data[:size])
    counts: list[int] = []
    assert sha256_file(path, counts.append) == hashlib.sha256(data[:size]).hexdigest()
    assert sum(counts) == size


def test_many_files_are_hashed_with_one_report_at_a_time(tmp_path: Path) -> None:
    paths = [tmp_path / str(index) for index in range(20)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index]) * 1000)
    total, busy = 0, threading.Lock()

    def on_bytes(count: int) -> None:
        nonlocal total
        assert busy.acquire(blocking=False)
        total += count
        time.sleep(0.002)  # lets the other threads try to get in
        busy.release()

    sums = hash_files([*paths, paths[0]], on_bytes)
    assert list(sums) == paths
    assert total == 20_000
    for index, path in enumerate(paths):
        assert sums[path] == hashlib.sha256(bytes([index]) * 1000).hexdigest()


def test_a_missing_file_and_a_failing_callback_stop_the_hashing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(BundleError, match=r"Cannot read .*/b: there is no such file"):
        hash_files([tmp_path / "a", tmp_path / "b"])

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hash_files([tmp_path / "a", tmp_path / "a" / ".." / "a"][:1], stop)


LIMIT = 1000


def _no_regular_file(kind: str, folder: Path) -> Path:
    path = folder / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to("pipe")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        # Its whole path can be too long for a socket.
        descriptor = os.open(folder, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{descriptor}/{kind}")
        os.close(descriptor)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "terminal":
        path.symlink_to("/dev/tty")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pipe", "it is a named pipe, not a regular file"),
        ("link to a pipe", "it is a named pipe, not a regular file"),
        ("socket", "it is a socket, not a regular file"),
        ("device", "it is a device, not a regular file"),
        ("terminal", "it is a device, not a regular file"),
        ("folder", "it is a folder, not a file"),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str, words: str) -> None:
    path = _no_regular_file(kind, tmp_path)
    with (
        pytest.raises(BundleError, match=f"Cannot read {path}: {words}"),
        disk_errors("read", path),
    ):
        read_whole(path, LIMIT)


def test_a_pipe_that_takes_the_name_of_a_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "x", os.open
    path.write_bytes(b"abc")

    def swap_then_open(name: Path, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(name, flags)

    monkeypatch.setattr(files.os, "open", swap_then_open)
    with pytest.raises(OSError, match="it is a named pipe"):
        read_whole(path, LIMIT)


@pytest.mark.parametrize("size", [0, 1, LIMIT])
def test_a_file_within_its_limit_is_read_through_links(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    (tmp_path / "link").symlink_to("file")
    assert read_whole(tmp_path / "link", LIMIT) == b"x" * size


@pytest.mark.parametrize("size", [LIMIT + 1, 1 << 40])
def test_a_file_past_its_limit_is_not_read(tmp_path: Path, size: int) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.truncate(size)
    with pytest.raises(OSError, match=f"it has {size} bytes, and at most {LIMIT} are allowed"):
        read_whole(tmp_path / "file", LIMIT)


def test_no_more_than_the_limit_is_read_of_a_file_that_says_no_size() -> None:
    cases = {"/proc/self/environ": 3, "/proc/cpuinfo": 10, "/proc/self/maps": 100}
    for path, limit in cases.items():
        assert os.stat(path).st_size == 0
        assert len(read_whole(path, 64 << 20)) > limit
        with pytest.raises(OSError, match=f"more than the {limit} bytes that are allowed"):
            read_whole(path, limit)


def test_no_more_than_the_limit_is_read_of_a_file_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x")
    counts: list[int] = []

    class Growing(files.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            counts.append(size or 0)
            with path.open("ab") as file:
                file.write(b"x" * 400)
            return super().read(size) or b""

    monkeypatch.setattr(files, "FileIO", Growing)
    with pytest.raises(OSError, match=f"more than the {LIMIT} bytes that are allowed"):
        read_whole(path, LIMIT)
    assert len(counts) < 9
    assert max(counts) == LIMIT + 1


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are really hashed."""
    seen: list[str] = []
    real = files.sha256_file

    def counting(path: os.PathLike[str], on_bytes: files.OnBytes | None = None) -> str:
        seen.append(os.path.basename(path))
        return real(path, on_bytes)

    monkeypatch.setattr(files, "sha256_file", counting)
    return seen


def test_cache_reads_an_unchanged_file_once(tmp_path: Path, reads: list[str]) -> None:
    path = _aged(tmp_path / "x", b"12345")
    os.symlink(path, tmp_path / "link")
    counts: list[int] = []
    first = HashCache(tmp_path / "cache").hash_files([path], counts.append)
    second = HashCache(tmp_path / "cache").hash_files([path, tmp_path / "link"], counts.append)
    assert first[path] == second[path] == second[tmp_path / "link"]
    assert first[path] == hashlib.sha256(b"12345").hexdigest()
    assert reads == ["x"]
    assert counts == [5, 5, 5]


@pytest.mark.parametrize("change", ["bytes", "size", "time", "inode", "kept time"])
def test_cache_reads_a_changed_file_again(tmp_path: Path, reads: list[str], change: str) -> None:
    path = _aged(tmp_path / "x", b"12345")
    cache = HashCache(tmp_path / "cache")
    cache.hash_files([path])
    data = b"123" if change == "size" else b"54321"
    if change == "inode":
        path.rename(tmp_path / "kept")
    path.write_bytes(data)
    if change in ("size", "inode", "kept time"):
        os.utime(path, (OLD, OLD))
    if change == "time":
        os.utime(path, (OLD, OLD + 1))
    assert cache.hash_files([path])[path] == hashlib.sha256(data).hexdigest()
    assert reads == ["x", "x"]


def _build(cache: HashCache, weights: Path, folder: Path) -> None:
    """What a build does to a checkpoint's file, of which the earlier bundle has a link."""
    cache.hash_files([weights])
    cache.link(weights, folder / "staging/weights")
    if (folder / "bundle").exists():
        cache.link(folder / "bundle/weights", folder / "staging/weights")
    assert cache.changed() == []
    shutil.rmtree(folder / "bundle", ignore_errors=True)
    (folder / "staging").rename(folder / "bundle")
    cache.renew()


def test_builds_that_link_a_file_read_it_once(tmp_path: Path, reads: list[str]) -> None:
    weights = _aged(tmp_path / "x", b"12345")
    (tmp_path / "link").symlink_to(weights)
    for _ in range(3):
        _build(HashCache(tmp_path / "cache"), tmp_path / "link", tmp_path / "out")
    assert reads == ["link"]


def test_a_link_that_somebody_else_made_costs_another_look(
    tmp_path: Path, reads: list[str]
) -> None:
    weights = _aged(tmp_path / "x", b"12345")
    cache = HashCache(tmp_path / "cache")
    cache.hash_files([weights])
    os.link(weights, tmp_path / "other")
    assert cache.changed() == []
    assert cache.changed() == []
    assert reads == ["x", "x"]


@pytest.mark.parametrize(
    "change",
    [
        lambda path: _aged(path, b"54321"),
        lambda path: path.write_bytes(b"54321"),
        lambda path: path.write_bytes(b"123456"),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: os.replace(_aged(path.with_name("y"), b"54321"), path),
    ],
)
@pytest.mark.parametrize("linked", [True, False])
def test_a_file_that_changes_during_a_build_is_told(
    tmp_path: Path, change: Callable[[Path], object], linked: bool
) -> None:
    weights = _aged(tmp_path / "x", b"12345")
    cache = HashCache(tmp_path / "cache")
    for _ in range(2):  # known from the second time on
        cache.hash_files([weights])
    if linked:
        cache.link(weights, tmp_path / "bundle/x")
    change(weights)
    assert cache.changed() == [weights]


def test_a_link_to_another_file_is_a_change(tmp_path: Path) -> None:
    for name, data in (("a", b"12345"), ("b", b"54321")):
        _aged(tmp_path / name, data)
    (tmp_path / "x").symlink_to("a")
    cache = HashCache(tmp_path / "cache")
    cache.hash_files([tmp_path / "x"])
    (tmp_path / "x").unlink()
    (tmp_path / "x").symlink_to("b")
    assert cache.changed() == [tmp_path / "x"]
    (tmp_path / "x").unlink()
    (tmp_path / "x").symlink_to("a")
    assert HashCache(tmp_path / "cache").changed() == []


@pytest.mark.parametrize("mode", [0o777, 0o773, 0o722, 0o1777])
def test_a_cache_that_others_can_write_is_not_believed(
    tmp_path: Path, reads: list[str], mode: int
) -> None:
    path = _aged(tmp_path / "x", b"12345")
    folder = tmp_path / "cache"
    HashCache(folder).hash_files([path])
    text = (folder / "hashes.json").read_text()
    (folder / "hashes.json").write_text(re.sub("[0-9a-f]{64}", "0" * 64, text))
    folder.chmod(mode)
    assert HashCache(folder).hash_files([path])[path] == hashlib.sha256(b"12345").hexdigest()
    assert reads == ["x", "x"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    HashCache(folder).hash_files([path])
    assert reads == ["x", "x"]


@pytest.mark.skipif(os.name != "posix", reason="no groups there")
@pytest.mark.parametrize(
    ("mode", "name", "members", "primary", "refused"),
    [
        (0o40775, "me", [], True, False),
        (0o40775, "me", ["me"], True, False),
        (0o40775, "me", ["me", "you"], True, True),
        (0o40775, "staff", [], True, True),
        (0o40775, "me", [], False, True),
        (0o40755, "staff", ["you"], False, False),
        (0o40777, "me", [], True, True),
    ],
)
def test_a_group_may_write_where_its_owner_has_it_alone(
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    name: str,
    members: list[str],
    primary: bool,
    refused: bool,
) -> None:
    import grp
    import pwd

    group = SimpleNamespace(gr_gid=7, gr_name=name, gr_mem=members)
    owner = SimpleNamespace(pw_name="me", pw_gid=7 if primary else 8)
    monkeypatch.setattr(grp, "getgrgid", lambda _: group)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: owner)
    status = SimpleNamespace(st_mode=mode, st_uid=os.geteuid(), st_gid=7)
    assert (owner_problem(status) is not None) is refused  # type: ignore[arg-type]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="takes another user")
def test_a_cache_of_another_user_is_left_alone(tmp_path: Path, reads: list[str]) -> None:
    path = _aged(tmp_path / "x", b"12345")
    folder = tmp_path / "cache"
    HashCache(folder).hash_files([path])
    before = (folder / "hashes.json").read_bytes()
    os.chown(folder, 12345, 12345)
    HashCache(folder).hash_files([path])
    HashCache(folder).hash_files([path])
    assert reads == ["x"] * 3
    assert (folder / "hashes.json").read_bytes() == before


def test_the_cache_is_private_whatever_the_mask(tmp_path: Path, reads: list[str]) -> None:
    path = _aged(tmp_path / "x", b"12345")
    earlier = os.umask(0)
    try:
        HashCache(tmp_path / "a/cache").hash_files([path])
    finally:
        os.umask(earlier)
    HashCache(tmp_path / "a/cache").hash_files([path])
    assert reads == ["x"]


def test_cache_does_not_trust_a_file_that_was_just_written(
    tmp_path: Path, reads: list[str]
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    cache = HashCache(tmp_path / "cache")
    cache.hash_files([path])
    cache.hash_files([path])
    assert reads == ["x", "x"]


@pytest.mark.parametrize(
    "text", ["", "[]", "nonsense", '{"x": 1}', '{"PATH": [1, 2, 3, "no hash"]}', "\xff"]
)
def test_broken_cache_is_ignored_and_replaced(tmp_path: Path, text: str) -> None:
    path = _aged(tmp_path / "x", b"12345")
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "hashes.json").write_bytes(text.replace("PATH", str(path)).encode("latin-1"))
    expected = hashlib.sha256(b"12345").hexdigest()
    assert HashCache(folder).hash_files([path])[path] == expected
    assert json.loads((folder / "hashes.json").read_text())[str(path)][-1] == expected


def test_cache_folder_that_cannot_be_written_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _aged(tmp_path / "x", b"12345")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert HashCache().hash_files([path])[path] == hashlib.sha256(b"12345").hexdigest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    HashCache().hash_files([path])
    assert (tmp_path / "user/fluxdeploy/hashes.json").is_file()


def test_link_follows_symbolic_links_and_shares_the_bytes(tmp_path: Path) -> None:
    source = tmp_path / "blob"
    source.write_bytes(b"weights")
    os.symlink(source, tmp_path / "model.safetensors")
    target = tmp_path / "new" / "folder" / "model.safetensors"
    counts: list[int] = []
    for _ in range(2):
        assert link_or_copy(tmp_path / "model.safetensors", target, counts.append) == "linked"
        assert target.samefile(source)
        assert not target.is_symlink()
        assert os.listdir(target.parent) == ["model.safetensors"]
    assert counts == [7, 7]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_where_links_are_impossible_a_copy_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"12345")
    target.write_bytes(b"earlier")
    counts: list[int] = []
    assert link_or_copy(source, target, counts.append) == "copied"
    assert target.read_bytes() == b"12345"
    assert not target.samefile(source)
    assert counts == [5]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_only_files_are_linked(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="it is not a file"):
        link_or_copy(tmp_path, tmp_path / "x")
    with pytest.raises(BundleError, match=r"Cannot read .*no such file"):
        link_or_copy(tmp_path / "none", tmp_path / "x")
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(BundleError, match=r"Cannot write .*a file is in its place"):
        link_or_copy(tmp_path / "a", tmp_path / "a" / "x")
    assert os.listdir(tmp_path) == ["a"]


def test_writing_replaces_a_file_at_once_and_others_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, b"earlier")
    with open(path, "rb") as earlier:
        write_atomic(path, "später")
        assert earlier.read() == b"earlier"
    assert path.read_text("utf-8") == "später"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_failed_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, b"earlier")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(BundleError, match=f"Cannot write {path}: the disk is full; free some"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission is denied"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "is a file, not a folder"),
        (errno.EPIPE, "Broken pipe"),
    ],
)
def test_disk_errors_become_words(code: int, words: str) -> None:
    with (
        pytest.raises(BundleError, match="Cannot write the/path: ") as caught,
        disk_errors("write", "the/path"),
    ):
        raise OSError(code, os.strerror(code))
    assert words in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_disk_is_named() -> None:
    with (
        pytest.raises(BundleError, match="Cannot write /dev/full: the disk is full"),
        disk_errors("write", "/dev/full"),
        open("/dev/full", "wb") as file,
    ):
        file.write(b"x")
