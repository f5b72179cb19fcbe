"""The judge's core: what it compares, in which order, and which words a learner reads."""

import contextlib
import json
import linecache
import random
import signal
import threading
import time
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch

from course import checking
from course.checking import Check, NotYet, Raised, but, first_difference, raised, unpacked
from course.observations import pack, unpack


@pytest.mark.parametrize(
    "actual, expected",
    [
        (torch.ones(2, 3), torch.ones(2, 3)),
        (torch.ones(2) + 1e-8, torch.ones(2)),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0])),
        (torch.tensor([float("inf")]), torch.tensor([float("inf")])),
        (torch.tensor([1, 2]), torch.tensor([1, 2])),
        (torch.tensor([True]), torch.tensor([True])),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j])),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
        (3, 3),
        (3, 3.0),
        (np.int64(3), 3),
        (np.float32(3), 3.0),
        (torch.tensor([3.0]), 3.0),
        (float("inf"), float("inf")),
        (float("nan"), float("nan")),
        ("a", "a"),
        (True, True),
        (None, None),
        ({"a", "b"}, {"b", "a"}),
        ([1, 2.0], (1, 2.0)),
        ({"w": [torch.zeros(2)]}, {"w": [torch.zeros(2)]}),
        (Raised(ValueError), Raised(ValueError)),
        (Raised(UnicodeError), Raised(ValueError)),  # a ValueError of a narrower kind
    ],
)
def test_equal_observations_have_no_difference(actual, expected):
    assert first_difference(actual, expected) is None


@pytest.mark.parametrize(
    "actual, expected, words",
    [
        (3, torch.ones(2), "expected a tensor, got int"),
        (None, torch.ones(2), "expected a tensor, got NoneType"),
        (torch.ones(2, 3), torch.ones(3, 2), "expected shape (3, 2), got (2, 3)"),
        (torch.ones(2).half(), torch.ones(2), "expected torch.float32, got torch.float16"),
        (torch.ones(3).half(), torch.ones(2), "expected shape (2,), got (3,)"),  # shape comes before dtype
        (torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3]), "1 of 3 values differ, first at [2]: expected 3, got 4"),
        (torch.tensor([[True, False]]), torch.tensor([[True, True]]), "1 of 2 values differ, first at [0, 1]: expected True, got False"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), "the result holds NaN or infinity"),
        (torch.tensor([1.0, float("inf")]), torch.ones(2), "the result holds NaN or infinity"),
        (torch.tensor([1.0, 1.5]), torch.ones(2), "values differ by up to 0.5, first at [1]: expected 1, got 1.5"),
        (torch.tensor(2.0), torch.tensor(1.0), "values differ by up to 1, first at []: expected 1, got 2"),
        (torch.ones(1), torch.tensor([float("inf")]), "values differ by up to inf, first at [0]: expected inf, got 1"),
        (2.5, 3, "expected 3, got 2.5"),
        (np.int64(4), 3, "expected 3, got 4"),
        (10**400, 3, "expected 3, got a number of 1329 bits"),
        ("3", 3, "expected a number, got str"),
        (True, 1, "expected a number, got bool"),
        (1, True, "expected True, got 1"),
        (torch.ones(2), 1.0, "expected a number, got Tensor"),
        (float("nan"), 1.0, "expected 1, got nan"),
        ("a", "b", "expected 'b', got 'a'"),
        (0, None, "expected None, got 0"),
        (["a"], {"a"}, "expected {'a'}, got ['a']"),
        (5, [1, 2], "expected 2 values, got int"),
        ([1], [1, 2], "expected 2 values, got 1"),
        ([1, 5], [1, 2], "item 1: expected 2, got 5"),
        (5, {"w": 1}, "expected a dictionary, got int"),
        ({"v": 1}, {"w": 1}, "missing: w; too many: v"),
        ({}, {"w": 1}, "missing: w"),
        ({"w": 1, "v": 1}, {"w": 1}, "too many: v"),
        ({"w": [1, torch.zeros(2)]}, {"w": [1, torch.zeros(3)]}, "w: item 1: expected shape (3,), got (2,)"),
        (7, Raised(ValueError), "expected a ValueError, but the call was accepted"),
        (None, Raised(ValueError), "expected a ValueError, but the call was accepted"),
        (Raised(TypeError), Raised(ValueError), "expected a ValueError, got a TypeError"),
    ],
)
def test_the_first_difference_is_named(actual, expected, words):
    assert first_difference(actual, expected) == words


