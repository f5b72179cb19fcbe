"""reference.arguments: what each guard lets pass, and the words in which it refuses."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.arguments import check_integer, check_number

BOTH = pytest.mark.parametrize("check", [check_integer, check_number])


@BOTH
@given(st.integers(-5, 5), st.none() | st.integers(-3, 3), st.none() | st.integers(-3, 3))
def test_both_ends_are_included_and_each_may_be_left_out(check, value, least, most):
    if (-9 if least is None else least) <= value <= (9 if most is None else most):
        check("r", value, least, most)
    else:
        with pytest.raises(ValueError, match=f"^r must be .*, got {value}$"):
            check("r", value, least, most)


@BOTH
@pytest.mark.parametrize(
    "value, least, most, words",
    [
        (0, 1, None, "r must be at least 1, got 0"),
        (9, None, 8, "r must be at most 8, got 9"),
        (0, 1, 8, "r must be from 1 to 8, got 0"),
        (9, 1, 8, "r must be from 1 to 8, got 9"),
    ],
)
def test_the_message_says_the_range(check, value, least, most, words):
    with pytest.raises(ValueError) as caught:
        check("r", value, least, most)
    assert str(caught.value) == words


@pytest.mark.parametrize("value", [True, False, 2.0, "2", None, np.float64(2), np.int64(2), [2]])
def test_no_integer(value):
    """numpy's integers neither: they overflow where Python's grow."""
    with pytest.raises(TypeError) as caught:
        check_integer("batch", value, 1)
    assert str(caught.value) == f"batch must be an integer, got {value!r}"


@pytest.mark.parametrize("value", [True, False, "2", None, 2j, [2.0]])
def test_no_number(value):
    with pytest.raises(TypeError) as caught:
        check_number("alpha", value)
    assert str(caught.value) == f"alpha must be a number, got {value!r}"


@pytest.mark.parametrize("value", [2, 2.5, Fraction(5, 2), np.float32(2.5), np.int64(2)])
def test_numbers_of_any_kind_pass(value):
    check_number("alpha", value, 2, 2.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("least, most", [(None, None), (0, None), (None, 1), (0.0, 1.0)])
def test_what_is_not_finite_never_passes(value, least, most):
    with pytest.raises(ValueError) as caught:
        check_number("share", value, least, most)
    assert str(caught.value) == f"share must be finite, got {value}"
