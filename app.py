"""Entry point of the app, here and on a Hugging Face Space: `python app.py`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Serve the app until it is stopped."""
    # Two threads on a busy core spin for each other; small models answer much faster with one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from ipmerge_core.errors import RunError
    from ipmerge_core.runtime.host import check_platform, limits

    try:
        check_platform()
        limits()
    except RunError as error:
        sys.exit(str(error))
    from ipmerge_core.ui.app import launch

    launch()


if __name__ == "__main__":
    main()
