"""The page's JavaScript outside a browser: its tests in node, and its numbers beside Python's."""

from __future__ import annotations

import json
import re

import pytest
from explore_page import PACKS, python_preview
from node_runner import ROOT, previews_on_page, run_node

from ipmerge_core.ui import app
from ipmerge_core.ui.web.component import component_script

PLANS = [
    {"s": 0.4, "lambda": 1, "similarity": "first", "variant": "sum", "overrides": {}},
    {"s": 0.2, "lambda": 8, "similarity": "max", "variant": "max", "overrides": {}},
    {"s": 0.05, "lambda": 0.125, "similarity": "weighted", "variant": "rescale_only"},
    {"s": 0.0, "lambda": 32, "similarity": "first", "variant": "select_only"},
    {
        "s": 0.9,
        "lambda": 2,
        "similarity": "first",
        "variant": "sum",
        "overrides": {"model.layers.1.mlp.down_proj.weight": "merge"},
    },
]
UI = ROOT / "ipmerge_core" / "ui"
SCRIPTS = {
    **{
        name: component_script(UI / name)
        for name in ("explore/layer_map/layer_map.js", "compare/compare.js", "run_list/run_list.js")
    },
    "page": f"({app.page_script()})()",
}
LAMBDAS = [0.03, 0.3, 0.7, 1.05, 3.14, 27.9]


def test_every_test_of_node_passes():
    done = run_node("--test", "--test-reporter=spec", "tests/js/**/*.test.js")
    assert done.returncode == 0, done.stdout
    ran = re.search(r"^ℹ pass (\d+)$", done.stdout, re.MULTILINE)
    assert ran
    assert int(ran[1]) > 100


@pytest.mark.parametrize("name", sorted(PACKS))
def test_the_page_previews_what_python_previews_to_the_last_bit(name: str):
    """Powers of two as gains only: then no product by lambda is rounded, in whatever order."""
    pack = PACKS[name]
    for plan, seen in zip(PLANS, previews_on_page(pack, PLANS), strict=True):
        expected = python_preview(pack, plan)
        assert tuple(seen["selected"]) == expected.selected
        changes = {int(layer): change for layer, change in seen["layer_change"].items()}
        assert changes == expected.layer_change
        for field in (
            *("n_matrices", "parameters_touched", "bytes_rewritten"),
            *("relative_change", "keep", "absorb"),
        ):
            assert seen[field] == getattr(expected, field), field


@pytest.mark.parametrize("name", sorted(PACKS))
def test_other_gains_differ_by_the_rounding_of_a_product_at_most(name: str):
    plans = [{**PLANS[0], "s": 0.25, "lambda": value} for value in LAMBDAS]
    for plan, seen in zip(plans, previews_on_page(PACKS[name], plans), strict=True):
        expected = python_preview(PACKS[name], plan)
        assert tuple(seen["selected"]) == expected.selected
        for field in ("relative_change", "keep", "absorb"):
            assert seen[field] == pytest.approx(getattr(expected, field), rel=1e-14), field


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_joined_scripts_are_javascript(script: str):
    """As Gradio runs them: a component's inside a function, the page's as one."""
    done = run_node("--eval", "new Function(fs.readFileSync(0, 'utf8'))", stdin=script)
    assert done.returncode == 0, done.stderr


def test_every_file_is_type_checked():
    configuration = json.loads((ROOT / "tsconfig.json").read_text(encoding="utf-8"))
    assert configuration["compilerOptions"]["strict"]
    files = sorted((ROOT / "ipmerge_core").rglob("*.js"))
    assert len(files) > 40
    unchecked = [
        str(path.relative_to(ROOT))
        for path in files
        if not path.read_text(encoding="utf-8").startswith("// @ts-check\n")
    ]
    assert not unchecked


def test_components_share_code_only_through_the_folder_for_that():
    ui = ROOT / "ipmerge_core" / "ui"
    wrong = []
    for path in sorted(set(ui.rglob("*.js")) - {ui / "page.js"}):  # which puts them together
        for source in re.findall(r' from "([^"]+)";\n', path.read_text("utf-8")):
            target = (path.parent / source).resolve()
            if target.parent not in {path.parent, ui / "web"}:
                wrong.append(f"{path.relative_to(ui)} imports {target.relative_to(ui)}")
    assert not wrong


def test_the_lock_file_pins_every_package_and_names_no_registry():
    packages = json.loads((ROOT / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    wanted = json.loads((ROOT / "package.json").read_text(encoding="utf-8"))["devDependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
    assert packages.pop("")["devDependencies"] == wanted
    for name, package in packages.items():
        assert package["integrity"].startswith("sha512-"), name
        assert "resolved" not in package, name
        assert package["dev"], f"{name} is no tool of development only"
