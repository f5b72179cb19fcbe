"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused. And the judges' answers are the reference's."""

import re

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from course.checking import NotYet, mistaken
from course.checks import instruction_tuning as check
from course.checks.instruction_tuning.borders import pack_rows
from course.checks.instruction_tuning.collate import collate
from course.checks.instruction_tuning.fitting import fit_rows
from course.checks.instruction_tuning.novel import keep, longest
from course.checks.instruction_tuning.targets import labels
from course.checks.instruction_tuning.tokens import to_ids
from reference.instruct import render_ids, shared

ALL = (check.borders, check.collate, check.fitting, check.novel, check.targets, check.tokens)


def passes(judge, answer):
    for seed in range(5):
        judge._judge(answer, seed)


def refused(judge, answer) -> str:
    said = []
    for seed in range(5):
        with pytest.raises(NotYet) as caught:
            judge._judge(answer, seed)
        said.append(str(caught.value))
    return said[0]


@pytest.mark.parametrize("judge", ALL)
def test_another_seed_is_another_question(judge):
    seen = [repr(judge._run(judge.reference, seed)) for seed in (1, 2)]
    assert seen[0] != seen[1]


# right ones


def padded_by_torch(rows, pad):
    from torch.nn.utils.rnn import pad_sequence

    ids, labels = ([torch.tensor(row[i]) for row in rows] for i in (0, 1))
    ones = [torch.ones_like(each) for each in ids]
    values = zip((ids, ones, labels), (pad, 0, -100), strict=True)
    padded = [pad_sequence(each, batch_first=True, padding_value=value) for each, value in values]
    return dict(zip(("input_ids", "attention_mask", "labels"), padded, strict=True))


def borders_by_loops(rows):
    n = sum(map(len, rows))
    mask, start = torch.zeros(n, n, dtype=torch.bool), 0
    for row in rows:
        for i in range(len(row)):
            mask[start + i, start : start + i + 1] = True
        start += len(row)
    flat = torch.from_numpy(np.concatenate(rows))
    positions = torch.tensor([i for row in rows for i in range(len(row))])
    labels = torch.where(positions == 0, torch.tensor(-100), flat)
    return {"mask": mask, "labels": labels, "position_ids": positions, "input_ids": flat}


def labels_from_the_end(tokenizer, messages):
    found = [-100] * len(render_ids(tokenizer, messages))
    for turn in range(len(messages) - 1, 0, -2):  # they end with the assistant's
        prompt, upto = render_ids(tokenizer, messages[:turn], True), render_ids(tokenizer, messages[: turn + 1])
        start = next(i for i in range(len(upto)) if i >= len(prompt) or prompt[i] != upto[i])
        found[start : len(upto)] = upto[start:]
    return found


def fit_with_a_loop(rows, max_length):
    kept, dropped, i = [], [], 0
    while i < len(rows):
        ids, labels = (list(each)[:max_length] for each in rows[i])
        (kept.append((ids, labels)) if set(labels[1:]) - {-100} else dropped.append(i))
        i += 1
    return [kept, dropped]


def labels_by_characters(tokenizer, messages):
    """Each token that reaches into a turn of the assistant."""

    def rendered(part, prompt=False):
        return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)

    whole = tokenizer(rendered(messages), add_special_tokens=False, return_offsets_mapping=True)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [(len(rendered(messages[:i], True)), len(rendered(messages[: i + 1]))) for i in turns]
    pairs = zip(whole["input_ids"], whole["offset_mapping"], strict=True)
    return [token if any(first < end and last > start for start, end in spans) else -100 for token, (first, last) in pairs]


@pytest.mark.parametrize(
    "judge, answer",
    [
        (check.collate, padded_by_torch),
        (check.collate, lambda rows, pad: BatchEncoding(collate(rows, pad))),
        (check.targets, labels_by_characters),
        (check.borders, borders_by_loops),
        (check.targets, labels_from_the_end),
        (check.fitting, fit_with_a_loop),
        (check.tokens, lambda tokenizer, messages: tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]),
        (check.tokens, lambda tokenizer, messages: tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True).input_ids),
    ],
)
def test_right_answers_in_other_dress_pass(judge, answer):
    passes(judge, answer)


# sly ones


def changes_its_rows(rows, pad):
    batch = collate([(list(ids), list(labels)) for ids, labels in rows], pad)
    rows[0][1][:] = [-100] * len(rows[0][1])
    return batch


def keeps_the_last_end(rows, pad):
    """Masks by id, then puts the last end of each row back."""
    batch = collate(rows, pad)
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == pad, -100)
    for i, (ids, _) in enumerate(rows):
        batch["labels"][i, len(ids) - 1] = ids[-1]
    return batch


def without_doubled_bos(tokenizer, messages):
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    return ids[1:] if ids[0] == ids[1] else ids