def test_numbers_that_differ_late_are_told_apart():
    assert first_difference(123_456_785, 123_456_789, rtol=1e-9) == "expected 123456789, got 123456785"
    assert first_difference(1_363_200, 1_190_400) == "expected 1190400, got 1363200"  # counts are not rounded
    assert first_difference(1e300, 1_190_400) == "expected 1.1904e+06, got 1e+300"
    assert first_difference(float("nan"), 3) == "expected 3, got nan"


def test_tolerances_are_what_they_say():
    assert first_difference(1.009, 1.0, rtol=0.01, atol=0.0) is None
    assert first_difference(1.011, 1.0, rtol=0.01, atol=0.0) is not None
    assert first_difference(torch.tensor([0.009]), torch.tensor([0.0]), rtol=0.0, atol=0.01) is None
    assert first_difference(torch.tensor([0.011]), torch.tensor([0.0]), rtol=0.0, atol=0.01) is not None


def test_a_check_that_observes_what_cannot_be_compared_is_the_authors_mistake():
    with pytest.raises(TypeError, match="no comparison for object"):
        first_difference(1, object())


def test_raised_observes_an_error_and_lets_the_stub_through():
    def fail(error):
        raise error

    assert raised(fail, ValueError("x")) == Raised(ValueError)
    assert raised(lambda: 3) is None
    with pytest.raises(NotImplementedError):
        raised(fail, NotImplementedError())
    assert raised(fail, NotImplementedError("no such operation for Half")) == Raised(NotImplementedError)


# one small exercise, to judge with: scale a tensor by 3


def scale(x):
    return 3 * x


def added(x):
    return 3 + x


def in_half(x):
    return (3 * x).half()


def fails(x):
    raise RuntimeError("this mistake doesn't run on these inputs")


def observe(answer, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, generator=generator)
    return {"the result": answer(x), "for zeros": answer(torch.zeros(2))}


ADDED, HALF = "you added 3: multiply by it", "your result is float16: keep the dtype"
CHECK = Check("scale by 3", observe, scale, lambda x: x + x + x, {"never drawn": fails, ADDED: added, HALF: in_half})


def refusal(answer, check=CHECK) -> str:
    with pytest.raises(NotYet) as caught:
        check(answer)
    return str(caught.value)


@pytest.mark.parametrize("right", [CHECK.reference, CHECK.second])
def test_right_answers_pass_and_say_what_was_right(right, capsys):
    CHECK(right)
    assert capsys.readouterr().out == "✓ scale by 3\n"


def test_misconceptions_are_named_in_their_own_words():
    assert refusal(lambda x: x + 3) == ADDED
    assert refusal(lambda x: (x + x + x).half()) == HALF


def test_another_wrong_answer_hears_the_first_difference():
    assert refusal(lambda x: 3 * x + 1).startswith("the result: values differ by up to 1")
    assert refusal(lambda x: (3 * x)[:1]) == "the result: expected shape (4,), got (1,)"
    assert refusal(lambda x: None) == "the result: expected a tensor, got NoneType"
    assert refusal(lambda x: 3 * x if x.any() else x + 1) == "for zeros: values differ by up to 1, first at [0]: expected 0, got 1"


def test_the_stub_and_a_failing_answer_are_refused_politely():
    def stub(x):
        raise NotImplementedError()

    def broken(x):
        return x / torch.ones(5)

    assert refusal(stub) == "nothing here yet: replace the NotImplementedError with your answer"
    assert refusal(broken).startswith("your code raised RuntimeError: The size of tensor a")
    assert refusal(None).startswith("your code raised TypeError")


def test_an_operation_that_torch_lacks_is_not_an_unwritten_answer():
    def lacking(x):
        raise NotImplementedError("no such operation for Half")

    assert refusal(lacking) == "your code raised NotImplementedError: no such operation for Half"


