"""The snippets of the API & cite tab: they run, and give the plan they were written for."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_fixtures import free_port, serving
from playwright.sync_api import Page, expect

from ipmerge_core.cli import main
from ipmerge_core.planning.plan import MergePlan, make_plan
from ipmerge_core.ui.chosen_merge import ChosenMerge, Recipe
from ipmerge_core.ui.cite.snippets import Snippets, bibtex_of, page_address, snippets_of
from ipmerge_core.ui.method_choice import MethodChoice
from ipmerge_core.ui.pairs import load_pack
from ipmerge_core.ui.plan_choice import PlanChoice, analysis_of, plan_of

ROOT = Path(__file__).parents[1]
NAMES = [record["name"] for record in load_pack("pack")["records"]]
CHOICES = {
    "by hand": PlanChoice(
        0.3, 0.125, "max", "max", {NAMES[0]: "keep", NAMES[1]: "merge", NAMES[-1]: "merge"}
    ),
    "ablation": PlanChoice(0.0, 4.0, "weighted", "rescale_only"),
}
OPTIONS = {"include": "mlp|q_proj", "layer_gains": "0 0.3333333333 1"}
MERGES = {
    **{name: ChosenMerge("pack", choice) for name, choice in CHOICES.items()},
    "options": ChosenMerge("pack", PlanChoice(0.1), MethodChoice(options=OPTIONS)),
    "ties": ChosenMerge(
        "pack",
        PlanChoice(),
        MethodChoice("ties", {"density": 0.3333333333, "math_density": None}, {"exclude": "down"}),
    ),
    "dare": ChosenMerge(
        "pack", PlanChoice(), MethodChoice("dare_linear", {"seed": 7, "rescale": "l1"})
    ),
    "top directions": ChosenMerge(
        "pack", PlanChoice(0.25, 2.5), MethodChoice(values={"projector": "top_k", "top_k": 4})
    ),
    "large": ChosenMerge(  # of a finished merge: Explore has no such factor
        "pack",
        PlanChoice(),
        MethodChoice("ip_merging", {"lambda_": 40.0, "similarity_threshold": 0.25}),
    ),
    "rules": ChosenMerge(  # of a finished merge
        "pack",
        made=Recipe(
            PlanChoice(overrides={NAMES[0]: "keep"}), MethodChoice("ties", {"density": 0.5})
        ),
    ),
}


@pytest.fixture(params=MERGES.values(), ids=list(MERGES))
def chosen(request: pytest.FixtureRequest) -> ChosenMerge:
    return request.param


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the real app, with a home folder of its own."""
    home = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPMERGE_HOME", str(home))
        with serving(home / "log", "app.py", port=free_port()) as url:
            yield url


