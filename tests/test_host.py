"""Where the package runs: Linux and macOS; elsewhere it says so in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ipmerge_core.runtime import host

ROOT = Path(__file__).parents[1]
ON_WINDOWS = "import sys; sys.platform = 'win32'; sys.modules['fcntl'] = None; "


def python(code):
    command = [sys.executable, "-c", ON_WINDOWS + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("from ipmerge_core.cli import main; sys.exit(main(['app']))", 2),
        ("from ipmerge_core.cli import main; sys.exit(main(['plan', 'x.json.gz', '-o', 'y']))", 2),
        ("import runpy; runpy.run_path('app.py', run_name='__main__')", 1),
    ],
)
def test_windows_is_refused_in_one_sentence(code, exit_code):
    done = python(code)
    assert done.returncode == exit_code, done.stderr
    assert "IPMerge requires Linux or macOS" in done.stderr
    assert "WSL" in done.stderr
    assert "Traceback" not in done.stderr


def test_python_users_on_windows_get_the_same_sentence():
    done = python("import ipmerge_core as ipm; ipm.open_pair")
    assert (
        done.stderr.rstrip()
        .splitlines()[-1]
        .startswith("ipmerge_core.errors.RunError: IPMerge requires Linux or macOS")
    )


def test_a_space_is_known_by_its_variables(monkeypatch):
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert not host.is_hosted()
    monkeypatch.setenv("SPACE_ID", "org/space")
    assert host.is_hosted()
    assert host.space_id() == "org/space"