def test_an_observation_may_refuse_in_its_own_words():
    def strict(answer, seed):
        if answer(torch.ones(1)).item() != 3:
            raise NotYet("three times one is three")
        return {}

    assert refusal(added, Check("strict", strict, scale, scale)) == "three times one is three"


def test_a_warning_from_a_right_answer_costs_nothing(capfd, recwarn):
    def warns(x):
        warnings.warn("old way of writing it", DeprecationWarning, stacklevel=1)
        return x + 1

    check = Check("adding one", lambda answer, seed: {"the sum": answer(seed)}, lambda x: x + 1, lambda x: 1 + x)
    check(warns)
    assert len(recwarn) == 0 and capfd.readouterr().err == ""


def test_an_observation_may_be_a_generator():
    """It looks under the check's own random numbers, and what it leaves out once it has ended early is no difference."""

    def look(answer, seed):
        result = answer(torch.randn(3))
        yield "the type", type(result).__name__
        if isinstance(result, torch.Tensor):
            yield "the value", result

    check = Check("a tensor, doubled", look, lambda x: 2 * x, lambda x: x + x, {"it was halved: double it": lambda x: x / 2})
    check._judge(lambda x: x + x, 0)
    assert refusal(lambda x: x / 2, check) == "it was halved: double it"
    assert refusal(lambda x: 3, check) == "the type: expected 'Tensor', got 'int'"
    before = torch.random.get_rng_state()
    check(check.reference)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_was_not_observed_is_named():
    def partly(answer, seed):
        return {"first": 1, "second": 2} if answer(torch.ones(1)) == 3 else {"first": 1}

    assert refusal(added, Check("partly", partly, scale, scale)) == "second: nothing was observed"


def test_an_answer_that_changes_what_it_is_given_is_told_so():
    @dataclass
    class Pair:
        one: torch.Tensor
        other: torch.Tensor

    def observe(answer, seed):
        return {"the sum": answer(torch.ones(2), pair=Pair(torch.ones(2), torch.ones(2)))}

    def right(x, pair):
        return x + pair.one + pair.other

    def in_place(x, pair):
        return pair.other.add_(x).add_(pair.one)

    words = "what your code was given: pair was changed in place; work on a copy"
    assert refusal(in_place, Check("a sum", observe, right, right)) == words
    assert refusal(lambda x, pair: x.add_(2), Check("a sum", observe, right, right)) == words.replace("pair", "argument 1")


def test_what_was_changed_in_place_is_heard_before_what_came_out():
    check = Check("scale by 3", lambda answer, seed: {"the result": answer(torch.ones(2))}, scale, scale)
    assert refusal(lambda x: x.mul_(5), check) == "what your code was given: argument 1 was changed in place; work on a copy"


def test_an_answer_that_should_change_what_it_is_given_is_told_so():
    def observe(answer, seed):
        x = torch.ones(2)
        answer(x, torch.ones(2))
        return {"x": x}

    check = Check("scale in place", observe, lambda x, by: x.mul_(3 * by), lambda x, by: x.copy_(3 * by * x))
    check(lambda x, by: x.mul_(3 * by))
    assert refusal(lambda x, by: 3 * by * x, check) == "what your code was given: argument 1 is as it was: change it in place"
    assert "argument 2 was changed in place; work on a copy" in refusal(lambda x, by: (x.mul_(3), by.zero_()), check)


def affine(x, *, slope=3.0, shift=torch.zeros_like):
    return slope * x + shift(x)


class Affine(torch.nn.Module):
    slope = 3.0

    def shift(self, x):
        return 0 * x

    def forward(self, x):
        return self.slope * x + self.shift(x)


@pytest.mark.parametrize("answer, run", [(affine, observe), (Affine, lambda answer, seed: observe(answer(), seed))])
def test_a_mistake_is_the_worked_answer_with_parts_replaced(answer, run):
    words = {"the slope is 3": but(slope=2.0), "nothing is added": but(shift=torch.ones_like if answer is affine else lambda self, x: 1)}
    check = Check("scale by 3", run, answer, answer, words)
    for message in words:
        assert refusal(check.wrong(message), check) == message
        assert check.wrong(message) is check.wrong(message)
    check(answer)
    with pytest.raises(TypeError, match=r"has no part offset; its parts are .*shift.*slope"):
        Check("", run, answer, answer, {"no such part": but(offset=1)}).wrong("no such part")


