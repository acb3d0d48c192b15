"""A model appears whole or not at all, and what an interrupted run finished is kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from conftest import Trio

from ipmerge_core.errors import CheckpointError, RunError
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.writer import CheckpointWriter, files_to_copy, layout_bytes


def write_some(writer: CheckpointWriter, names: list[str]) -> None:
    for name in names:
        writer.write(name, writer.source.read_bytes(name))


def test_a_finished_copy_is_the_source_byte_for_byte(trio: Trio, tmp_path: Path) -> None:
    source = Checkpoint.open(trio.mllm)
    with CheckpointWriter(source, tmp_path / "out", "run", resume=True) as writer:
        write_some(writer, list(reversed(source.tensors)))
        writer.finish(lambda: {"ipmerge.json": "{}"})
    for name in (*source.shards, "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (trio.mllm / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "ipmerge.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert not (tmp_path / "out.partial").exists()


def test_an_unfinished_run_leaves_no_model_and_is_resumed(trio: Trio, tmp_path: Path) -> None:
    source = Checkpoint.open(trio.mllm)
    names = list(source.tensors)
    with CheckpointWriter(source, tmp_path / "out", "run", resume=True) as writer:
        write_some(writer, names[:5])
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path / "out.partial" / "model")
    with CheckpointWriter(source, tmp_path / "out", "run", resume=True) as writer:
        assert sorted(writer.done) == sorted(names[:5])
        write_some(writer, names[5:])
        writer.finish(dict)
    assert Checkpoint.open(tmp_path / "out").fingerprint == source.fingerprint


def test_damaged_data_and_a_torn_journal_line_are_written_again(trio: Trio, tmp_path: Path) -> None:
    source = Checkpoint.open(trio.mllm)
    names = list(source.tensors)
    with CheckpointWriter(source, tmp_path / "out", "run", resume=True) as writer:
        write_some(writer, names[:3])
    shard = tmp_path / "out.partial" / "model" / "model.safetensors.partial"
    data = bytearray(shard.read_bytes())
    data[source.spec(names[1]).start] ^= 1
    shard.write_bytes(data)
    with (tmp_path / "out.partial" / "journal-0.jsonl").open("a") as journal:
        journal.write('{"tensor": "mod')
    with CheckpointWriter(source, tmp_path / "out", "run", resume=True) as writer:
        assert sorted(writer.done) == sorted([names[0], names[2]])


def test_a_second_run_into_the_same_folder_is_refused(trio: Trio, tmp_path: Path) -> None:
    source = Checkpoint.open(trio.mllm)
    with (
        CheckpointWriter(source, tmp_path / "out", "run", resume=True),
        pytest.raises(RunError, match="Another run is writing"),
        CheckpointWriter(source, tmp_path / "out", "run", resume=True),
    ):
        pass


def test_unfinished_work_of_another_plan_is_not_touched(trio: Trio, tmp_path: Path) -> None:
    source = Checkpoint.open(trio.mllm)
    name = next(iter(source.tensors))
    with CheckpointWriter(source, tmp_path / "out", "first", resume=True) as writer:
        write_some(writer, [name])
    with (
        pytest.raises(RunError, match="unfinished merge of another plan"),
        CheckpointWriter(source, tmp_path / "out", "second", resume=True),
    ):
        pass
    with CheckpointWriter(source, tmp_path / "out", "second", resume=False) as writer:
        assert writer.done == {}


def test_a_folder_of_somebody_else_is_not_touched(trio: Trio, tmp_path: Path) -> None:
    source = Checkpoint.open(trio.mllm)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(CheckpointError, match="was not created by a merge"),
        CheckpointWriter(source, tmp_path / "out", "run", resume=True),
    ):
        pass
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_exists_is_refused(kind: str, trio: Trio, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").touch()
    else:
        (tmp_path / "out").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty|is a file"):
        CheckpointWriter(Checkpoint.open(trio.mllm), tmp_path / "out", "run", resume=True)


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only")]
)
def test_a_failing_disk_ends_in_one_sentence_and_keeps_the_work(
    code: int, words: str, trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(trio.mllm)
    names = list(source.tensors)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with CheckpointWriter(source, tmp_path / "out", "run", resume=True) as writer:
        write_some(writer, names[:2])
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            with pytest.raises(RunError, match=words):
                write_some(writer, names[2:])
    with CheckpointWriter(source, tmp_path / "out", "run", resume=True) as writer:
        assert sorted(writer.done) == sorted(names[:2])


def test_weights_code_and_card_of_the_source_are_not_copied(own_trio: Trio) -> None:
    for name in ("pytorch_model.bin", "modeling_x.py", "README.md", "LICENSE", "chat.jinja"):
        (own_trio.mllm / name).write_text("x")
    source = Checkpoint.open(own_trio.mllm)
    assert files_to_copy(source) == ["LICENSE", "chat.jinja", "config.json", "tokenizer.json"]
    expected = sum(
        (own_trio.mllm / name).stat().st_size
        for name in ("LICENSE", "chat.jinja", "config.json", "tokenizer.json", "model.safetensors")
    )
    assert layout_bytes(source) == expected


def test_additional_chat_templates_are_copied(own_trio: Trio, tmp_path: Path) -> None:
    folder = own_trio.mllm / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("{{ tools }}")
    (own_trio.mllm / "other").mkdir()
    (own_trio.mllm / "other" / "notes.txt").write_text("x")
    source = Checkpoint.open(own_trio.mllm)
    assert "additional_chat_templates/tool_use.jinja" in files_to_copy(source)
    with CheckpointWriter(source, tmp_path / "out", "run", resume=True) as writer:
        write_some(writer, list(source.tensors))
        writer.finish(dict)
    copied = tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja"
    assert copied.read_text() == "{{ tools }}"
    assert not (tmp_path / "out" / "other").exists()


@pytest.mark.parametrize("name", ["README.md", "config.json", "additional_chat_templates/a.jinja"])
def test_a_link_out_of_the_model_folder_is_refused(
    own_trio: Trio, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("{}")
    link = own_trio.mllm / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    with pytest.raises(CheckpointError, match="is a symbolic link to .*id_rsa', outside"):
        Checkpoint.open(own_trio.mllm)


def test_links_inside_the_folder_into_the_hub_cache_and_of_weights_are_followed(
    own_trio: Trio, tmp_path: Path
) -> None:
    expected = Checkpoint.open(own_trio.mllm)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    config, weights = own_trio.mllm / "config.json", own_trio.mllm / "model.safetensors"
    config.rename(blobs / "1a2b")
    config.symlink_to(blobs / "1a2b")
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    (own_trio.mllm / "tokenizer_2.json").symlink_to("tokenizer.json")
    found = Checkpoint.open(own_trio.mllm)
    assert (found.config, found.tensors) == (expected.config, expected.tensors)
    assert "tokenizer_2.json" in files_to_copy(found)


def test_a_folder_of_templates_that_is_a_link_out_of_the_model_is_refused(
    own_trio: Trio, tmp_path: Path
) -> None:
    (tmp_path / "ssh").mkdir()
    (tmp_path / "ssh" / "key").write_text("x")
    (own_trio.mllm / "additional_chat_templates").symlink_to(tmp_path / "ssh")
    with pytest.raises(CheckpointError, match="outside the model folder"):
        Checkpoint.open(own_trio.mllm)
