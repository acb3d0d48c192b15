"""README, CHANGELOG and the tracked files against what is really there."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
from functools import cache
from pathlib import Path

import method_tables
import pytest
import yaml

import ipmerge_core
from ipmerge_core.errors import PlanError
from ipmerge_core.planning.mergekit_import import import_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FRONT_MATTER, BODY = README.split("---\n", 2)[1:]

COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
HARDWARE = {"cpu-basic", "cpu-upgrade", "t4-small", "t4-medium", "l4x1", "l40sx1", "a10g-small"}
HOSTS = {
    "127.0.0.1", "localhost", "arxiv.org", "doi.org", "huggingface.co", "openreview.net",
    "keepachangelog.com", "semver.org", "www.apache.org", "www.w3.org", "download.pytorch.org",
}  # fmt: skip
# Folders of one machine: home folders, scratch folders, mounts. Spelled so as not to match itself.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|farm|root|home|Users|tmp|mnt|data|opt)/\w")


@cache
def tracked() -> tuple[Path, ...]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return tuple(ROOT / name for name in listing.stdout.decode().split("\0") if name)


def text_files() -> dict[str, str]:
    texts = {}
    for path in tracked():
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:
            texts[str(path.relative_to(ROOT))] = content.decode("utf-8")
    return texts


def code_block_after(heading: str) -> str:
    section = BODY.split(f"\n## {heading}\n", 1)[1]
    return section.split("```", 2)[1].split("\n", 1)[1]


def tree_paths() -> set[str]:
    """Paths drawn in README's tree: two spaces of indent per level, `name   comment` per line."""
    paths, parents = set(), []
    for line in code_block_after("Repository layout").splitlines():
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        parents = [*parents[: indent // 2], name]
        paths.add("".join(parents).rstrip("/"))
    return paths


def test_readme_tree_draws_every_room_and_nothing_else():
    drawn = tree_paths()
    missing_on_disk = sorted(path for path in drawn if not (ROOT / path).exists())
    assert not missing_on_disk
    names = [path.relative_to(ROOT) for path in tracked() if path.is_file()]
    top = {name.parts[0] for name in names if not name.parts[0].startswith(".")}
    rooms = {
        "/".join(name.parts[:2])
        for name in names
        if name.parts[0] == "ipmerge_core" and name.name not in ("py.typed", "version.py")
    }
    assert not sorted((top | rooms) - drawn), "add these to the tree in README"


def test_the_methods_tables_are_made_from_the_registry():
    again = "run `python tests/method_tables.py` and read what changed"
    assert f"\n{method_tables.readme_table()}\n" in BODY, again
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == method_tables.methods_page(), again


def test_the_methods_said_to_be_missing_are_refused_in_a_recipe():
    head = method_tables.HEAD.read_text(encoding="utf-8")
    missing = re.findall(r"`(\w+)`", head.split("are not available:")[1].split("Importing")[0])
    assert missing
    for name in missing:
        with pytest.raises(PlanError, match=f"method '{name}' of the recipe is not one of"):
            import_recipe(f"merge_method: {name}\nmodels: []\n")


@pytest.mark.parametrize("name", ipmerge_core.__all__)
def test_every_public_name_is_in_readme_and_says_what_it_is(name):
    assert re.search(rf"`(?:ipm\.)?{name}\b", BODY), f"README does not name `{name}`"
    value = getattr(ipmerge_core, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        doc = inspect.getdoc(value) or ""
        assert len(doc.splitlines()[0]) > 15 if doc else False, f"{name} has no docstring"
        assert not doc.startswith(f"{value.__name__}("), f"{name} has a docstring made by dataclass"


def test_public_names_load_from_the_rooms_the_facade_names():
    for name, room in ipmerge_core._HOMES.items():
        value = getattr(importlib.import_module(f"ipmerge_core.{room}"), name)
        assert getattr(ipmerge_core, name) is value
    assert set(ipmerge_core.__all__) == set(ipmerge_core._HOMES) | {"__version__"}


def test_changelog_starts_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?([^\]\s]+)", changelog, flags=re.MULTILINE)
    versions = [version for version in versions if version != "Unreleased"]
    assert versions[0] == ipmerge_core.__version__


def test_space_front_matter_is_valid_and_agrees_with_the_requirements():
    space = yaml.safe_load(FRONT_MATTER)
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    (gradio,) = re.findall(r"^gradio==(\S+)", requirements, flags=re.MULTILINE)
    assert space["title"] == "IPMerge"
    assert space["emoji"]
    assert {space["colorFrom"], space["colorTo"]} <= COLOURS
    assert space["sdk"] == "gradio"
    assert str(space["sdk_version"]) == gradio
    assert (ROOT / space["app_file"]).is_file()
    assert space["python_version"] == "3.12"
    assert 0 < len(space["short_description"]) <= 60
    assert space["license"] == "apache-2.0"
    assert space["suggested_hardware"] in HARDWARE
    assert space["tags"]
    assert all(isinstance(tag, str) for tag in space["tags"])


def links_of(document: str) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", document)  # code is no link
    found = re.findall(r"(?:\]\(|src=\")([^)#\s\"]+)", prose)
    return [target for target in found if "://" not in target]


def test_every_local_link_and_picture_in_the_documents_exists():
    broken = [
        f"{name}: {target}"
        for name, text in text_files().items()
        if name.endswith(".md")
        for target in links_of(text)
        if not ((ROOT / name).parent / target).exists()
    ]
    assert not broken


def test_contributing_stays_under_80_lines():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 80


def test_tracked_text_names_no_machine_path():
    found = [
        f"{name}: {match.group()}"
        for name, text in text_files().items()
        for match in MACHINE_PATH.finditer(text)
    ]
    assert not found


def test_tracked_text_links_only_to_known_hosts():
    found = [
        f"{name}: {host}"
        for name, text in text_files().items()
        if name != "package-lock.json"  # npm writes where each package asks for donations
        for host in re.findall(r"\bhttps?://([A-Za-z0-9.-]+)", text)
        if host not in HOSTS and not host.endswith((".example", ".invalid", ".test", ".hf.space"))
    ]
    assert not found


def test_no_tracked_file_is_larger_than_the_hub_takes_without_lfs():
    large = [path.name for path in tracked() if path.is_file() and path.stat().st_size > 9_500_000]
    assert not large