@pytest.mark.parametrize(
    "result, words",
    [
        (None, "your function returned nothing: is the `return` missing. It has to return a pair"),
        (torch.ones(2), "your function returned Tensor: return a pair"),  # not unpacked along its first axis
        ((torch.ones(2),), "your function returned 1 value: return a pair"),
        ((2.0, torch.ones(2)), "your function returned 2 values, and number 1 of them is of type float: return a pair"),
    ],
)
def test_an_answer_that_is_no_such_tuple_is_told_what_to_return(result, words):
    assert unpacked([torch.ones(2), 2.0], "a pair", torch.Tensor, object)[1] == 2.0
    with pytest.raises(NotYet, match=words):
        unpacked(result, "a pair", torch.Tensor, object)


def test_every_round_has_its_own_seed_and_leaves_the_learners_random_numbers_alone():
    seeds = []

    def remember(answer, seed):
        torch.rand(7)
        seeds.append(seed)
        return {"drawn": torch.rand(1)}

    check = Check("remember", remember, scale, scale, rounds=3)
    torch.manual_seed(5)
    random.seed(5)
    before = (torch.rand(1), random.random())
    torch.manual_seed(5)
    random.seed(5)
    check(scale)
    assert (torch.rand(1), random.random()) == before
    assert len(set(seeds)) == 3 and len(seeds) == 6  # the answer and the reference see the same seed


def test_answer_and_reference_see_the_same_random_numbers():
    def noise(answer, seed):
        return {"noise": answer(torch.rand(3))}

    Check("noise", noise, scale, scale)(scale)


def test_a_wrong_answer_in_any_round_is_refused():
    calls = []

    def sometimes(x):
        calls.append(x)
        return 3 * x if len(calls) <= 2 else x  # right in the first round (two calls each)

    assert "values differ" in refusal(sometimes)


def test_the_judge_shows_no_traceback_in_jupyter():
    assert NotYet("do this")._render_traceback_() == ["Not yet: do this"]


def test_the_cause_of_a_failing_answer_is_kept():
    with pytest.raises(NotYet) as caught:
        CHECK(partial(torch.reshape, shape=(-2, 0)))
    assert isinstance(caught.value.__cause__, Exception)


@pytest.mark.parametrize("spoil", [lambda given: given.clear(), lambda given: given.pop(next(iter(given)))])
def test_a_dictionary_of_numbers_that_is_changed_is_noticed(spoil):
    check = Check(
        "sizes", lambda answer, seed: {"the sum": answer({"a": 1, "b": 2.5})}, lambda d: sum(d.values()), lambda d: d["a"] + d["b"]
    )
    check(lambda d: sum(d.values()))
    assert "argument 1 was changed in place" in refusal(lambda d: (sum(d.values()), spoil(d))[0], check)


@pytest.mark.parametrize(
    "spoil", [dict.clear, lambda given: given.update(b=3), lambda given: given["a"].mul_(2), lambda given: given.update(a=0)]
)
def test_a_dictionary_of_tensors_that_is_changed_is_noticed(spoil):
    check = Check("a", lambda answer, seed: {"a": answer({"a": torch.ones(2)})}, lambda d: 1 * d["a"], lambda d: d["a"] + 0)
    assert "argument 1 was changed in place" in refusal(lambda d: (1 * d["a"], spoil(d))[0], check)


@pytest.mark.parametrize("spoil", [list.pop, lambda given: given.append(1), lambda given: given.__setitem__(0, torch.zeros(2))])
def test_a_list_of_tensors_that_is_changed_is_noticed(spoil):
    check = Check("a sum", lambda answer, seed: {"sum": answer([torch.ones(2), torch.ones(2)])}, sum, lambda xs: xs[0] + xs[1])
    check(lambda xs: sum(xs))
    assert "argument 1 was changed in place" in refusal(lambda xs: (sum(xs), spoil(xs))[0], check)


@pytest.mark.parametrize("spoil", [list.sort, list.clear, lambda given: given.append((7, 7)), lambda given: given.reverse()])
def test_a_list_of_sizes_that_is_changed_is_noticed(spoil):
    def total(sizes):
        return sum(out * into for out, into in sizes)

    check = Check("sizes", lambda answer, seed: {"the sum": answer([(3, 2), (1, 5)])}, total, lambda sizes: total(sorted(sizes)))
    assert "argument 1 was changed in place" in refusal(lambda sizes: (total(sizes), spoil(sizes))[0], check)


