"""Files that are whole or not there, and one writer at a time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ropex import _disk
from ropex._disk import InUseError, held, require_room, unfinished_folder, write_text, writing
from ropex.cli.measuring import _new_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_lock_names_its_owner_and_goes_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = f"""
import sys, time
from pathlib import Path
from ropex._disk import held
with held(Path({str(lock)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    with (
        pytest.raises(InUseError, match=rf"is in use by process {owner.pid}; wait until it has ended, or pass another"),
        held(lock, wait=False),
    ):
        pass
    owner.kill()
    owner.communicate()
    assert names(tmp_path) == ["lock"], "which a killed process cannot remove"
    with held(lock, wait=False):
        assert lock.read_text() == str(os.getpid())
    assert names(tmp_path) == []


def test_who_waits_gets_it_alone(tmp_path: Path) -> None:
    inside, most, turns = 0, 0, []

    def work(number: int) -> None:
        nonlocal inside, most
        for _ in range(20):
            with held(tmp_path / "lock"):
                inside += 1
                most = max(most, inside)
                turns.append(number)
                inside -= 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert len(turns) == 80
    assert names(tmp_path) == []


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "result.json", "old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with writing(tmp_path) as put, pytest.raises(OSError, match="No space left") as error:
        put("result.json", fail)
    assert error.value.filename == str(tmp_path / "result.json")
    assert (tmp_path / "result.json").read_text() == "old"
    assert names(tmp_path) == ["result.json"]


def test_what_killed_writers_left_goes(tmp_path: Path) -> None:
    (tmp_path / f"{_disk._PARTIAL}abc").write_text("half")
    (tmp_path / f"{_disk._UNFINISHED}abc").mkdir()
    (tmp_path / f"{_disk._UNFINISHED}abc" / "model.safetensors").write_text("half")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("mine")
    (tmp_path / f"{_disk._UNFINISHED}link").symlink_to(tmp_path / "elsewhere")
    write_text(tmp_path / "result.json", "new")
    with unfinished_folder(tmp_path) as mine, unfinished_folder(tmp_path) as other:
        assert mine != other
        assert mine.is_dir(), "one that is in use stays"
        assert stat.S_IMODE(mine.stat().st_mode) == 0o700
        assert names(mine) == [".ropex.lock"]
    assert (tmp_path / "elsewhere" / "kept").read_text() == "mine"
    assert names(tmp_path) == [f"{_disk._UNFINISHED}link", "elsewhere", "result.json"]


def test_without_locks_nothing_of_others_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some platforms and network file systems have none."""
    monkeypatch.setattr(_disk, "fcntl", None)
    with unfinished_folder(tmp_path) as mine, unfinished_folder(tmp_path):
        assert mine.is_dir()

        def slow(path: Path) -> None:
            write_text(tmp_path / "other", "b")
            path.write_text("a")

        with writing(tmp_path) as put:
            put("ours", slow)
    assert names(tmp_path) == ["other", "ours"]


def test_a_lock_file_of_another_user_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was killed left it, and we may neither write nor remove it."""
    lock = tmp_path / ".ropex.lock"
    lock.write_text("123")
    real = os.open

    def refused(path: object, flags: int, *mode: int) -> int:
        if path == lock and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *mode)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refused)
    write_text(tmp_path / "result.json", "new")
    assert (tmp_path / "result.json").read_text() == "new"


def test_files_have_the_usual_rights(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "a")
    (tmp_path / "usual").write_text("a")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_place_without_room_is_found(tmp_path: Path) -> None:
    require_room(tmp_path)
    assert names(tmp_path) == []
    with pytest.raises(OSError, match="No such file or directory"):
        require_room(tmp_path / "none")


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len({_new_folder("compare") for _ in range(5)}) == 5
