"""Streams are used again, and only a GPU has them; what runs in them is tested in `test_gpu.py`."""

from __future__ import annotations

from collections import defaultdict, deque
from contextlib import nullcontext

import pytest
import torch

from ipmerge_core.runtime import devices


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices for which a stream was made, without a GPU."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda where: made.append(where) or len(made))
    monkeypatch.setattr(torch.cuda, "stream", lambda own: nullcontext())
    monkeypatch.setattr(devices, "_idle", defaultdict(deque))
    return made


def test_a_stream_that_was_left_is_entered_again(made: list[torch.device]) -> None:
    for _ in range(5):
        with devices.stream("cuda:0"):
            pass
    assert made == [torch.device("cuda:0")]


def test_two_at_once_have_a_stream_each_and_so_has_each_device(made: list[torch.device]) -> None:
    for _ in range(2):
        with devices.stream("cuda:0"), devices.stream("cuda:0"), devices.stream("cuda:1"):
            pass
    assert made == [torch.device(name) for name in ("cuda:0", "cuda:0", "cuda:1")]


def test_a_stream_is_given_back_after_an_error(made: list[torch.device]) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError), devices.stream("cuda:0"):
            raise RuntimeError
    assert len(made) == 1


def test_a_cpu_has_none(made: list[torch.device]) -> None:
    with devices.stream("cpu"):
        assert not made
    assert devices.streams("cpu", working_set=10**18) == 1