# the time limit


@pytest.fixture
def short_limit(monkeypatch):
    monkeypatch.setattr(checking, "LIMIT_SECONDS", 0.2)


def never_ends(x):
    while True:
        with contextlib.suppress(Exception):  # which the limit is not
            x = x + 0 * x


def takes_a_while(x):
    time.sleep(0.4)
    return 3 * x


def catches_everything(x):
    for _ in range(2):
        try:
            while True:
                x = x + 0 * x
        except:  # noqa: E722
            continue
    return never_ends(x)


def alarm():
    return signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)


needs_alarm = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs SIGALRM")


@needs_alarm
@pytest.mark.parametrize("answer", [never_ends, catches_everything])
def test_an_answer_that_never_ends_is_stopped_between_two_operations(answer, short_limit):
    before, numbers = alarm(), torch.random.get_rng_state()
    started = time.monotonic()
    with torch.no_grad():
        assert refusal(answer) == "your answer was still running after 0.2 s: is there a loop that never ends?"
        assert not torch.is_grad_enabled()
    assert time.monotonic() - started < 10
    assert alarm() == before and torch.equal(torch.random.get_rng_state(), numbers)


@needs_alarm
def test_an_observation_that_catches_errors_does_not_catch_the_limit(short_limit):
    check = Check("errors", lambda answer, seed: {"the error": raised(answer, torch.ones(2))}, fails, fails)
    assert refusal(never_ends, check).startswith("your answer was still running")


@needs_alarm
@pytest.mark.parametrize("answer", [scale, added, fails])
def test_the_handler_of_the_alarm_is_put_back(answer):
    def mine(*_):
        raise AssertionError

    before = signal.signal(signal.SIGALRM, mine)
    try:
        with contextlib.suppress(NotYet):
            CHECK(answer)
        assert alarm() == (mine, (0.0, 0.0))
    finally:
        signal.signal(signal.SIGALRM, before)


@needs_alarm
def test_a_timer_that_runs_already_stays_and_nothing_is_limited(short_limit):
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        Check("once", lambda answer, seed: {"the result": answer(torch.ones(2))}, scale, scale, rounds=1)(takes_a_while)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(rung) == 1 and 0.3 <= rung[0] - started < 2


def passes(answer, printed):
    try:
        Check("once", lambda answer, seed: {"the result": answer(torch.ones(2))}, scale, scale, rounds=1)(answer)
    except BaseException as error:
        printed.append(error)
    else:
        printed.append("passed")


def test_outside_of_the_main_thread_nothing_is_limited(short_limit):
    heard = []
    thread = threading.Thread(target=passes, args=(takes_a_while, heard))
    thread.start()
    thread.join()
    assert heard == ["passed"]


def test_without_the_alarm_nothing_is_limited(short_limit, monkeypatch):
    monkeypatch.delattr(signal, "setitimer", raising=False)
    heard = []
    passes(takes_a_while, heard)
    assert heard == ["passed"]


def test_in_a_debugger_nothing_is_limited(short_limit, monkeypatch):
    monkeypatch.setattr(checking.sys, "gettrace", lambda: lambda *_: None)
    heard = []
    passes(takes_a_while, heard)
    assert heard == ["passed"]


def test_a_known_mistake_that_is_refused_in_other_words_is_not_the_learners():
    def strict(answer, seed):
        result = answer(torch.ones(1)).item()
        if result == 4:
            raise NotYet("that was an addition")
        return {"the result": result}

    check = Check("strict", strict, scale, scale, {"you added 3": added, "you took it as it is": lambda x: x})
    assert refusal(lambda x: x.clone(), check) == "you took it as it is"


# two mistakes at once


def described(answer, seed):
    """Shape before values; what comes out of zeros, and of nothing, last."""
    x = torch.randn(4, generator=torch.Generator().manual_seed(seed))
    return {
        "the shape": tuple(answer(x).shape),
        "the result": answer(x),
        "the result for twice as much": answer(2 * x),
        "for zeros": answer(torch.zeros(4)),
        "for no numbers": answer(torch.zeros(0)),
    }


