"""The shape annotations of the mathematical modules: checked in the tests marked `shapes` alone."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import MATHEMATICAL
from jaxtyping import TypeCheckError

from ipmerge_core.methods import selection
from ipmerge_core.spectral import similarity, spectrum

TESTS = Path(__file__).parent
ROW, SQUARE = torch.ones(4), torch.ones(4, 4)


def modules() -> list[ModuleType]:
    """The mathematical modules, those inside of packages included."""
    found = [importlib.import_module(f"ipmerge_core.{name}") for name in MATHEMATICAL]
    inside = [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for package in found
        for info in pkgutil.iter_modules(getattr(package, "__path__", []))
    ]
    return found + inside


WRONG = {
    "a vector for a matrix": lambda: spectrum.task_vector(ROW, ROW),
    "a matrix for a vector": lambda: similarity.top_k_importance(SQUARE, 2),
    "integers for floats": lambda: selection.keep_largest_(torch.ones(3, 3, dtype=torch.int64), 2),
    "unequal matrices": lambda: spectrum.noise_floor(SQUARE, torch.ones(4, 5)),
    "factors of unequal rank": lambda: spectrum.Spectrum(SQUARE, torch.ones(3), SQUARE),
    "a text for a number": lambda: selection.zero_below(SQUARE, "0.5"),
}


@pytest.mark.shapes
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_shape_or_type_raises_under_the_mark(wrong):
    with pytest.raises(TypeCheckError):
        wrong()


def test_without_the_mark_nothing_is_checked():
    found = spectrum.Spectrum(SQUARE, torch.ones(3), SQUARE)
    assert found.S.shape == (3,)


def test_every_annotated_function_of_a_mathematical_module_is_checked():
    plain = [
        f"{module.__name__}.{name}"
        for module in modules()
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not hasattr(function, "__wrapped__")
    ]
    assert not plain


def test_the_tests_of_a_mathematical_module_have_the_mark():
    names = "|".join(module.__name__.rpartition(".")[2] for module in modules())
    named = re.compile(rf"test_({names})(_|$)")
    files = [path for path in TESTS.glob("test_*.py") if named.match(path.stem)]
    marked = re.compile(r"^pytestmark = pytest\.mark\.shapes$", re.MULTILINE)
    assert len(files) > len(MATHEMATICAL)
    assert not [path.name for path in files if not marked.search(path.read_text("utf-8"))]
