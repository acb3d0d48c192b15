"""Record answers of the SmolLM2 MLLM and of two merges, which the app shows as examples.

    python assets/smollm2/record_answers.py --budget 0.005 --math-weight 1.5 [--seed 0] [--limit 20]

In: the trio that `build` has made, and its seed. Out: the file of records next to the pack and the
images in examples/, as for the demo models. The merge is `protect` with a budget.
"""

from __future__ import annotations

import argparse

from build import PACK, PACKAGED, Build, evaluation_problems
from documents import HERE
from record import Recorded, record_examples

from ipmerge_core.ui.chat.recorded import records_name


def main() -> None:
    """Parse the arguments and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--math-weight", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0, help="training seed")
    parser.add_argument("--limit", type=int, default=20, help="problems of a task")
    options = parser.parse_args()
    trio = Build(PACKAGED, options.seed, HERE, "cpu")
    asked = evaluation_problems(trio, options.limit, "recorded")
    merged = {"projector": "protect", "budget": options.budget}
    weight = options.math_weight
    record_examples(Recorded(HERE / PACK, records_name(PACK), asked, merged, weight))


if __name__ == "__main__":
    main()
