"""Evaluation tasks: their data in the data sets' own layout, faulty rows, draws, and names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
from benchmark_copies import picture, write_mathverse, write_mathvista, write_mmmu, write_split

from ipmerge_core.errors import RunError
from ipmerge_core.tasks.demo import problems
from ipmerge_core.tasks.items import MOST_ITEMS, Draw, Item
from ipmerge_core.tasks.judging import judge
from ipmerge_core.tasks.registry import find_task, find_tasks, missing_guards

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dill and multiprocess


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("copies")
    writers = {"mathvista": write_mathvista, "mathverse": write_mathverse, "mmmu": write_mmmu}
    return {name: write(folder / name) for name, write in writers.items()}


def jsonl(folder: Path, *entries: object) -> str:
    path = folder / "task.jsonl"
    lines = [each if isinstance(each, str) else json.dumps(each) for each in entries]
    path.write_text("\n".join(lines) + "\n")
    return f"jsonl:{path}"


# --- names and guards --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["demo:math", "mathvista:math", "mathverse", "mathverse:text_lite"]
)
def test_a_math_task_brings_its_perception_guard(name: str) -> None:
    found = find_tasks([name])
    assert [task.group for task in found] == ["math", "perception"]
    assert not missing_guards(found)
    (alone,) = find_tasks([name], guards=False)
    assert missing_guards([alone]) == [found[1].name]


def test_a_whole_task_is_the_guard_of_its_part() -> None:
    assert [task.name for task in find_tasks(["demo,demo:math"])] == ["demo", "demo:math"]
    tasks = find_tasks(["mathvista", "mathverse"])
    assert [task.name for task in tasks] == ["mathvista", "mathverse"]


def test_the_guard_of_a_copy_is_in_the_copy() -> None:
    assert [task.name for task in find_tasks(["mathvista:math@copies/m"])] == [
        "mathvista:math@copies/m",
        "mathvista:general@copies/m",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dem", "Did you mean 'demo'"),
        ("", "No task is given"),
        (",", "No task is given"),
        ("demo:cooking", "has no part 'cooking'"),
        ("demo@/x", "Unknown task"),
        ("mathvista:cooking", "Expected 'mathvista', or 'mathvista:' and one of math, general"),
        ("mathverse:x", "one of text_dominant"),
        ("mmmu:Art", "has no part 'Art'"),
        ("MIA-Bench", "another harness.* --tasks mia_bench"),
        ("cmmmu", "another harness.* --tasks cmmmu_val"),
        ("jsonl:", "names no data"),
        ("jsonl:/nowhere/x.jsonl", "Cannot read the task"),
        ("jsonl:/", "it is a folder"),
    ],
)
def test_an_unknown_task_is_named(name: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        find_tasks([name])


# --- draws -------------------------------------------------------------------------------------


def test_a_larger_draw_contains_the_smaller_one() -> None:
    rows = list(range(100))
    small, large = (Draw(n, seed=3).select(rows, [str(r) for r in rows]) for n in (10, 40))
    assert len(small) == 10
    assert set(small) < set(large)
    assert small == sorted(small)
    assert small != Draw(10, seed=4).select(rows, [str(r) for r in rows])
    assert Draw().select(rows, []) == rows == Draw(100).select(rows, [])


@pytest.mark.parametrize("limit", [0, -1, MOST_ITEMS + 1, 10**12])
def test_a_limit_out_of_range_is_refused(limit: int) -> None:
    with pytest.raises(RunError, match=f"limit is {limit} items"):
        Draw(limit)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(RunError, match="seed is"):
        Draw(1, seed)


# --- the demo ----------------------------------------------------------------------------------


def test_the_demo_task_has_the_problems_of_its_streams() -> None:
    found = find_task("demo:math").load(Draw(3, seed=5))
    assert len(found.items) == 15
    assert found.total is None
    wanted = problems("area", 3, seed=5)
    items = [item for item in found.items if item.skill == "area"]
    assert [item.answer for item in items] == [problem.answer for problem in wanted]
    assert items[0].pictures[0].source().tobytes() == wanted[0].image.tobytes()
    assert len({item.key() for item in found.items}) == 15


def test_the_key_of_an_item_is_what_a_model_sees() -> None:
    items = find_task("demo:shape").load(Draw(2)).items
    first = items[0]
    assert first.key() != items[1].key()
    assert first.key() == find_task("demo").load(Draw(1)).items[7].key()
    other = Item("x", first.question, ("other",), pictures=first.pictures)
    assert other.key() == first.key()


# --- public benchmarks, in the layout of their data sets -----------------------------------------


def test_mathvista_has_its_prompts_kinds_and_categories(copies: dict[str, Path]) -> None:
    found = find_task(f"mathvista@{copies['mathvista']}").load(Draw())
    kinds = {item.id: item.kind for item in found.items}
    assert kinds == {
        "1": "number", "2": "number", "3": "list", "4": "choice", "5": "number", "8": "number",
        "9": "number",
    }  # fmt: skip
    assert {fault.id: fault.reason for fault in found.faults} == {
        "6": "The reference 'green' is none of its 2 choices.",
        "7": "The row has no reference answer.",
    }
    by_id = {item.id: item for item in found.items}
    assert by_id["4"].answer == "B"
    assert by_id["2"].precision == 1
    assert by_id["1"].question.startswith("Hint: give a value.\nQuestion:")
    assert by_id["1"].pictures[0].source().read().startswith(b"\x89PNG")
    assert by_id["9"].pictures == ()
    assert found.total == 9
    math = find_task(f"mathvista:math@{copies['mathvista']}").load(Draw())
    general = find_task(f"mathvista:general@{copies['mathvista']}").load(Draw())
    assert {item.group for item in math.items} == {"math"}
    assert {item.group for item in general.items} == {"perception"}
    assert len(math.items) + len(general.items) == len(found.items)
    parts = {item.key() for item in (*math.items, *general.items)}
    assert parts == {item.key() for item in found.items}


def test_mathverse_has_five_versions(copies: dict[str, Path]) -> None:
    whole = find_task(f"mathverse@{copies['mathverse']}").load(Draw())
    assert len(whole.items) == whole.total == 15
    assert len({item.skill for item in whole.items}) == 5
    part = find_task(f"mathverse:vision_only@{copies['mathverse']}").load(Draw())
    assert [item.kind for item in part.items] == ["choice", "number", "text"]
    assert part.items[0].choices == ("60", "70", "80")
    assert judge(part.items[0], "The angle is 70.").outcome == "right"
    assert judge(part.items[2], "$y = 2x$").outcome == "right"


def test_mmmu_has_options_subjects_and_several_pictures(copies: dict[str, Path]) -> None:
    found = find_task(f"mmmu@{copies['mmmu']}").load(Draw())
    by_id = {item.id: item for item in found.items}
    choice = by_id["validation_Accounting_1"]
    assert choice.question == (
        "Which is it in <image 1>?\nA. red\nB. blue\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert by_id["validation_Accounting_2"].kind == "number"
    art = by_id["validation_Art_Theory_1"]
    assert (art.skill, art.answers, art.kind) == ("Art Theory", ("Monet", "Claude Monet"), "text")
    assert judge(art, "It is Claude Monet.").outcome == "right"
    assert len(by_id["validation_Math_1"].pictures) == 2
    assert {fault.id for fault in found.faults} == {"validation_Math_2", "validation_Math_3"}


@pytest.mark.parametrize("name", ["mathvista", "mathverse", "mmmu"])
def test_a_limit_draws_items_of_a_benchmark(name: str, copies: dict[str, Path]) -> None:
    found = find_task(f"{name}@{copies[name]}").load(Draw(2, seed=1))
    assert len(found.items) + len(found.faults) == 2


@pytest.mark.parametrize("name", ["mathvista", "mathverse", "mmmu", "datasets:org/none"])
def test_without_a_network_the_data_set_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no request is retried
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(RunError, match=r"Cannot read the dataset '.+' \(.+Is there a network"):
        find_task(name).load(Draw())


def test_without_the_library_its_installation_is_proposed(
    copies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RunError, match="pip install datasets"):
        find_task(f"mmmu@{copies['mmmu']}").load(Draw())


# --- own data ----------------------------------------------------------------------------------


def test_own_lines_are_items_of_the_kind_that_their_references_show(tmp_path: Path) -> None:
    name = jsonl(
        tmp_path,
        {"question": "6*7?", "answer": 42},
        {"question": "Parallel?", "answer": "yes"},
        {"question": "Parallel?", "answer": "no", "id": "negative"},
        {"question": "Which?", "answer": "blue", "choices": ["red", "blue"]},
        {"question": "Which one?", "answer": "A", "choices": ["red", "blue"]},
        {"question": "Sides?", "answer": "[3, 4]"},
        {"question": "Shape?", "answer": ["square", "rectangle"], "group": "perception"},
        {"question": "Time?", "answer": "14:30"},
        {"question": "Length?", "answer": "1.5 cm", "kind": "number", "skill": "read"},
    )
    found = find_task(name).load(Draw())
    assert not found.faults
    assert [item.kind for item in found.items] == [
        "number", "yes_no", "yes_no", "choice", "choice", "list", "text", "text", "number",
    ]  # fmt: skip
    assert [item.answer for item in found.items][3:5] == ["B", "A"]
    assert judge(found.items[6], "rectangle").outcome == "right"
    assert found.items[3].question.startswith("Which?\n(A) red\n(B) blue\nAnswer with")
    assert found.items[2].id == "negative"


def test_a_faulty_line_does_not_stop_the_others(tmp_path: Path) -> None:
    name = jsonl(
        tmp_path,
        {"question": "1+1?", "answer": "2"},
        "not json",
        {"answer": "2"},
        {"question": "no answer?"},
        {"question": "empty?", "answer": ""},
        {"question": "  ", "answer": "2"},
        {"question": "?", "answer": "green", "choices": ["red", "blue"]},
        {"question": "?", "answer": "2", "kind": "cooking"},
        {"question": "?", "answer": "2", "group": "cooking"},
        {"question": "?", "answer": {"a": 1}},
        {"question": "again?", "answer": "2", "id": "line 1"},
        {"question": "2+2?", "answer": "4", "image": "none.png"},
    )
    found = find_task(name).load(Draw())
    assert [item.id for item in found.items] == ["line 1", "line 12"]
    assert [fault.id for fault in found.faults] == [f"line {n}" for n in range(2, 12)]
    with pytest.raises(RunError, match=r"Cannot read the picture .+none\.png"):
        found.items[1].key()


def test_a_data_set_of_any_columns_is_a_task(tmp_path: Path) -> None:
    rows = [
        {"problem": "1+1?", "solution": "2", "images": [picture()], "choices": None},
        {"problem": "Which?", "solution": "blue", "images": [], "choices": ["red", "blue"]},
        {"problem": "", "solution": "2", "images": [], "choices": None},
        {"problem": "?", "solution": None, "images": [], "choices": None},
    ]
    folder = write_split(tmp_path / "own", rows, "test")
    found = find_task(f"datasets:{folder}:test").load(Draw())
    assert [item.kind for item in found.items] == ["number", "choice"]
    assert len(found.items[0].pictures) == 1
    assert [fault.reason for fault in found.faults] == [
        "The question is empty.",
        "There is no reference answer.",
    ]
    other = write_split(tmp_path / "other", [{"text": "x"}], "train")
    with pytest.raises(RunError, match="has the columns text"):
        find_task(f"datasets:{other}").load(Draw())