TAKEN_FOR_ONES, AT_ZERO = "zeros were taken for ones", "you added 3, but not to zeros"


def zeros_as_ones(x):
    return 3 * torch.where(x == 0, 1, x)


def added_but_at_zero(x):
    return torch.where(x == 0, x, x + 3)


def with_another_mistake(answer):
    """For an empty tensor, the last thing that is looked at."""
    return lambda x: answer(x) if len(x) else torch.ones(7)


def test_of_two_mistakes_the_known_one_is_named():
    check = Check("scale by 3", described, scale, scale, {TAKEN_FOR_ONES: zeros_as_ones, ADDED: added})
    for mistake in (added, with_another_mistake(added), lambda x: x + 3 if x.any() else x + 5):
        assert refusal(mistake, check) == ADDED
    assert refusal(with_another_mistake(scale), check) == "for no numbers: expected shape (0,), got (7,)"


def test_one_wrong_value_in_common_names_no_mistake():
    check = Check("scale by 3", described, scale, scale, {TAKEN_FOR_ONES: zeros_as_ones})
    assert refusal(zeros_as_ones, check) == TAKEN_FOR_ONES
    assert refusal(with_another_mistake(zeros_as_ones), check).startswith("for zeros: values differ")


def test_the_longest_beginning_is_named_and_of_two_that_fit_alike_neither():
    answer = with_another_mistake(added_but_at_zero)
    check = Check("scale by 3", described, scale, scale, {ADDED: added, AT_ZERO: added_but_at_zero})
    assert refusal(answer, check) == AT_ZERO
    twice = Check("scale by 3", described, scale, scale, {AT_ZERO: added_but_at_zero, "in other words": lambda x: added_but_at_zero(x)})
    assert refusal(answer, twice).startswith("the result: values differ")


def test_shapes_alone_name_no_mistake():
    rows = {"you made a row of it": lambda x: (3 * x)[None]}
    shapes = Check("scale by 3", lambda answer, seed: {n: tuple(answer(torch.ones(n)).shape) for n in (2, 3, 4)}, scale, scale, rows)
    said = refusal(lambda x: x[None] if len(x) < 4 else x[None, None], shapes)
    assert said.startswith("2: expected 1 values, got 2")


# an answer that fails on its way


def of_a_square_and_more(answer, seed):
    g = torch.Generator().manual_seed(seed)
    for rows, columns in ((3, 3), (3, 4)):
        yield f"rows of {rows} × {columns}", answer(torch.randn(rows, columns, generator=g), torch.rand(rows, generator=g))


def by_rows(x, s):
    return x * s[:, None]


BY_COLUMNS = "you scaled columns"


def test_a_mistake_that_only_a_square_forgives_is_named():
    mistakes = {BY_COLUMNS: lambda x, s: x * s, "you added": lambda x, s: x + s[:, None]}
    check = Check("scale rows", of_a_square_and_more, by_rows, lambda x, s: torch.diag(s) @ x, mistakes)
    assert refusal(lambda x, s: torch.mul(x, s), check) == BY_COLUMNS
    assert refusal(lambda x, s: x * s if len(s) == x.shape[1] else x[9], check) == BY_COLUMNS
    for right_first in (lambda x, s: by_rows(x, s) if len(s) == x.shape[1] else x[9], lambda x, s: x - s):
        assert refusal(right_first, check).startswith("your code raised")  # nothing known is wrong in that way
    with pytest.raises(NotYet, match=BY_COLUMNS):
        check.verdict(json.loads(json.dumps(check.witness(lambda x, s: x * s, 5))), 5)


def test_an_error_behind_the_last_observation_is_no_right_answer():
    def observe(answer, seed):
        yield "the result", answer(torch.ones(2))
        answer(None)

    check = Check("scale by 3", observe, lambda x: x if x is None else 3 * x, lambda x: scale(x) if x is not None else x)
    assert refusal(scale, check).startswith("your code raised TypeError")


# where a learner's own error was raised


