"""Models are read by ranges from wherever they lie, and what goes wrong is said in one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fsspec
import httpx
import huggingface_hub
import pytest
from conftest import Trio
from huggingface_hub import errors as hub_errors

import ipmerge_core as ipm
from ipmerge_core.errors import CheckpointError, RunError
from ipmerge_core.merging.merge import estimate_merge
from ipmerge_core.models import files
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.files import LocalFiles, RemoteFiles, as_hub_id, is_hub_id, open_hub
from ipmerge_core.planning.plan import MergePlan

SHA = "0123456789abcdef0123456789abcdef01234567"
CLIENT = sys.modules[hub_errors.HfHubHTTPError.__mro__[1].__module__]  # httpx, or its successor


class Counting:
    """A local fsspec file system that counts the bytes that are asked of it."""

    def __init__(self) -> None:
        self.system = fsspec.filesystem("file")
        self.nbytes = self.reads = 0

    def ls(self, folder: str, detail: bool) -> list[dict[str, object]]:
        return self.system.ls(folder, detail=detail)

    def open(self, path: str, mode: str, **_: object) -> object:
        self.reads += 1
        counter, file = self, self.system.open(path, mode)
        read = file.read

        def counted(length: int) -> bytes:
            counter.nbytes += length
            return read(length)

        file.read = counted
        return file


@pytest.fixture
def hub(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Stand in for the hub: `org/base`, `org/mllm`, `org/math` at one commit."""
    system = Counting()

    class Api:
        def model_info(self, name: str, revision: str | None = None) -> object:
            assert revision in (None, "main", SHA)
            return type("Info", (), {"sha": SHA})

    def files_of(name: str, sha: str, _: object, folder: str, __: object) -> RemoteFiles:
        assert folder == f"{name}@{sha}"
        return RemoteFiles(name, sha, system, str(getattr(trio, name.partition("/")[2])))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", object)
    monkeypatch.setattr(files, "RemoteFiles", files_of)
    return system


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Api:
        def model_info(self, name: str, revision: str | None = None) -> object:
            raise error

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)


def response(code: int) -> httpx.Response:
    return httpx.Response(code, request=httpx.Request("GET", "https://huggingface.co/api"))


def test_a_hub_model_is_pinned_to_its_commit(hub: Counting) -> None:
    model = Checkpoint.open("org/base@main")
    assert model.id == "org/base"
    assert model.files.revision == SHA
    plan = ipm.make_plan(ipm.open_pair("org/mllm", "org/math", "org/base"), method="linear")
    assert plan.sources.mllm.location == f"org/mllm@{SHA}"
    assert plan.sources.mllm.revision == SHA


def test_opening_and_checking_a_hub_pair_fetches_headers_and_a_few_rows(
    hub: Counting, trio: Trio
) -> None:
    pair = ipm.open_pair("org/mllm", "org/math", "org/base")
    headers = sum(
        len(model.read_header(shard)) + 8 for _, model in pair.roles() for shard in model.shards
    )
    configs = sum((folder / "config.json").stat().st_size for folder in trio[:3])
    assert hub.nbytes <= 2 * headers + configs
    before = hub.nbytes
    findings = pair.check()
    assert {finding.level for finding in findings} == {"ok"}
    sampled = sum(pair.base.spec(m.name).nbytes for m in pair.matrices)  # small ones, whole
    two_models_and_their_bases = 4 * sampled
    assert hub.nbytes - before <= 2 * two_models_and_their_bases  # distances, then task vectors


