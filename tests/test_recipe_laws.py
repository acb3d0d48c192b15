"""Any plan of a method that mergekit has: what goes out as a recipe comes back as the same merge.

Methods, parameters, options and sources are drawn from their own declarations. A plan that a
recipe cannot express is refused by an error that names the setting; every other one is imported
again and merges two matrices of the first and the last layer to the same values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_adapters import make_adapter

import ipmerge_core as ipm
from ipmerge_core.cli import main
from ipmerge_core.errors import PlanError
from ipmerge_core.merging.parts import merging_of, on_one_base
from ipmerge_core.methods import METHODS, Parameter
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.planning.mergekit import WRITERS, export_recipe
from ipmerge_core.planning.mergekit_import import import_recipe
from ipmerge_core.planning.options import OPTIONS
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.planning.scope import method_anchor

SIXTEENTHS = st.integers(1, 15).map(lambda n: n / 16)  # exact in binary and as decimal text
FAST = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


def values_of(parameter: Parameter) -> st.SearchStrategy[Any]:
    if parameter.kind == "choice":
        return st.sampled_from(parameter.choices)
    if parameter.kind == "bool":
        return st.booleans()
    if parameter.kind == "int":
        return st.integers(0, 3)
    return st.none() | SIXTEENTHS if parameter.optional else SIXTEENTHS


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    method = METHODS[draw(st.sampled_from(sorted(WRITERS)))]
    chosen: dict[str, Any] = {"method": method.name}
    for parameter in method.parameters:
        if draw(st.booleans()):
            chosen[parameter.name] = draw(values_of(parameter))
    if draw(st.integers(0, 3)) == 0:
        chosen["layer_gains"] = tuple(draw(st.lists(SIXTEENTHS, min_size=1, max_size=3)))
    if draw(st.integers(0, 3)) == 0:
        chosen["anchor"] = draw(st.sampled_from(tuple(OPTIONS["anchor"].choices)))
    if draw(st.integers(0, 7)) == 0:
        chosen["norms"] = "merge"
    return chosen


def merged(plan: MergePlan, pair: ModelPair, number: int) -> torch.Tensor:
    matrix, method = pair.matrices[number], METHODS[plan.method]
    weights = pair.read(matrix)
    models = on_one_base(weights, torch.device("cpu"), method_anchor(method, plan.anchor))
    return merging_of(method, matrix, models, **plan.parameters_for(matrix.layer))


def names_one(choice: dict[str, Any], sentence: str) -> bool:
    words = sentence.replace("per layer", "layer_gains").replace("1 / density", "rescale")
    words = words.replace("layer gains", "layer_gains")
    return any(name in words for name in (*choice, "rescale"))


@pytest.fixture(scope="module")
def pair(trio: Trio) -> ModelPair:
    return ipm.open_pair(trio.mllm, trio.math, trio.base)


def test_a_recipe_merges_what_its_plan_merges_or_is_refused_by_name(pair: ModelPair) -> None:
    counted: Counter[str] = Counter()

    @FAST
    @given(choices())
    def law(choice: dict[str, Any]) -> None:
        try:
            plan = ipm.make_plan(pair, **choice)
        except PlanError:
            return
        try:
            text = export_recipe(plan)
        except PlanError as error:
            unnamed = None if names_one(choice, str(error)) else (choice, str(error))
            assert unnamed is None
            return
        recipe = import_recipe(text)
        assert (recipe.mllm, *recipe.math) == tuple(s.location for s in plan.sources.merged())
        again = ipm.make_plan(pair, **recipe.arguments)
        assert [d.experts for d in again.decisions] == [d.experts for d in plan.decisions]
        for number in (0, len(pair.matrices) - 1):
            expected = merged(plan, pair, number)
            torch.testing.assert_close(merged(again, pair, number), expected, rtol=1e-5, atol=1e-6)
        counted[plan.method] += 1

    law()
    assert sum(counted.values()) >= 10, counted


def test_pinned_revisions_are_kept(pair: ModelPair) -> None:
    plan = ipm.make_plan(pair, "ties")
    sources = plan.sources
    pinned = replace(
        plan,
        sources=replace(
            sources,
            mllm=replace(sources.mllm, id="org/host", revision="a" * 40),
            base=replace(sources.base, id="org/base", revision="b" * 40),
            math=tuple(replace(s, id="org/math", revision="c" * 40) for s in sources.math),
        ),
    )
    recipe = import_recipe(export_recipe(pinned))
    assert recipe.mllm == "org/host@" + "a" * 40
    assert recipe.math == ["org/math@" + "c" * 40]
    assert recipe.base == "org/base@" + "b" * 40


@pytest.mark.parametrize("folder", ["/models/me@home/mllm", "/models/a+b"])
def test_a_path_that_mergekit_reads_otherwise_is_refused(folder: str, pair: ModelPair) -> None:
    plan = ipm.make_plan(pair, "ties")
    moved = replace(plan.sources, mllm=replace(plan.sources.mllm, id=folder))
    with pytest.raises(PlanError, match="mergekit cannot read the path"):
        export_recipe(replace(plan, sources=moved))


RANDOM = [m for m in WRITERS if any(p.name == "seed" for p in METHODS[m].parameters)]


@pytest.mark.parametrize("method", RANDOM)
def test_a_seed_is_refused_and_random_drops_are_described(method: str, pair: ModelPair) -> None:
    rescale = {"rescale": "l1"}
    with pytest.raises(PlanError, match="has no seed=7"):
        export_recipe(ipm.make_plan(pair, method, seed=7, **rescale))
    text = export_recipe(ipm.make_plan(pair, method, **rescale))
    assert "--random-seed" in text.split("merge_method")[0]


RECIPE = """
merge_method: task_arithmetic
base_model: org/base
models: [{model: org/host, parameters: {weight: 1}}, {model: org/math, parameters: {weight: 0.5}}]
"""


@pytest.mark.parametrize(
    ("dtypes", "words"),
    [
        ({}, []),
        ({"dtype": "float32"}, []),
        ({"dtype": "bfloat16"}, ["computes in bfloat16", "writes bfloat16"]),
        ({"dtype": "float32", "out_dtype": "float16"}, ["writes float16"]),
        ({"dtype": "float16", "out_dtype": "float32"}, ["computes in float16", "writes float32"]),
    ],
)
def test_dtypes_of_a_recipe_are_described(dtypes: dict[str, str], words: list[str]) -> None:
    notes = import_recipe(RECIPE + yaml.safe_dump(dtypes) if dtypes else RECIPE).notes
    assert len(notes) == len(words)
    for note, word in zip(notes, words, strict=True):
        assert word in note


@pytest.mark.parametrize(
    ("dtypes", "named"),
    [
        ("dtype: int4", "'dtype' is 'int4'"),
        ("out_dtype: [a]", "'out_dtype' is ['a']"),
        ("dtype: 16", "'dtype' is 16"),
        ("dtype: ''", "'dtype' is ''"),
    ],
)
def test_unknown_dtypes_are_refused(dtypes: str, named: str) -> None:
    with pytest.raises(PlanError) as refused:
        import_recipe(RECIPE + dtypes)
    assert f"{named}; expected 'float32', 'float16', 'bfloat16' or 'float64'" in str(refused.value)


GRADED = "{{merge_method: linear, models: [{{model: a/v, parameters: {{weight: {}}}}}, {{model: b/m, parameters: {{weight: {}}}}}], parameters: {{normalize: {}}}}}"  # noqa: E501


@pytest.mark.parametrize(
    ("host", "expert", "normalize", "gains"),
    [
        ([1.0, 0.5], [0.0, 0.5], True, (0.0, 0.5)),
        ([2.0, 1.0], [0.0, 1.0], True, (0.0, 0.5)),
        ([1.0, 0.5], [0.0, 0.5], False, (0.0, 0.5)),
    ],
)
def test_a_graded_average_is_read(host: Any, expert: Any, normalize: bool, gains: Any) -> None:
    recipe = import_recipe(GRADED.format(host, expert, str(normalize).lower()))
    assert recipe.arguments["layer_gains"] == pytest.approx(gains)
    assert recipe.arguments["alpha"] == 0.0


@pytest.mark.parametrize(("host", "expert"), [([1, 0.5], [0, 0.4]), ([1, 1, 1], [0, 0]), ([1], 0)])
def test_other_weights_per_layer_are_refused(host: Any, expert: Any) -> None:
    with pytest.raises(PlanError, match="do not sum to the same value in every layer"):
        import_recipe(GRADED.format(host, expert, "true"))


def test_the_command_line_describes_what_a_merge_does_otherwise(
    pair: ModelPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = export_recipe(ipm.make_plan(pair, "task_arithmetic")).replace("float32", "bfloat16")
    (tmp_path / "recipe.yaml").write_text(text)
    words = ["plan", "--recipe", str(tmp_path / "recipe.yaml"), "--quiet"]
    assert main([*words, "-o", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr()
    assert "The recipe computes in bfloat16; the merge computes in float32." in printed.err
    assert "keeps the dtype of every tensor" in printed.err


def test_a_recipe_of_two_experts_is_read_back(trio: Trio) -> None:
    """Models with equal parameters are written out: aliases are refused when a recipe is read."""
    pair = ipm.open_pair(trio.mllm, [trio.math, trio.math_2], trio.base)
    text = export_recipe(ipm.make_plan(pair, "ties"))
    assert len(import_recipe(text).math) == 2


def test_a_recipe_of_an_adapter_is_refused(trio: Trio, tmp_path: Path) -> None:
    make_adapter(trio.base, tmp_path / "adapter")
    pair = ipm.open_pair(trio.mllm, tmp_path / "adapter", trio.base)
    with pytest.raises(PlanError, match="adapter' is a LoRA adapter"):
        export_recipe(ipm.make_plan(pair, "ties"))