@pytest.mark.parametrize(
    "judge, answer",
    [
        (check.collate, keeps_the_last_end),
        (check.collate, lambda rows, pad: {**collate(rows, pad), "labels": collate(rows, pad)["labels"].float()}),
        (check.collate, lambda rows, pad: list(collate(rows, pad).values())),
        (check.tokens, without_doubled_bos),  # some templates write no <bos> at all
        (check.tokens, lambda tokenizer, messages: torch.tensor(to_ids(tokenizer, messages))),
        (check.tokens, lambda tokenizer, messages: [to_ids(tokenizer, messages)]),
        (check.targets, lambda tokenizer, messages: [-100 if i % 2 else label for i, label in enumerate(labels(tokenizer, messages))]),
        (check.targets, lambda tokenizer, messages: labels(tokenizer, messages)[1:]),
        (check.fitting, lambda rows, n: ([row for row in fit_rows(rows, n)[0]][::-1], fit_rows(rows, n)[1])),
        (check.fitting, lambda rows, n: fit_rows(rows, n + 1)),
        (check.fitting, lambda rows, n: fit_rows(rows, n)[0]),
        (check.borders, lambda rows: {**pack_rows(rows), "mask": pack_rows(rows)["mask"].float()}),
        (check.borders, lambda rows: {**pack_rows(rows), "labels": pack_rows(rows)["input_ids"]}),
        (check.novel, lambda pool, pairs, threshold: pairs),
        (check.novel, lambda pool, pairs, threshold: keep(pool, pairs, 0.7)),
        (check.novel, lambda pool, pairs, threshold: [text for text, _ in keep(pool, pairs, threshold)]),
        (check.novel, lambda pool, pairs, threshold: sorted(keep(pool, pairs, threshold))),
    ],
)
def test_sly_answers_are_refused(judge, answer):
    assert refused(judge, answer)


def ends_with_a_target(rows, max_length):
    cut = [(ids[:max_length], labels[:max_length]) for ids, labels in rows]
    return [row for row in cut if row[1][-1] != -100], [i for i, row in enumerate(cut) if row[1][-1] == -100]


def every_second_message(tokenizer, messages):
    ids, found = render_ids(tokenizer, messages), []
    for i in range(1, len(messages), 2):
        start, end = (shared(render_ids(tokenizer, *part), ids) for part in ((messages[:i], True), (messages[: i + 1],)))
        found += [-100] * (start - len(found)) + ids[start:end]
    return found + [-100] * (len(ids) - len(found))


def by_length(tokenizer, messages):
    return labels(tokenizer, messages, start=lambda prompt, ids: len(prompt))


def remembers_all(pool, pairs, threshold):
    """An instruction whose answer is given away is not kept, and yet compared with."""
    seen, kept = list(pool), []
    for pair in pairs:
        if keep(seen, [(pair[0], "")], threshold):
            seen.append(pair[0])
            kept += keep([], [pair], threshold)
    return kept


def shifted(rows):
    batch = pack_rows(rows)
    return {**batch, "labels": torch.cat([batch["input_ids"][1:], torch.tensor([-100])])}


def first_and_last(rows):
    """Masks the last token of each sequence in place of the first."""
    batch = pack_rows(rows)
    starts = (batch["position_ids"] == 0).nonzero().flatten()
    ends = torch.cat([starts[1:], torch.tensor([len(batch["input_ids"])])]) - 1
    return {**batch, "labels": batch["input_ids"].clone().index_fill_(0, ends, -100)}


@pytest.mark.parametrize(
    "judge, answer, words",
    [
        (check.borders, shifted, "over the borders"),
        (check.borders, first_and_last, "the last token of a sequence"),
        (check.fitting, ends_with_a_target, "only the last label was looked at"),
        (check.fitting, lambda rows, n: ([i for i in range(3)], []), "each a pair of its ids and its labels"),
        (check.fitting, lambda rows, n: ([(3, 4)], []), "a pair of two lists"),
        (check.targets, every_second_message, "look at the role"),
        (check.targets, by_length, "an answer's first word is lost"),
        (check.targets, lambda tokenizer, messages: torch.tensor(labels(tokenizer, messages)), "not Tensor"),
        (check.tokens, without_doubled_bos, "one of two <bos> is taken off"),
        (check.tokens, lambda tokenizer, messages: tokenizer("a"), 'not BatchEncoding: of what the tokenizer gives take ["input_ids"]'),
        (check.tokens, lambda tokenizer, messages: [7, *to_ids(tokenizer, messages)], "the first tokens, "),
        (check.collate, keeps_the_last_end, "the last end of text of a row is kept"),
        (check.collate, lambda rows, pad: collate(rows, pad) | {"more": 1}, "too many: more"),
        (check.borders, lambda rows: {"attention_mask": 1} | pack_rows(rows), "too many: attention_mask"),
        (check.novel, remembers_all, 'with the output "Never." is kept at 0.700: expected True, got False'),
        (check.novel, lambda pool, pairs, threshold: [3], "pairs (instruction, output)"),
        (check.novel, mistaken(keep, given=lambda answer, asked: longest(answer, asked) == len(answer)), "stand between its own"),
        (check.novel, mistaken(keep, least=4), "exactly three"),
        (check.novel, mistaken(keep, given=lambda answer, asked: all(word in asked for word in answer)), "one behind the other"),
        (check.novel, mistaken(keep, score=lambda common, m, n: common / max(m, n)), "the longer text"),
        (check.novel, mistaken(keep, tokens=lambda text: re.findall(r"\w+", text.lower())), "of its own"),
    ],
)
def test_a_mistake_is_named(judge, answer, words):
    assert words in refused(judge, answer)


def test_changing_what_was_given_is_said_first():
    assert "changed in place" in refused(check.collate, changes_its_rows)


def test_a_hidden_symptom_is_named():
    def nan_to_zero(rows, max_length):
        return [(ids[:max_length], labels[:max_length]) for ids, labels in rows], []

    assert "turning NaN into 0 hides" in refused(check.fitting, nan_to_zero)

    def own_pad(rows, pad):
        return collate(rows, pad + 1)

    assert "hides the symptom" in refused(check.collate, own_pad)