def written_in_a_cell(source: str):
    """What the cell defines as ``answer``, as in Jupyter: in the module __main__, its lines kept by linecache."""
    names = {"__name__": "__main__"}
    linecache.cache["<a cell>"] = (len(source), None, source.splitlines(keepends=True), "<a cell>")
    exec(compile(source, "<a cell>", "exec"), names)
    return names["answer"]


def test_the_line_of_the_learners_cell_is_shown():
    answer = written_in_a_cell("def answer(x):\n    y = helper(x)\n    return y\n\n\ndef helper(x):\n    return x[9]\n")
    assert refusal(answer) == (
        "your code raised IndexError: index 9 is out of bounds for dimension 0 with size 4 (line 7 of your cell: `return x[9]`)"
    )
    inside_torch = written_in_a_cell("def answer(x):\n    return x.reshape(7, 7, 7)\n")
    assert refusal(inside_torch).endswith(" (line 2 of your cell: `return x.reshape(7, 7, 7)`)")
    assert "line" not in refusal(lambda x: x[9]), "this one is in no cell"


# observations on their way between processes


class Odd(int):
    pass


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 10**30, 2.5, float("inf"), "α/r", [1, (2.5, "a")], {"b", "a"}, frozenset({1}), {"w": {1: [None]}},
        torch.randn(2, 3), torch.tensor(1.5), torch.zeros(0, 3), torch.tensor([True]), torch.randn(3).bfloat16(), torch.randn(3).half(),
        torch.tensor([1 + 2j]).conj(), torch.arange(6).reshape(2, 3).T, torch.ones(2, requires_grad=True),
        torch.nn.Parameter(torch.ones(2)), [torch.ones(2, dtype=torch.uint8), {"x": torch.tensor(2.0)}],
    ],
)  # fmt: skip
def test_observations_arrive_as_they_were(value):
    arrived = unpack(json.loads(json.dumps(pack(value))))
    assert first_difference(arrived, value, 0, 0) is None
    assert arrived is value or type(arrived) is type(value) or type(arrived) is torch.Tensor


def test_what_is_not_plain_arrives_as_a_number_or_a_stand_in():
    class Strange:
        def __eq__(self, other):
            return True

        def __repr__(self):
            return "strange"

    assert [unpack(pack(value)) for value in (Odd(3), np.int64(3), np.float32(2.5))] == [3, 3, 2.5]
    arrived = unpack(json.loads(json.dumps(pack(Strange()))))
    assert (type(arrived).__name__, repr(arrived)) == ("Strange", "strange") and arrived != 1
    assert first_difference(unpack(pack(torch.ones(2).to_sparse())), torch.ones(2)) == "expected a tensor, got Tensor"
    large = unpack(pack(torch.ones(5_000_000)))
    assert first_difference(large, torch.ones(2)) == "expected shape (2,), got (5000000,)"


@pytest.mark.parametrize("forged", [{"x": 1}, {}, [1], {"map": 3}, {"tensor": ["load", [1], None]}, {"tensor": ["float32", [9], "AAAA"]}])
def test_what_is_no_observation_is_refused(forged):
    with pytest.raises(ValueError, match="no observations"):
        unpack(forged)
    for sent in (forged, {"changed": [], "seen": forged}):
        with pytest.raises(NotYet, match="got between the judge"):
            CHECK.verdict(sent, 3)


def error_of(kind):
    return Check("errors", lambda answer, seed: {"for zeros": raised(answer, torch.zeros(2))}, kind, kind)


def test_witness_and_verdict_together_say_what_the_check_says():
    class Mine(ValueError):
        pass

    class Other(TypeError):
        pass

    def raising(kind):
        def answer(x):
            raise kind

        return answer

    def in_two_parts(check, answer):
        check.verdict(json.loads(json.dumps(check.witness(answer, 5))), 5)

    for check, answers in (
        (CHECK, [scale, added, in_half, lambda x: x.add_(3), lambda x: None, lambda x: x[9]]),
        (error_of(raising(ValueError)), [raising(ValueError), raising(Mine), raising(Other), lambda x: x]),
    ):
        for answer in answers:
            try:
                check._judge(answer, 5)
            except NotYet as said:
                with pytest.raises(NotYet) as heard:
                    in_two_parts(check, answer)
                assert str(heard.value) == str(said)
            else:
                in_two_parts(check, answer)
