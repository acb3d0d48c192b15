"""The demo's scripts: what training shows is never asked again, and controls are equally large."""

import sys
from pathlib import Path

import pytest
import torch

from ipmerge_core.tasks.demo import TASKS, problems

DEMO = Path(__file__).parents[1] / "assets" / "demo"
sys.path.append(str(DEMO))  # scripts that import each other
import draws  # noqa: E402
import train  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402
from variants import Trio, norm, sized_as  # noqa: E402


@pytest.fixture(scope="module")
def trio():
    return Trio(DEMO)


# --- drawings ---


def test_training_shows_the_same_for_the_same_seed_in_three_stages():
    steps = list(draws.mllm_steps(4, (2, 3, 2)))
    assert steps == list(draws.mllm_steps(4, (2, 3, 2)))
    assert steps != list(draws.mllm_steps(5, (2, 3, 2)))
    assert [len(step.shown) for step in steps] == [96] * 2 + [48] * 3 + [38] * 2
    assert [len(step.replay) for step in steps] == [0] * 5 + [10] * 2
    assert {item.task for step in steps for item in step.shown} == set(TASKS)


def test_the_mllm_is_trained_on_the_drawings_that_are_left_out_of_evaluations(monkeypatch):
    shown, expected = [], [step.problems() for step in draws.mllm_steps(9, (1, 1, 1))]
    prepare = train.pixels

    def pixels(seen):
        shown.append(list(seen))
        return prepare(seen)

    monkeypatch.setattr(train, "pixels", pixels)
    base = LlamaForCausalLM.from_pretrained(DEMO / "base")
    train.train_mllm(base, 9, train.new_tokenizer(), (1, 1, 1))
    assert shown == expected


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("draw", draws.DRAWS)
def test_no_evaluation_shows_a_drawing_of_training(task, draw):
    n = draws.PER_TASK[draw]
    asked = draws.evaluation_problems([task], n, draw)
    assert len(asked) == n
    assert not {problem.marks for problem in asked} & draws.training_drawings()


def test_what_recurs_is_counted_and_the_next_of_the_stream_take_its_place():
    split, seed = draws.DRAWS["test"]
    left_out = draws.recurring("shape", 300, "test")
    plain = problems("shape", 300, seed, split)
    asked = draws.evaluation_problems(["shape"], 300, "test")
    assert left_out > 0
    assert asked[: 300 - left_out] == [p for p in plain if p in asked]


def test_only_drawings_without_handwriting_can_recur():
    glyphs = {task: [m.glyph for p in problems(task, 20) for m in p.marks] for task in TASKS}
    bare = {task for task, found in glyphs.items() if max(found) < 0}
    assert bare == set(draws.WITHOUT_HANDWRITING)


# --- controls ---


@pytest.mark.parametrize("kind", ["permuted", "random_direction"])
def test_a_control_changes_every_matrix_by_as_much_as_what_it_controls(trio, kind):
    merge = trio.variant("max", "ip_merging", lambda_=1.0, gamma_norm="max")
    merge = merge.only(set(list(merge.updates)[:5]), "max, five matrices")
    first, again, other = (getattr(trio, kind)(merge, seed) for seed in (0, 0, 1))
    assert list(first.updates) == list(merge.updates)
    for name, update in merge.updates.items():
        assert norm([first.updates[name]]) == pytest.approx(norm([update]), rel=1e-5)
        assert torch.equal(first.updates[name], again.updates[name])
        for different in (update, other.updates[name]):
            assert norm([first.updates[name] - different]) > 0.1 * norm([update])
    assert trio.relative_norm(first, 3.0) == pytest.approx(trio.relative_norm(merge, 3.0))


def test_nothing_scales_to_nothing():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(sized_as(zero, one), zero)
    assert torch.equal(sized_as(one, zero), zero)
