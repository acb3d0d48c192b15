"""Measuring models: demo problems, greedy answers, scores with intervals and a paired test."""

from ipmerge_core.evaluate.answers import answer
from ipmerge_core.evaluate.demo import (
    MATH_TASKS,
    PERCEPTION_TASKS,
    TASKS,
    Drawing,
    Problem,
    problems,
)
from ipmerge_core.evaluate.scores import (
    Score,
    SignTest,
    is_right,
    score,
    sign_test,
    stated_result,
    wilson_interval,
)

__all__ = [
    "TASKS",
    "MATH_TASKS",
    "PERCEPTION_TASKS",
    "Drawing",
    "Problem",
    "problems",
    "answer",
    "Score",
    "score",
    "is_right",
    "stated_result",
    "wilson_interval",
    "SignTest",
    "sign_test",
]