def test_a_merge_from_the_hub_fetches_what_is_needed_and_equals_the_local_one(
    hub: Counting, trio: Trio, tmp_path: Path
) -> None:
    local = ipm.make_plan(ipm.open_pair(trio.mllm, trio.math, trio.base), method="task_arithmetic")
    ipm.merge(local, tmp_path / "local")
    pair = ipm.open_pair("org/mllm", "org/math", "org/base")
    plan = ipm.make_plan(pair, method="task_arithmetic")
    plan.save(tmp_path / "plan.json")
    before = hub.nbytes
    pair.check()
    checked, before = hub.nbytes - before, hub.nbytes
    ipm.merge(MergePlan.load(tmp_path / "plan.json"), tmp_path / "out")
    decoder = sum(pair.mllm.spec(matrix.mllm).nbytes for matrix in pair.matrices)
    headers = 4 * sum(len(model.read_header(model.shards[0])) for _, model in pair.roles())
    assert hub.nbytes - before <= checked + pair.mllm.nbytes + 2 * decoder + headers + 2000
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    sources = json.loads((tmp_path / "out" / "ipmerge.json").read_text())["sources"]
    assert sources["base"] == {"id": "org/base", "revision": SHA, "content": None,
                               "fingerprint": pair.base.fingerprint}  # fmt: skip


