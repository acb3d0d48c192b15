"""The snippets of the API & cite tab: they run, and give the plan they were written for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_fixtures import free_port, serving
from playwright.sync_api import Page, expect

from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.ui.cite.snippets import Snippets, bibtex_of, page_address, snippets_of
from ipmerge_core.ui.pairs import load_pack
from ipmerge_core.ui.plan_choice import PlanChoice, plan_of

ROOT = Path(__file__).parents[1]
NAMES = [record["name"] for record in load_pack("pack")["records"]]
CHOICES = {
    "by hand": PlanChoice(
        0.3, 0.125, "max", "max", {NAMES[0]: "keep", NAMES[1]: "merge", NAMES[-1]: "merge"}
    ),
    "ablation": PlanChoice(0.0, 4.0, "weighted", "rescale_only"),
}


@pytest.fixture(params=CHOICES.values(), ids=list(CHOICES))
def choice(request: pytest.FixtureRequest) -> PlanChoice:
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


def test_the_python_snippet_makes_and_merges_the_same_plan(tmp_path: Path, choice: PlanChoice):
    expected = plan_of("pack", choice).hash
    printed = run(
        tmp_path, sys.executable, "-c", snippets_of("pack", choice, "http://127.0.0.1:1").python
    )
    assert printed.split()[0] == expected
    assert MergePlan.load(tmp_path / "plan.json").hash == expected
    assert list((tmp_path / "merged-model").glob("*.safetensors"))


def test_the_command_line_snippet_makes_and_merges_the_same_plan(
    tmp_path: Path, choice: PlanChoice
):
    run(tmp_path, "bash", "-ec", snippets_of("pack", choice, "http://127.0.0.1:1").shell)
    assert MergePlan.load(tmp_path / "plan.json").hash == plan_of("pack", choice).hash
    assert list((tmp_path / "merged-model").glob("*.safetensors"))


def test_the_client_and_curl_snippets_get_the_same_plan_from_the_app(tmp_path: Path, served: str):
    choice = CHOICES["by hand"]
    expected = plan_of("pack", choice).hash
    texts = snippets_of("pack", choice, served)
    assert run(tmp_path, sys.executable, "-c", texts.client).splitlines()[-1].startswith(expected)
    assert f'"hash": "{expected}"' in run(tmp_path, "bash", "-ec", texts.curl)


def test_the_json_holds_the_arguments_of_make_plan(choice: PlanChoice):
    content = json.loads(snippets_of("pack", choice, "http://127.0.0.1:1").json)
    assert content["arguments"] == choice.arguments
    assert content["plan"] == choice.to_browser()
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
    texts = snippets_of("pack", PlanChoice(), page_address("https://huggingface.co/"))
    assert str(ROOT) not in "".join(texts)
    assert "assets/demo/pack.json.gz" in texts.python
    assert "Client('someone/ipmerge')" in texts.client
    assert "https://someone-ipmerge.hf.space/gradio_api/call/preview" in texts.curl


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
    expected = snippets_of("pack", choice, served)
    for name in Snippets._fields:
        shown = "".join(page.locator(f"#cite-{name} .cm-content").inner_text().split())
        wanted = "".join(getattr(expected, name).split())
        assert wanted.startswith(shown)  # the editor draws a long text only as far as it is seen
        assert len(shown) > 100
    expect(page.locator("#snippets button[aria-label*='opy']")).to_have_count(6)
