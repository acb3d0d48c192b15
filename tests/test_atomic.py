"""Files and folders that appear whole: replaced in one step, or left as they were."""

from __future__ import annotations

import os
import stat

import pytest

from ipmerge_core.runtime.atomic import atomic_path, is_temporary, write_whole


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path):
    path = tmp_path / "plan.json"
    for content in ("first", b"second"):
        write_whole(path, content)
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_block_leaves_the_former_file_and_no_other(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("former")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("half of")
            assert [is_temporary(entry) for entry in (temporary, path)] == [True, False]
            assert path.read_text() == "former"
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        write_half()
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path):
    out = tmp_path / "adapter"
    out.mkdir()
    with atomic_path(out) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("1")
    with pytest.raises(OSError, match="not empty"), atomic_path(out) as temporary:
        temporary.mkdir()
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]
    assert (out / "a").read_text() == "1"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("former")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