def run(folder: Path, *command: str) -> str:
    """Run a program in `folder`, with `ipmerge` and the package where an installation puts them."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "ipmerge").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ipmerge_core "$@"\n')
    (tools / "ipmerge").chmod(0o755)
    paths = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Run the test in a folder that looks like the repository's, as the texts say."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_snippet_makes_the_same_plan(in_repository: Path, chosen: ChosenMerge, capsys):
    text, merging, _ = snippets_of(chosen, "http://127.0.0.1:1").python.partition("merge(plan")
    assert merging
    exec(text, {})
    expected = chosen.make_plan().hash
    assert capsys.readouterr().out.split()[0] == expected
    assert MergePlan.load(in_repository / "plan.json").hash == expected


def test_the_command_line_snippet_makes_the_same_plan(in_repository: Path, chosen: ChosenMerge):
    text = snippets_of(chosen, "http://127.0.0.1:1").shell
    words = shlex.split(text.partition("\nipmerge merge")[0].replace("\\\n", ""), comments=True)
    assert words[0] == "ipmerge"
    assert main(words[1:]) == 0
    assert MergePlan.load(in_repository / "plan.json").hash == chosen.make_plan().hash


@pytest.mark.parametrize("name", ["by hand", "ties"])
def test_the_snippets_run_to_the_merged_model(in_repository: Path, name: str):
    texts = snippets_of(MERGES[name], "http://127.0.0.1:1")
    if name == "ties":
        run(in_repository, "bash", "-ec", texts.shell)
    else:
        run(in_repository, sys.executable, "-c", texts.python)
    assert list((in_repository / "merged-model").glob("*.safetensors"))


@pytest.mark.parametrize("name", [name for name in MERGES if name != "large"])
def test_the_client_and_curl_snippets_get_the_same_plan_from_the_app(
    tmp_path: Path, served: str, name: str
):
    expected = MERGES[name].make_plan().hash
    texts = snippets_of(MERGES[name], served)
    assert run(tmp_path, sys.executable, "-c", texts.client).splitlines()[-1].startswith(expected)
    assert f'"hash": "{expected}"' in run(tmp_path, "bash", "-ec", texts.curl)


def test_the_json_holds_the_arguments_of_make_plan(chosen: ChosenMerge):
    content = json.loads(snippets_of(chosen, "http://127.0.0.1:1").json)
    made = make_plan(analysis_of("pack"), **content["arguments"])
    assert made.digest == chosen.make_plan().digest
    if chosen.map_plan is not None:
        assert content["plan"] == chosen.map_plan.to_browser()
    assert content["pair"]["id"] == "pack"
    assert content["pair"]["parameters"] == load_pack("pack")["parameters"]


def test_the_bibtex_names_the_authors_and_the_models_on_the_hub_but_no_local_folder():
    entry = {"id": "Qwen/Qwen2-7B_x", "revision": "abc", "fingerprint": "f"}
    local = {"id": "/models/mine", "revision": None, "fingerprint": "f"}
    text = bibtex_of({"sources": {"mllm": entry, "base": entry, "math": [local]}})
    assert (
        "Hu, Yijie and Zhou, Zihao and Huang, Kaizhu and Huang, Xiaowei and Wang, Qiufeng"
        in " ".join(text.split())
    )
    assert text.count("https://huggingface.co/Qwen/Qwen2-7B_x") == 1
    assert r"title         = {Qwen/Qwen2-7B\_x}" in text
    assert "/home" not in text
    assert text.count("{") == text.count("}")


def test_a_space_shows_its_own_address_and_no_folder_of_the_server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPACE_ID", "someone/ipmerge")
    monkeypatch.setenv("SPACE_HOST", "someone-ipmerge.hf.space")
    texts = snippets_of(ChosenMerge("pack"), page_address("https://huggingface.co/"))
    assert str(ROOT) not in "".join(texts)
    assert "assets/demo/pack.json.gz" in texts.python
    assert "Client('someone/ipmerge')" in texts.client
    assert "https://someone-ipmerge.hf.space/gradio_api/call/preview" in texts.curl


def test_no_text_has_an_absolute_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    home = tmp_path / "someone"
    monkeypatch.setenv("HOME", str(home))
    for place, shown in ((home / "ipmerge", "~/ipmerge/packs/mine.pack.json.gz"),
                         (tmp_path / "data", "mine.pack.json.gz")):  # fmt: skip
        monkeypatch.setenv("IPMERGE_HOME", str(place))
        (place / "packs").mkdir(parents=True)
        analysis_of("pack").save(place / "packs" / "mine.pack.json.gz")
        how = MethodChoice("regmean", calibration=str(place / "calibrations" / "of mine"))
        for method in (MethodChoice(), how):
            texts = snippets_of(
                ChosenMerge("packs-mine", PlanChoice(), method), "http://127.0.0.1:1"
            )
            assert str(tmp_path) not in "".join(texts)
            assert shown in texts.shell
            assert shown in texts.python
            assert ("calibrations/of mine" in texts.shell) == (
                place.parent == home and method == how
            )


@pytest.mark.parametrize("referer", ["", "javascript:alert(1)", "file:///etc/passwd"])
def test_a_strange_referer_gives_the_usual_address(referer: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SPACE_HOST", raising=False)
    assert page_address(referer) == "http://127.0.0.1:7860"


@pytest.mark.browser
def test_the_tab_shows_the_plan_that_explore_holds(chromium_page: Page, served: str):
    page = chromium_page
    page.goto(f"{served}/?v=1&pack=pack&s=0.125&l=2&u=max")
    page.wait_for_selector("#layer-map [role=gridcell] button[aria-label]")
    page.get_by_role("tab", name="API & cite").click()
    choice = PlanChoice(0.125, 2.0, "first", "max")
    expect(page.locator("#cite-hash")).to_contain_text(plan_of("pack", choice).hash)
    expected = snippets_of(ChosenMerge("pack", choice, by="explore"), served)
    for name in Snippets._fields:
        shown = "".join(page.locator(f"#cite-{name} .cm-content").inner_text().split())
        wanted = "".join(getattr(expected, name).split())
        assert wanted.startswith(shown)  # the editor draws a long text only as far as it is seen
        assert len(shown) > 100
    expect(page.locator("#snippets button[aria-label*='opy']")).to_have_count(6)