def test_the_estimate_names_the_cheaper_way(
    hub: Counting, trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ipm.open_pair("org/mllm", "org/math", "org/base")
    plan = ipm.make_plan(pair, method="task_arithmetic")
    need = estimate_merge(plan, tmp_path / "out")
    decoder = sum(pair.mllm.spec(matrix.mllm).nbytes for matrix in pair.matrices)
    assert need.nbytes_fetched == need.nbytes_read == pair.mllm.nbytes + 2 * decoder
    assert need.nbytes_whole == sum(model.nbytes for _, model in pair.roles())
    assert "The merge downloads" in need.advice
    assert need.seconds > 0
    assert need.nbytes_memory > need.largest_matrix
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    assert "on a machine with more disk space" in estimate_merge(plan, tmp_path / "out").advice
    with pytest.raises(RunError, match="needs .* GB .* are free"):
        ipm.merge(plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_lost_connection_can_be_resumed(
    hub: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ipm.open_pair("org/mllm", "org/math", "org/base")
    plan = ipm.make_plan(pair, method="linear")
    before = hub.reads
    pair.check()
    checked = hub.reads - before
    opened, reads = hub.open, 0

    def failing_later(path: str, mode: str, **options: object) -> object:
        nonlocal reads
        reads += 1
        if reads > checked + 60:
            raise CLIENT.ConnectError("gone")
        return opened(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "open", failing_later)
        with pytest.raises(RunError, match="Reading 'org/.*' failed .ConnectError: gone"):
            ipm.merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert any(step.action == "resumed" for step in ipm.iter_merge(plan, tmp_path / "out"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            hub_errors.GatedRepoError("403", response=response(403)),
            "GatedRepoError.*accept its terms",
        ),
        (
            hub_errors.RepositoryNotFoundError("404", response=response(404)),
            "NotFoundError.*spelled right",
        ),
        (
            hub_errors.RevisionNotFoundError("404", response=response(404)),
            "this revision does not: give a branch, a tag or a commit",
        ),
        (hub_errors.DisabledRepoError("403", response=response(403)), "has disabled access to"),
        (hub_errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set .* no copy"),
        (httpx.ConnectError("no route"), "could not be reached: check the connection"),
        (CLIENT.ConnectError("no route"), "could not be reached: check the connection"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_with_a_remedy(
    error: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    monkeypatch.setattr(files, "_cached_copy", lambda *_: None)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open("org/model")


@pytest.mark.parametrize(
    "answer",
    [
        hub_errors.GatedRepoError,
        hub_errors.RepositoryNotFoundError,
        hub_errors.RevisionNotFoundError,
        hub_errors.DisabledRepoError,
    ],
)
def test_no_cached_copy_is_used_against_an_answer_of_the_hub(
    answer: type[hub_errors.HfHubHTTPError], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, answer("no", response=response(403)))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match=f"Cannot open 'org/base' .{answer.__name__}"):
        open_hub("org/base")


@pytest.mark.parametrize(
    "text",
    ["org/name", "Qwen/Qwen2.5-Math-7B", "o_r-g/n.a_m-e@main", "org/name@refs/pr/1", "a/b@v1.0"],
)
def test_a_hub_id_is_an_organisation_and_a_name_with_or_without_a_revision(text: str) -> None:
    assert is_hub_id(text)
    assert as_hub_id(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "org/", "/name", "a/b/c", "../name", "org/..", "~/name", "org/name.git",
        "org/a--b", "org/a..b", "-org/name", "org/name-", "org/na me", "org/name\n", "org/nämé",
        "org/name@", "org/name@a b", "org/name@a\n", "@main", "org/" + 97 * "n",
        "org/name@" + 300 * "a",
    ],
)  # fmt: skip
def test_anything_else_is_no_hub_id_and_is_refused_in_a_short_sentence(text: str) -> None:
    assert not is_hub_id(text)
    with pytest.raises(CheckpointError, match="is not a valid hub id; expected") as refusal:
        as_hub_id(text)
    assert len(str(refusal.value)) < 260


def test_without_a_connection_the_local_cache_serves(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / SHA
    snapshot.parent.mkdir()
    snapshot.symlink_to(trio.base)
    failing(monkeypatch, httpx.ConnectError("no route"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    found = open_hub("org/base")
    assert isinstance(found, LocalFiles)
    assert (found.id, found.revision) == ("org/base", SHA)
    assert Checkpoint(found).tensors == Checkpoint.open(trio.base).tensors


def test_a_folder_that_vanishes_is_named(own_trio: Trio) -> None:
    found = LocalFiles(own_trio.base)
    own_trio.base.rename(own_trio.base.with_name("moved"))
    for ask in (found.names, lambda: found.size("config.json"), lambda: found.read("config.json")):
        with pytest.raises(RunError, match="Was it moved, or its disk unmounted"):
            ask()


def test_the_hub_s_hash_of_a_file_stands_for_its_content(trio: Trio) -> None:
    class Hub(Counting):
        def ls(self, folder: str, detail: bool) -> list[dict[str, object]]:
            return [
                {"name": f"{folder}/model.safetensors", "size": 5, "type": "file", "blob_id": "ab"},
                {"name": f"{folder}/old.safetensors", "size": 5, "type": "file"},
                {"name": f"{folder}/original", "size": 0, "type": "directory"},
            ]

    found = RemoteFiles("org/base", SHA, Hub(), str(trio.base))
    assert found.names() == ["model.safetensors", "old.safetensors"]
    assert found.content_id("model.safetensors") == "ab"
    assert found.content_id("old.safetensors") is None
    assert LocalFiles(trio.base).content_id("model.safetensors") is None


def test_a_short_answer_is_noticed(trio: Trio) -> None:
    class Short(Counting):
        def open(self, path: str, mode: str, **_: object) -> object:
            file = self.system.open(path, mode)
            read = file.read
            file.read = lambda length: read(length - 1)
            return file

    found = RemoteFiles("org/base", SHA, Short(), str(trio.base))
    assert found.read("config.json", 5, 5) == b""
    with pytest.raises(RunError, match="returned 9 of 10 requested bytes"):
        found.read("config.json", 0, 10)


def test_a_downloaded_file_is_read_instead_of_the_hub_s(trio: Trio) -> None:
    system, known = Counting(), {"config.json": trio.base / "config.json"}
    found = RemoteFiles("org/base", SHA, system, str(trio.base), known.get)
    text = (trio.base / "config.json").read_bytes()
    assert (found.read("config.json"), found.read("config.json", 2, 5)) == (text, text[2:5])
    assert not system.reads
    found.read("model.safetensors", 0, 8)
    assert system.reads == 1


def test_the_hub_s_known_subfolders_are_listed_and_read(own_trio: Trio) -> None:
    for name, text in (("additional_chat_templates/rag.jinja", "{{ rag }}"), ("other/x.txt", "x")):
        (own_trio.mllm / name).parent.mkdir()
        (own_trio.mllm / name).write_text(text)
    found = RemoteFiles("org/mllm", SHA, Counting(), str(own_trio.mllm))
    assert found.names() == LocalFiles(own_trio.mllm).names()
    assert "additional_chat_templates/rag.jinja" in found.names()
    assert found.read("additional_chat_templates/rag.jinja") == b"{{ rag }}"
