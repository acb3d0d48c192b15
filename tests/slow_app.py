"""The real app over the demo trio, with slowed analyses and answers, and runs that can be held.

Run as a program it serves until it is stopped: `python tests/slow_app.py HOME`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ["IPMERGE_HOME"] = sys.argv[1]
    import slow_steps

    from ipmerge_core.adapters.live import LiveModel
    from ipmerge_core.analysis import analyse as analysis
    from ipmerge_core.calibration import calibrate as calibration
    from ipmerge_core.merging import merge as merging
    from ipmerge_core.ui.app import launch

    calibration.iter_calibration_of = slow_steps.slow_calibration
    LiveModel.stream = slow_steps.slow_stream
    merging.iter_merge = slow_steps.slow_merge
    analysis.iter_pack = slow_steps.slow_pack
    launch()
