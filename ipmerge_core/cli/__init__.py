"""The command line: `ipmerge check | analyse | calibrate | plan | recipe | merge | ...`.

Parses arguments (`parser`), runs commands (`commands`), prints results (`printing`). Results go to
stdout, as JSON with --json; progress and errors to stderr. Exit codes: 0 success, 2 invalid input
(a message without traceback), 1 a bug, 130 interrupted (finished work is kept), 141 the reader of
the output has ended (`ipmerge check ... | head -1`). Paths, devices and combinations of options are
checked before any work. Heavy libraries are imported only by commands that need them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ipmerge_core.errors import IPMergeError

if TYPE_CHECKING:
    import argparse

INTERRUPTED = "\nipmerge: interrupted; run the same command again to resume."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        try:
            code = _run(arguments)
        except SystemExit:  # after --help or --version, or with an option that does not exist
            sys.stdout.flush()
            raise
        return code if _flushed() else 2
    except BrokenPipeError:
        _discard_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # also while modules are imported
        print(INTERRUPTED, file=sys.stderr)
        return 128 + signal.SIGINT


def _flushed() -> bool:
    """Flush stdout; return False if its disk is full, which has been reported."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        _discard_output()
        return False
    return True


def _discard_output() -> None:
    """Send the rest of the output to nowhere, so that Python can flush it at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _run(arguments: Sequence[str] | None) -> int:
    from ipmerge_core.cli.combinations import check_combination
    from ipmerge_core.cli.parser import make_parser
    from ipmerge_core.runtime.atomic import reason_of
    from ipmerge_core.runtime.host import check_platform

    options = make_parser().parse_args(arguments)
    options.one_thread = "OMP_NUM_THREADS" not in os.environ
    if options.one_thread:  # several threads on one busy core mostly wait for each other
        os.environ["OMP_NUM_THREADS"] = "1"
    try:
        check_platform()
        check_combination(options)
        if options.door is not None:
            options.target = options.door(options.output)
        _resolve_device(options)
        code: int = options.run(options)
    except IPMergeError as error:
        print(f"ipmerge: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) or (reason := reason_of(error)) is None:
            raise
        print(f"ipmerge: Cannot access '{error.filename}': {reason}.", file=sys.stderr)
        return 2
    return code


def _resolve_device(options: argparse.Namespace) -> None:
    """Resolve "auto" to a device for commands that compute. Raises: PlanError."""
    if "fp64" in options:
        from ipmerge_core.runtime.devices import AUTO, resolve_device

        chosen = AUTO if options.device is None else options.device
        options.device = resolve_device(chosen, fp64=options.fp64)
