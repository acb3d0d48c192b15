"""Scores: what counts as right, intervals against published values, the paired test."""

import math

import pytest

from ipmerge_core.errors import RunError
from ipmerge_core.evaluation.scores import Score, score, sign_test, wilson_interval
from ipmerge_core.tasks.answers import is_right, stated_result
from ipmerge_core.tasks.demo import problems


@pytest.mark.parametrize(
    ("reply", "result"),
    [
        ("6*4=24.", "24"),
        ("6+4=10; 10*2=20.", "20"),
        (" 24 ", "24"),
        ("24.", "24"),
        ("4-9=-5.", "-5"),
        ("6*4.", None),
        ("6*4=", None),
        ("6*4=24 or 25.", None),
        ("It is 24.", None),
        ("", None),
    ],
)
def test_a_result_is_the_number_after_the_last_equals_sign_or_the_whole_reply(reply, result):
    assert stated_result(reply) == result


def test_a_calculation_written_down_and_not_carried_out_is_wrong():
    for problem in problems("sub", 40):
        assert not is_right(problem, f"{problem.calculation}.")
        assert is_right(problem, f"{problem.worked}.")


def test_perception_compares_the_whole_reply_without_case_and_final_stop():
    problem = problems("shape", 1)[0]
    assert is_right(problem, f" {problem.answer.upper()}. ")
    assert not is_right(problem, f"a {problem.answer}.")


def test_a_score_counts_the_right_replies_and_can_be_pooled():
    items = problems("dots", 10)
    replies = [problem.answer for problem in items[:7]] + ["none"] * 3
    assert score(items, replies) == Score(7, 10)
    assert Score(7, 10) + Score(1, 10) == Score(8, 20)
    assert math.isnan(Score(0, 0).share)


def test_a_score_refuses_another_number_of_replies():
    with pytest.raises(ValueError, match="shorter"):
        score(problems("dots", 2), ["1"])


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_equal_published_values(right, n, low, high):
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=6e-5)


def test_a_wilson_interval_is_symmetric_in_right_and_wrong():
    low, high = wilson_interval(30, 100)
    assert wilson_interval(70, 100) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("right", "n", "confidence"), [(5, 4, 0.95), (-1, 4, 0.95), (1, 4, 1.0)])
def test_impossible_counts_are_refused_with_their_values(right, n, confidence):
    with pytest.raises(RunError, match=f"{right} right of {n}"):
        wilson_interval(right, n, confidence)


def test_the_sign_test_equals_the_binomial_tail():
    # 9 items only the first gets, 1 only the second: 2 * (C(10,0) + C(10,1)) / 2^10
    first = [True] * 9 + [False] + [True] * 50
    second = [False] * 9 + [True] + [True] * 50
    result = sign_test(first, second)
    assert (result.first_only, result.second_only) == (9, 1)
    assert result.p_value == pytest.approx(22 / 1024)


def test_the_sign_test_finds_nothing_where_nothing_differs():
    assert sign_test([True, False], [True, False]).p_value == 1.0


def test_the_sign_test_refuses_lists_of_different_length():
    with pytest.raises(RunError, match="got 1 and 2"):
        sign_test([True], [True, False])
