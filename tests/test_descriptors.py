"""Files are kept open up to a limit, and none that is in use is closed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ipmerge_core.runtime.descriptors import Descriptors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(9):
        (tmp_path / str(number)).write_text(str(number))
    return tmp_path


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_the_least_recently_used_is_closed(folder: Path) -> None:
    opened: list[str] = []

    def open_file(name: str) -> int:
        opened.append(name)
        return os.open(folder / name, os.O_RDONLY)

    files = Descriptors(open_file, most_idle=2)
    for name in "010201":
        with files.use(name) as descriptor:
            assert os.pread(descriptor, 1, 0) == name.encode()
    assert opened == ["0", "1", "2", "1"]
    files.close()
    assert not is_open(descriptor)


def test_a_file_in_use_stays_open_whatever_the_limit(folder: Path) -> None:
    files = Descriptors(lambda name: os.open(folder / name, os.O_RDONLY), most_idle=1)
    with files.use("0") as first, files.use("1") as second, files.use("0") as again:
        assert first == again
        for name in "2345":
            with files.use(name):
                pass
        assert is_open(first)
        assert is_open(second)
    files.close()
    assert not is_open(first)
    assert not is_open(second)


def test_threads_read_what_they_asked_for(folder: Path) -> None:
    files = Descriptors(lambda name: os.open(folder / name, os.O_RDONLY), most_idle=2)

    def read(number: int) -> bytes:
        with files.use(str(number % 9)) as descriptor:
            return os.pread(descriptor, 1, 0)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(900))) == [str(n % 9).encode() for n in range(900)]
    files.close()


def test_a_file_that_cannot_be_opened_is_reported_and_not_kept(folder: Path) -> None:
    files = Descriptors(lambda name: os.open(folder / name, os.O_RDONLY))
    for _ in range(2):
        with pytest.raises(FileNotFoundError), files.use("missing"):
            pass
    files.close()
