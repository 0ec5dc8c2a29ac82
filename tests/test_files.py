import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import time

import pytest

from binvit.files import (
    atomic_write,
    is_of_system,
    is_shortage,
    made_folders,
    remove_leftovers,
    require_writable,
    temporary_folder,
)


def test_errors_of_the_system_are_told_from_those_of_a_file_s_content():
    own = [OSError(number, "") for number in (errno.EMFILE, errno.ENOSPC, errno.EACCES, errno.EIO, errno.ECONNRESET)]
    content = [OSError("a decoder's own sentence"), OSError(errno.EINVAL, ""), ValueError(""), EOFError()]
    assert [is_of_system(error) for error in own + content] == [True] * 5 + [False] * 4
    assert [is_shortage(error) for error in own + content] == [True] * 2 + [False] * 7


def test_text_and_bytes_are_written_into_new_folders(tmp_path):
    path = tmp_path / "a" / "b" / "text.txt"
    assert atomic_write(path, "häuser\n") == path
    assert path.read_bytes() == "häuser\n".encode()
    atomic_write(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["text.txt"]


def test_symbolic_links_stay_and_their_targets_are_written(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    link.symlink_to(target)
    for content in ("into nothing", "over a file"):
        assert atomic_write(link, content) == link
        assert link.is_symlink()
        assert target.read_text() == content
        assert not target.is_symlink()


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_permissions_stay_and_those_of_new_files_follow_the_umask(tmp_path):
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        atomic_write(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o444, 0o664):
            path.chmod(mode)
            atomic_write(path, f"{mode}")
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes")
def test_what_is_no_plain_file_is_refused_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to nothing").symlink_to("/dev/null")
    before = sorted(tmp_path.iterdir())
    for name in ("/dev/null", *before):
        with pytest.raises(ValueError, match=f"Expected a plain file to write to, but {name} is a folder, a device"):
            atomic_write(name, "content")
    with pytest.raises(ValueError, match="must not hold a NUL byte, got 'a"):
        atomic_write("a\0b", "content")
    assert sorted(tmp_path.iterdir()) == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "\ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_finds_no_room_names_the_file_and_leaves_the_old_one(tmp_path):
    path = atomic_write(tmp_path / "a.txt", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # the system's own error, which names no file
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            atomic_write(path, bytes(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename, caught.value.filename2) == (errno.EFBIG, str(path), None)
    assert [item.read_text() for item in tmp_path.iterdir()] == ["old"]


def test_file_and_folder_are_on_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    steps, fsync, replace = [], os.fsync, os.replace
    kinds = {True: "folder", False: "file"}

    def record_sync(descriptor):
        steps.append(kinds[stat.S_ISDIR(os.fstat(descriptor).st_mode)])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("rename"), replace(*names)))
    atomic_write(tmp_path / "file", "content")
    assert steps == ["file", "rename", "folder"]


def test_the_longest_name_a_folder_takes_can_be_written(tmp_path):
    path = tmp_path / ("häuser" * 36)  # 252 bytes
    atomic_write(path, "content")
    assert path.read_text() == "content"


@pytest.mark.skipif(os.name != "posix", reason="process numbers")
def test_temporary_files_of_dead_processes_are_removed_and_no_others(tmp_path):
    # The writer says when its file is half written, and waits there.
    code = (
        "import os, sys, time\n"
        "from binvit import files\n"
        "os.fsync = lambda descriptor: (print('half', flush=True), time.sleep(600))\n"
        "files.atomic_write(sys.argv[1], 'content')\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / f"{i}.json")], stdout=subprocess.PIPE)
        for i in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"half\n"
        for name in ("mine.tmp", ".notes.tmp", ".3.1.tmp"):
            (tmp_path / name).write_text("kept")
        dead, alive = (next(tmp_path.glob(f".*.{writer.pid}.*.tmp")) for writer in writers)
        elsewhere = dead.with_name(dead.name.replace(".0.json.", ".0.json.other-"))
        elsewhere.write_text("from another machine")
        assert remove_leftovers(tmp_path) == []
        os.kill(writers[0].pid, signal.SIGKILL)
        writers[0].wait()
        assert remove_leftovers(tmp_path) == [dead]
        old = time.time() - 100_000
        os.utime(elsewhere, (old, old))
        assert remove_leftovers(tmp_path) == [elsewhere]
        assert sorted(os.listdir(tmp_path)) == sorted([".3.1.tmp", ".notes.tmp", "mine.tmp", alive.name])
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert remove_leftovers(tmp_path / "none") == []


def test_a_temporary_folder_of_a_dead_process_is_removed_with_its_files_and_a_living_one_s_stays(tmp_path):
    with temporary_folder(tmp_path, "download") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("half")
        dead = folder.with_name(folder.name.replace(f".{os.getpid()}.", ".99999999."))
        folder.rename(dead)
        folder.mkdir()
        assert remove_leftovers(tmp_path) == [dead]
        assert os.listdir(tmp_path) == [folder.name]
    assert os.listdir(tmp_path) == []


def test_folders_made_for_what_fails_are_removed_unless_they_were_there_or_hold_something(tmp_path):
    def stop(folder, keep):
        assert folder.is_dir()
        if keep:
            (tmp_path / keep).write_text("kept")
        raise KeyboardInterrupt

    def fail(name, keep=None):
        with pytest.raises(KeyboardInterrupt), made_folders(tmp_path / name) as folder:
            stop(folder, keep)
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))

    assert fail("a/b/c") == fail("a/../b") == []
    (tmp_path / "a").mkdir()
    assert fail("a") == fail("a/b/c") == ["a"]
    assert fail("a/b/c", keep="a/b/file") == ["a", "a/b", "a/b/file"]
    with pytest.raises(FileExistsError), made_folders(tmp_path / "a/b/file"):
        pass
    with pytest.raises(OSError, match="File name too long"), made_folders(tmp_path / "x" / "y" / ("z" * 300) / "v"):
        pass
    assert os.listdir(tmp_path) == ["a"]
    with made_folders(tmp_path / "x" / "y"):
        pass
    assert (tmp_path / "x" / "y").is_dir()


def test_what_cannot_be_written_is_known_before_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    assert require_writable(tmp_path / "file") == tmp_path / "file"
    assert require_writable(str(tmp_path / "new" / "folder" / "file")) == tmp_path / "new" / "folder" / "file"
    with pytest.raises(ValueError, match="Expected a plain file to write to"):
        require_writable(tmp_path)
    with pytest.raises(NotADirectoryError, match="file/below"):
        require_writable(tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="new/folder/file"):
        require_writable(tmp_path / "new" / "folder" / "file")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"
