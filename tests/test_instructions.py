"""Instructions in the small world, the five templates, and the benchmarks that are made of both."""

import random
import re
import sys

import pytest
import torch

from benchmarks import gemma_instructions, instruction_tuning
from course.claims import instruction_tuning as claims
from course.lab import instructions, recorded
from course.lab.chat import FORMS, chat_tokenizer, template
from reference.instruct import IGNORED, has_markers
from reference.self_instruct import rouge_l, task_faults


@pytest.mark.parametrize("form", FORMS)
def test_a_form_comes_with_and_without_markers_and_renders_alike(form):
    assert has_markers(template(form, True)) and not has_markers(template(form))
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]
    texts = [chat_tokenizer(form, markers).apply_chat_template(messages, tokenize=False) for markers in (False, True)]
    assert texts[0] == texts[1] and "[[" not in texts[0]
    assert chat_tokenizer(form, pad_is_eos=True).pad_token_id == chat_tokenizer(form).eos_token_id


def test_an_unknown_form_and_kind_are_named():
    with pytest.raises(ValueError, match="form must be one of ChatML"):
        chat_tokenizer("Vicuna")
    with pytest.raises(ValueError, match="kind must be one of job"):
        instructions.task("poem", random.Random(0))


def test_held_out_people_are_in_no_training_row():
    train = " ".join(task.instruction for task in instructions.tasks(600, 0))
    test = " ".join(task.instruction for task in instructions.tasks(600, 0, held_out=True))
    assert not set(instructions.HELD_OUT) & set(train.split())
    assert set(instructions.HELD_OUT) <= set(test.split())


def test_a_share_of_wrong_answers_is_wrong():
    right, wrong = instructions.tasks(300, 0), instructions.tasks(300, 0, wrong=0.5)
    assert [a.instruction for a in right] == [b.instruction for b in wrong]
    assert 90 < sum(a.output != b.output for a, b in zip(right, wrong, strict=True)) <= 150


def test_every_word_is_known_and_answers_are_targets():
    words = instructions.tokenizer()
    for task, row in zip(made := instructions.tasks(120, 3), instructions.encoded(made), strict=True):
        assert words.unk_token_id not in row.ids
        assert words.decode([label for label in row.labels if label != IGNORED]) == f"{task.output} <end>"


def test_only_factors_and_the_marks_rows_are_trained():
    net = instructions.adaptable(0)
    before = [layer.weight.clone() for layer in (net.get_input_embeddings(), net.get_output_embeddings())]
    instructions.tune(net, instructions.encoded(instructions.tasks(32, 0)), 3, 0)
    for old, layer in zip(before, (net.get_input_embeddings(), net.get_output_embeddings()), strict=True):
        assert torch.equal(old[:-3], layer.weight[:-3]) and not torch.equal(old[-3:], layer.weight[-3:])


def test_kinds_of_data_have_the_same_size():
    good = instruction_tuning.rows_of({"data": "good", "rows": 24}, 0)
    plain = instruction_tuning.rows_of({"data": "pre-training text", "rows": 24}, 0)
    assert [len(row.ids) for row in good] == [len(row.ids) for row in plain]
    assert all(row.targets == len(row.ids) - 1 for row in plain)
    end = instructions.tokenizer().eos_token_id
    assert not any(end in row.labels for row in instruction_tuning.rows_of({"data": "no end of turn", "rows": 24}, 0))


def test_generated_instructions_are_well_formed_and_split_by_module():
    pairs, dropped = gemma_instructions.generated(gemma_instructions.TRAIN[:30], 12, 0, False)
    asked, _ = gemma_instructions.generated(gemma_instructions.TEST, 6, 1, True)
    assert {kind for kind, _ in pairs} == {kind for kind, _ in asked} == set(gemma_instructions.ASK) and "near-copy of another" in dropped
    assert not set(gemma_instructions.TRAIN) & set(gemma_instructions.TEST)
    for kind, task in [*pairs, *asked]:
        assert not task_faults(task)
        assert re.fullmatch(gemma_instructions.FORM[kind], task.output), (kind, task)
    assert not {task.instruction for _, task in pairs} & {task.instruction for _, task in asked}  # other words, too


def test_what_the_lesson_says_of_gemma():
    """What every seed shows, what seeds leave open, how near the libraries' run is, and what became of the teacher's words."""
    full, result = "full fine-tuning", recorded.load("gemma_instructions", "h200")["result"]
    assert [len(claims.gemma_runs(method)) for method in (claims.OURS, full, claims.LIBRARIES)] == [3, 3, 1]
    assert claims.gemma_prompted(0) < 1 < claims.gemma_prompted(7) < 0.5 * claims.gemma(full, of="least")
    assert claims.gemma(full, of="least") < claims.gemma(claims.OURS, of="least") < claims.gemma(full, of="most")  # they overlap
    assert all(claims.gemma(method, kind="count", of="most") <= 10 for method in (claims.OURS, full, claims.LIBRARIES))
    assert claims.gemma_english(claims.OURS, of="least") > 5 * claims.gemma_english(full, of="most")
    for what in ("cloze", "pairs"):
        assert claims.gemma_english(claims.OURS, what, "most") < claims.gemma_english(full, what, "least")
    assert claims.loss_apart() < 0.2 * claims.seeds_apart()
    assert claims.gemma(claims.OURS, of="least") < claims.gemma(claims.LIBRARIES) < claims.gemma(claims.OURS, of="most")
    said = [sample["said"] for sample in result["prompted"][0]["samples"]]
    assert sum(words in ("1.", "") for words in said) == len(said) - 1
    after = {sample["asked"]: sample["said"] for sample in claims.gemma_runs(claims.OURS)[0]["samples"]}
    assert after["Spell the name in capitals.\n\nleapdays"] == "LEAPDAYS"
    assert after["Give the number of its parameters.\n\ndef weekday(year, month, day)"] == "year, month, day"
    (kept,) = result["teacher"]["tasks"]
    assert kept["output"] == "I am a negative person." and claims.teacher("kept") + claims.teacher("dropped") == 13
    assert any(rouge_l("Write a sentence in the past tense.", task.instruction) > 0.7 for task in gemma_instructions.SEEDS)


def test_the_dry_run_goes_through_every_part(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gemma_instructions", "--smoke", "--out", str(tmp_path)])
    gemma_instructions.main()
    result = recorded.load("gemma_instructions", folder=tmp_path)["result"]
    assert {row["method"] for row in result["runs"]} == set(gemma_instructions.METHODS)
    assert not [row for row in [*result["runs"], *result["prompted"], result["base"], result["teacher"]] if "error" in row]
    assert result["teacher"]["calls"] == 2 and all(len(row["losses"]) == result["settings"]["steps"] for row in result["runs"])
