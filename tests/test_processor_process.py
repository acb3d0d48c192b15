"""Tokenizers and templates run in a process of their own, and what is hostile ends it alone."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from ipmerge_core.errors import ModelLoadError, RunCancelled
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.generation import stream_answer
from ipmerge_core.inference.loading import LoadedModel, load_model
from ipmerge_core.inference.processor_process import (
    Limits,
    ProcessorServer,
    RemoteProcessor,
    default_server,
)
from ipmerge_core.inference.prompts import Message

DEMO = Path(__file__).parents[1] / "assets" / "demo"
ASKED = [Message("user", "What is it?")]
ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}"
)
DOUBLED = (
    "{% set x = namespace(s='ab') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}"
)
TIGHT = Limits(memory=1 << 30, loading=30.0, encoding=1.0, patience=100.0)


@pytest.fixture
def own(tmp_path: Path):
    """A copy of the math model with another template."""

    def make(template: str) -> Path:
        folder = Path(shutil.copytree(DEMO / "math", tmp_path / "math"))
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


@pytest.mark.parametrize("name", ["mllm", "math"])
def test_it_encodes_and_decodes_as_in_this_process(name):
    takes_images = name == "mllm"
    here = ModelProcessor(DEMO / name, takes_images=takes_images)
    there = RemoteProcessor(DEMO / name, takes_images=takes_images)
    assert there.load() == here.special_ids
    image = Image.effect_noise((90, 40), 60) if takes_images else None
    messages = [
        Message("system", "Be brief, \ud800 </s>."),
        Message("user", "Is it?", () if image is None else (image,)),
    ]
    messages = [messages[0]._replace(text="Be brief, </s>."), messages[1]]
    expected, found = here.encode(messages), there.encode(messages)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
        assert found[key].dtype == value.dtype
    ids = expected["input_ids"][0].tolist()
    for skip in (True, False):
        text = there.decode(ids, skip_special_tokens=skip)
        assert text == here.decode(ids, skip_special_tokens=skip)
    assert there.encode_text("a </s> b") == here.encode_text("a </s> b")


def test_a_relative_folder_is_that_of_the_caller(tmp_path, monkeypatch):
    RemoteProcessor(DEMO / "math", takes_images=False).load()  # the server runs, elsewhere
    (tmp_path / "math").symlink_to(DEMO / "math")
    monkeypatch.chdir(tmp_path)
    processor = RemoteProcessor("math", takes_images=False)
    monkeypatch.chdir(tmp_path.parent)
    assert processor.decode(processor.encode_text("a b")) == "a b"


def test_an_error_is_the_sentence_of_this_process_and_the_process_stays(own):
    folder = own("{{ 1 / 0 }}")
    processor = RemoteProcessor(folder, takes_images=False)
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="template of 'math' .*ZeroDivisionError"):
            processor.encode(ASKED)
    assert processor.decode([5])
    with pytest.raises(ModelLoadError, match="cannot encode"):
        RemoteProcessor(DEMO / "math", takes_images=False).encode_text("\ud800")


def test_a_template_without_end_is_stopped_by_its_cpu_time(own):
    processor = RemoteProcessor(own(ENDLESS), takes_images=False, limits=TIGHT)
    processor.load()
    pid = processor._process._pid
    with pytest.raises(
        ModelLoadError, match="template or processor of 'math' was stopped after 1 s"
    ) as caught:
        processor.encode(ASKED)
    assert "chat_template.jinja" in str(caught.value)
    assert not psutil.pid_exists(pid)
    assert processor.decode([5])  # by another process


@pytest.mark.parametrize(
    "template", [DOUBLED, "{{ 'ab' * (2 ** 40) }}", "{{ 'a' | center(9**12) }}"]
)
def test_a_template_that_fills_the_memory_costs_at_most_the_limit(own, template):
    limits = TIGHT._replace(encoding=30.0)  # filling the memory takes CPU time, too
    processor = RemoteProcessor(own(template), takes_images=False, limits=limits)
    processor.load()
    before = psutil.Process().memory_info().rss
    with pytest.raises(ModelLoadError, match="of 'math' .*(MemoryError|more than 1 GiB)"):
        processor.encode(ASKED)
    assert psutil.Process().memory_info().rss - before < 100e6
    assert processor.decode([5])


def test_a_template_that_prints_very_much_is_refused(own):
    folder = own("{% for i in range(90000) %}a b {% endfor %}{{ messages[0].content }}")
    with pytest.raises(ModelLoadError, match="has .* tokens; the maximum is 32768"):
        RemoteProcessor(folder, takes_images=False).encode(ASKED)


def test_a_tokenizer_that_expands_a_text_is_stopped(own):
    folder = own("{{ messages[0].content }}")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    grow = [
        {"type": "Replace", "pattern": {"String": a}, "content": b * 40}
        for a, b in zip("tuvwxyz", "uvwxyzt", strict=True)
    ]
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": grow}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    processor = RemoteProcessor(folder, takes_images=False, limits=TIGHT)
    with pytest.raises(ModelLoadError, match="'math' was stopped"):
        processor.encode([Message("user", "t" * 50)])


def test_a_decoder_that_expands_tokens_is_refused(own):
    folder = own("{{ messages[0].content }}")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    grow = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 5000}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [grow]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelLoadError, match="decodes 2 tokens to .* characters"):
        RemoteProcessor(folder, takes_images=False).decode([40, 41])


def test_a_processor_is_collected_while_the_server_is_locked(own):
    """The garbage collector runs anywhere, as in the thread that starts another process."""
    server = ProcessorServer()
    processor = RemoteProcessor(own("{{ messages[0].content }}"), takes_images=False, server=server)
    processor.load()
    pid = processor._process._pid
    with server._lock:
        del processor
        gc.collect()
    other = RemoteProcessor(DEMO / "math", takes_images=False, server=server)
    other.load()
    assert not psutil.pid_exists(pid)
    other.close()
    server.close()


def test_stop_ends_a_template_that_runs(own):
    processor = RemoteProcessor(own(ENDLESS), takes_images=False, limits=Limits(encoding=1e6))
    processor.load()
    pid, stop = processor._process._pid, threading.Event()
    running = threading.Thread(target=lambda: (wait_for_cpu(pid), stop.set()))
    running.start()
    with pytest.raises(RunCancelled):
        processor.encode(ASKED, [stop])
    running.join()
    assert not psutil.pid_exists(pid)


def wait_for_cpu(pid: int) -> None:
    """Wait until a process computes."""
    started = sum(psutil.Process(pid).cpu_times()[:2])
    while sum(psutil.Process(pid).cpu_times()[:2]) < started + 0.05:
        time.sleep(0.01)


def test_stop_ends_a_template_while_a_model_is_asked(own):
    loaded = load_model(own(ENDLESS))
    pid, stop = loaded.processor._process._pid, threading.Event()
    running = threading.Thread(target=lambda: (wait_for_cpu(pid), stop.set()))
    running.start()
    with pytest.raises(RunCancelled):
        next(stream_answer(loaded, "What is it?", cancelled=stop))
    running.join()
    assert not psutil.pid_exists(pid)


def test_a_request_waits_for_another_and_can_be_stopped_meanwhile(own):
    processor = RemoteProcessor(own(ENDLESS), takes_images=False, limits=Limits(encoding=1e6))
    processor.load()
    first, second = threading.Event(), threading.Event()
    ended = []

    def ask() -> None:
        with pytest.raises(RunCancelled):
            processor.encode(ASKED, [first])
        ended.append("first")

    running = threading.Thread(target=ask)
    running.start()
    wait_for_cpu(processor._process._pid)
    second.set()
    with pytest.raises(RunCancelled):
        processor.decode([5], stops=[second])
    assert not ended
    first.set()
    running.join()


def test_a_process_that_was_killed_is_replaced(own):
    processor = RemoteProcessor(DEMO / "math", takes_images=False)
    text = processor.decode([5, 6])
    os.kill(processor._process._pid, 9)
    while processor._process.is_alive():
        time.sleep(0.01)
    assert processor.decode([5, 6]) == text


def test_the_process_of_a_model_ends_with_the_model():
    processor = RemoteProcessor(DEMO / "math", takes_images=False)
    processor.load()
    pid = processor._process._pid
    assert psutil.pid_exists(pid)
    del processor
    deadline = time.monotonic() + 30
    while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # until the next request
        assert time.monotonic() < deadline
        time.sleep(0.01)
    RemoteProcessor(DEMO / "math", takes_images=False).load()
    assert not psutil.pid_exists(pid)


def test_the_server_ends_all_and_the_next_request_starts_it_again(monkeypatch):
    server = default_server()
    processor = RemoteProcessor(DEMO / "math", takes_images=False)
    text = processor.decode([5, 6])
    pids = [processor._process._pid, server._child.pid]
    server.close()
    for pid in pids:
        deadline = time.monotonic() + 60
        while psutil.pid_exists(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not psutil.pid_exists(pid)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert processor.decode([5, 6]) == text
    assert "HF_TOKEN" not in psutil.Process(server._child.pid).environ()


def test_this_process_never_loads_a_tokenizer_or_renders_a_template(monkeypatch):
    import transformers

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("in this process")

    for name in ("AutoProcessor", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", fail)
    loaded = load_model(DEMO / "mllm")
    assert isinstance(loaded, LoadedModel)
    assert "".join(stream_answer(loaded, "What shape?", Image.new("RGB", (64, 64))))
