"""Each debugging case fails as it is, passes mended in two ways, and no way of hiding its symptom passes.

``tests/test_checks.py`` runs the judges on worked answers and known mistakes; here are the scripts, and how they and their judges fit.
"""

import importlib

import pytest
from typer.testing import CliRunner

from course.casebook import cases, find
from course.checking import Check, NotYet
from course.checks import cases as checks
from course.cli import app
from course.units import CourseError

CASES = cases()
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def broken(case):
    return getattr(importlib.import_module(f"course.cases.{case.name}"), case.mended)


def test_each_script_has_its_judge():
    assert {case.name for case in CASES} == {name for name, value in vars(checks).items() if isinstance(value, Check)}
    assert len(CASES) >= 9


@every_case
def test_scripts_are_short_and_say_what_was_seen(case):
    assert len(case.text.splitlines()) <= 40
    assert max(map(len, case.text.splitlines())) <= 100
    assert "\n\n" in case.symptoms and f"end `{case.mended}`" in case.symptoms.replace("the class ", "")
    assert len(case.symptoms.splitlines()[0]) <= 100


@every_case
def test_it_fails_before_and_passes_after(case):
    for seed in range(3):
        with pytest.raises(NotYet) as refused:
            case.check._judge(broken(case), seed)
        assert case.check.wrong(str(refused.value)) is broken(case), "the script's own mistake is named in its own words"
        case.check._judge(case.check.reference, seed)
        case.check._judge(case.check.second, seed)


SYMPTOMS = {  # case -> a line of what it prints, as it is and mended
    "b_stays_zero": (0, "loss 1.3606 → 1.3606", "loss 1.3606 → 0.0"),
    "ewc_forgets": (0, "old task: 4", "old task: 9"),
    "flat_loss": (-1, "step 100  loss 1.326092", "step 100  loss 0.0"),
    "good_loss_wrong_answers": (-1, "loss 0.2", "answers right 100 of 100"),
    "loss_by_batching": (1, "shuffled  loss per token 1.", "shuffled  loss per token 3."),
    "merged_is_worse": (2, "merged   error 1.", "merged   error 0.0000"),
    "no_gradient": (-1, "blocks.2.B.weight  gradient None", "blocks.2.B.weight  gradient 0."),
    "second_evaluation": (3, "second evaluation error 1.", "second evaluation error 0.01"),
    "zero_tokens": (2, "norm of the output 8.000 in float32, 0.000", "norm of the output 8.000 in float32, 7.998"),
}


@every_case
def test_the_symptom_is_seen_and_is_gone_when_it_is_mended(case):
    line, before, after = SYMPTOMS[case.name]
    seen = case.shows()
    assert before in seen.splitlines()[line] and len(seen.splitlines()) >= 2
    assert after in case.shows(case.check.reference).splitlines()[line]


def test_another_repair_than_the_two_passes():
    """Written by somebody who has not seen the worked ones."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    def scaled_in_pieces(layer):
        weight = layer.base.weight.detach().clone()
        for a, b in zip(layer.A, layer.B.T, strict=True):
            weight += layer.scale * torch.outer(b, a)
        linear = nn.Linear(layer.base.in_features, layer.base.out_features, bias=layer.base.bias is not None)
        linear.load_state_dict({"weight": weight.detach()} | ({"bias": layer.base.bias} if layer.base.bias is not None else {}))
        return linear

    def divided_first(x, weight, eps=1e-6):
        top = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-20)
        small = x.float() / top
        return (small / (small.square().mean(-1, keepdim=True) + eps / top.square()).sqrt() * weight).to(x.dtype)

    def ignored(logits, ids, lengths):
        labels = ids.clone()
        for row, length in zip(labels, lengths, strict=True):
            row[length:] = -100
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def normal_a(inputs, outputs, rank):
        a, b = nn.Parameter(torch.empty(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))
        return nn.init.normal_(a, std=0.3), b

    for name, answer in (
        ("merged_is_worse", scaled_in_pieces),
        ("zero_tokens", divided_first),
        ("loss_by_batching", ignored),
        ("flat_loss", normal_a),
    ):
        for seed in range(3):
            find(name).check._judge(answer, seed)


@pytest.mark.parametrize(
    "name, hide",
    [
        ("loss_by_batching", lambda loss: lambda *a: loss(*a).clamp(min=3.0)),
        ("loss_by_batching", lambda loss: lambda *a: loss(*a) * 0 + 3.5),
        ("zero_tokens", lambda norm: lambda *a: norm(*a).nan_to_num() + 1e-3),
        ("b_stays_zero", lambda prepare: lambda model, lr: prepare(model, 100 * lr)),
        ("ewc_forgets", lambda fisher: lambda *a: [1000 * each for each in fisher(*a)]),
        ("merged_is_worse", lambda merged: lambda layer: type("Linear", (type(layer),), {})(layer.base, layer.A.shape[0], 1.0)),
    ],
)
def test_hiding_a_symptom_is_refused_also_where_nobody_named_it(name, hide):
    case = find(name)
    with pytest.raises(NotYet):
        case.check._judge(hide(broken(case)), 0)


def test_names_and_their_mistakes():
    assert find("flat-loss") == find("flat_loss") in CASES
    with pytest.raises(CourseError, match=r"no case 'flat'\. Cases: b_stays_zero, "):
        find("flat")


def test_a_case_is_shown_saved_and_judged(tmp_path):
    def course(*arguments):
        result = CliRunner().invoke(app, ["case", *map(str, arguments)], env={"COLUMNS": "200"})
        return result.exit_code, result.output + str(result.exception or "")

    status, printed = course()
    assert status == 0 and all(case.name in printed for case in CASES) and "course case NAME" in printed
    status, printed = course("second-evaluation")
    seen = find("second_evaluation").shows().splitlines()[3]
    assert status == 0 and seen in printed and "def merge(self)" in printed
    mine = tmp_path / "mine.py"
    assert course("second-evaluation", "--save", mine)[0] == 0 and mine.read_text() == find("second_evaluation").text
    assert "is there already" in course("second-evaluation", "--save", mine)[1]
    status, printed = course("second-evaluation", "--check", mine)
    assert status == 1 and "merge adds the update again" in printed and seen in printed
    mine.write_text(find("second_evaluation").text.replace("self.base.weight +=", "1 / 0 +"))
    status, printed = course("second-evaluation", "--check", mine)
    assert status == 1 and "Not yet" in printed and "ZeroDivisionError" in printed
    mine.write_text(find("second_evaluation").text)
    mended = mine.read_text().replace("self.base.weight +=", "self.base.weight += (not self.merged) *")
    mine.write_text(mended.replace("self.base.weight -=", "self.base.weight -= self.merged *"))
    status, printed = course("second-evaluation", "--check", mine)
    assert status == 0 and "✓" in printed and "second evaluation error 0.01" in printed
    status, printed = course("second-evaluation", "--fix")
    assert status == 0 and "asks it" in printed and "super().merge()" in printed


@pytest.mark.parametrize(
    "text, words",
    [
        ("x = (", "can't be run: SyntaxError"),
        ("1 / 0", "can't be run: ZeroDivisionError"),
        ("x = 1", "defines no factors"),
        (None, "no file"),
    ],
)
def test_a_file_that_can_not_be_judged_says_why(tmp_path, text, words):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CourseError, match=words):
        find("flat_loss").answer(path)
