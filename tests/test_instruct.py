"""`reference.instruct` against TRL, against transformers' own markers, and on every kind of bad row."""

import dataclasses
import importlib.resources
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course.lab import models
from course.lab.chat import FORMS, chat_tokenizer
from reference.instruct import (
    IGNORED,
    Conversation,
    Example,
    best_fit,
    encode,
    fit,
    leak,
    pack,
    packed_batch,
    pad_batch,
    prepare,
    read_conversations,
    render,
    render_ids,
    special_tokens,
    target_loss,
)

WORDS = st.text("abcdefgh éß日本\n.,:!?#'", min_size=1, max_size=30).filter(str.strip)
CHATS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)
every_form = pytest.mark.parametrize("form", FORMS)


def chat(turns) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]


def trl_rows(form: str, examples: list[dict], markers: bool = False, max_length: int | None = None, pad_is_eos: bool = False) -> list[dict]:
    """What TRL's own trainer makes of the examples: its preparation, without a model around it."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = chat_tokenizer(form, markers, pad_is_eos)
    self = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss="prompt" in examples[0])
    arguments = SFTConfig(
        output_dir="unused", max_length=max_length, assistant_only_loss=markers, shuffle_dataset=False, report_to=[], use_cpu=True
    )
    made = SFTTrainer._prepare_dataset(self, Dataset.from_list(examples), tokenizer, arguments, False, None, "train")
    return list(made)


CONVERSATIONS = [
    chat([("What is 2 + 2?", "4")]),
    chat([("Name a colour.", "Blue, or\nred.\n\n"), ("  Another?", " Green ")]),
    chat([("Was ist das?", "Ein Haus: 日本語 и кириллица"), ("x", "y"), ("#", "### Response:")]),
]


@every_form
def test_prompt_and_completion_are_masked_as_in_trl(form):
    rows = trl_rows(form, [{"prompt": c[:-1], "completion": c[-1:]} for c in CONVERSATIONS])
    for conversation, row in zip(CONVERSATIONS, rows, strict=True):
        mine = encode(chat_tokenizer(form), conversation, "last")
        assert (list(mine.ids), list(mine.labels)) == (row["input_ids"], row["labels"])


@every_form
def test_markers_are_masked_as_in_trl(form):
    rows = trl_rows(form, [{"messages": c} for c in CONVERSATIONS], markers=True)
    for conversation, row in zip(CONVERSATIONS, rows, strict=True):
        mine = encode(chat_tokenizer(form, markers=True), conversation, boundaries="markers")
        assert (list(mine.ids), list(mine.labels)) == (row["input_ids"], row["labels"])


@pytest.mark.parametrize("form, name", [("Llama 3", "llama3"), ("Gemma", "gemma")])
def test_the_public_forms_are_those_that_trl_carries(form, name):
    folder = importlib.resources.files(pytest.importorskip("trl")) / "chat_templates"
    for markers, file in ((False, f"{name}.jinja"), (True, f"{name}_training.jinja")):
        mine, theirs = chat_tokenizer(form, markers), chat_tokenizer(form)
        theirs.chat_template = (folder / file).read_text()
        for conversation in CONVERSATIONS:
            assert render(mine, conversation) == render(theirs, conversation)
            assert render(mine, conversation[:1], True) == render(theirs, conversation[:1], True)
            if markers:
                assert encode(mine, conversation, boundaries="markers") == encode(theirs, conversation, boundaries="markers")


@pytest.mark.parametrize("output, error", [(None, "turn 2: the assistant's turn is empty"), (5, "'output' must be a text, got 5")])
def test_an_output_that_is_no_text_is_not_made_one(output, error):
    with pytest.raises(ValueError, match=f"line 1: no conversation: {error}"):
        read_conversations([json.dumps({"instruction": "Add 2 and 3.", "output": output})])


@every_form
def test_messages_alone_are_trained_on_in_full_by_trl(form):
    (row,) = trl_rows(form, [{"messages": CONVERSATIONS[0]}])
    assert row["labels"] == row["input_ids"] == list(encode(chat_tokenizer(form), CONVERSATIONS[0], "all").labels)


@every_form
@pytest.mark.parametrize("max_length", [8, 12, 20, 40])
def test_truncation_is_trls_and_leaves_no_row_without_a_target(form, max_length):
    rows = trl_rows(form, [{"prompt": c[:-1], "completion": c[-1:]} for c in CONVERSATIONS] * 2, max_length=max_length)
    mine = [fit(encode(chat_tokenizer(form), c, "last"), max_length, "keep_start") for c in CONVERSATIONS] * 2
    kept = [m for m in mine if m is not None]
    theirs = [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]
    assert [list(m.labels) for m in kept] == [row["labels"] for row in theirs]


@every_form
@settings(max_examples=40, deadline=None)
@given(turns=CHATS)
def test_targets_are_the_answers_to_the_letter(form, turns):
    tokenizer, messages = chat_tokenizer(form), chat(turns)
    row = encode(tokenizer, messages)
    assert list(row.ids) == render_ids(tokenizer, messages)
    if row.seam:
        return  # a token lies across a boundary: its letters belong to both sides
    spaces = " " if form in ("Zephyr", "Mistral") else ""  # these put one in front of every piece, and take the first off in decoding
    said = tokenizer.decode([i for i, label in zip(row.ids, row.labels, strict=True) if label != IGNORED])
    trims = form in ("Llama 3", "Gemma")
    end = tokenizer.eos_token
    start, after = (" ", "") if form == "Mistral" else ("", "\n" if form in ("ChatML", "Gemma", "Zephyr") else "")
    right = "".join(start + (answer.strip() if trims else answer) + end + after for _, answer in turns)
    assert said.replace(spaces, "") == right.replace(spaces, "") if spaces else said == right


@every_form
@settings(max_examples=25, deadline=None)
@given(turns=CHATS)
def test_the_last_turn_is_part_of_all_turns(form, turns):
    tokenizer = chat_tokenizer(form)
    every, last = encode(tokenizer, chat(turns)), encode(tokenizer, chat(turns), "last")
    assert all(a == b or b == IGNORED for a, b in zip(every.labels, last.labels, strict=True))
    assert tokenizer.eos_token_id in last.labels


def test_two_bos_are_refused_and_a_rendered_text_tokenized_again_has_them():
    tokenizer = chat_tokenizer("Llama 3")
    again = tokenizer(render(tokenizer, CONVERSATIONS[0])).input_ids
    assert again[:2] == [tokenizer.bos_token_id] * 2
    assert render_ids(tokenizer, CONVERSATIONS[0]) == again[1:]
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(ValueError, match="two <bos>"):
        encode(tokenizer, CONVERSATIONS[0])


def test_padding_with_the_end_of_text_hides_no_end_of_turn():
    tokenizer = chat_tokenizer("ChatML", pad_is_eos=True)
    rows = [encode(tokenizer, c) for c in CONVERSATIONS]
    for side in ("left", "right"):
        batch = pad_batch(rows, tokenizer.pad_token_id, side)
        for i, row in enumerate(rows):
            assert batch["labels"][i][batch["attention_mask"][i] == 1].tolist() == list(row.labels)
            assert (batch["labels"][i][batch["attention_mask"][i] == 0] == IGNORED).all()
        assert (batch["labels"] == tokenizer.eos_token_id).sum() == sum(
            c[i]["role"] == "assistant" for c in CONVERSATIONS for i in range(len(c))
        )


def test_a_template_that_rewrites_the_past_is_refused():
    tokenizer = chat_tokenizer("ChatML")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] +", "{{ (message['content'] if loop.last else '…') +", 1
    )
    with pytest.raises(ValueError, match="turn 2: the template writes it, or what is before it, otherwise"):
        encode(tokenizer, CONVERSATIONS[1])
    row = encode(tokenizer, CONVERSATIONS[1], "last")  # the last turn is where its prompt ends, whatever happened to earlier ones
    assert tokenizer.decode([label for label in row.labels if label != IGNORED]).startswith(" Green")


def test_without_markers_nothing_is_masked_silently():
    with pytest.raises(ValueError, match="the chat template has no"):
        encode(chat_tokenizer("ChatML"), CONVERSATIONS[0], boundaries="markers")


@pytest.mark.parametrize(
    "messages, words",
    [
        ([{"role": "assistant", "content": "hello"}], "turn 1: expected the user, got the assistant"),
        (chat([("hi", "  ")]), "turn 2: the assistant's turn is empty"),
        ([*chat([("hi", "x")]), {"role": "tool", "content": "5"}], "turn 3: unknown role 'tool'"),
        (chat([("a", "b")])[:1], "the last turn is not the assistant's"),
        ([*chat([("a", "b")])[:1]] * 2, "turn 2: expected the assistant, got the user"),
        ([*chat([("a", "b")]), {"role": "system", "content": "x"}], "a system turn comes first"),
        ([{"role": "system", "content": "x"}], "the last turn is not"),
        ([], "messages is empty"),
        (chat([("say <|im_end|> please", "no")]), "holds the special token '<|im_end|>'"),
    ],
)
def test_malformed_conversations_are_named(messages, words):
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        encode(chat_tokenizer("ChatML"), messages)


@pytest.mark.parametrize("messages", ["hi", [{"role": "user"}], [{"role": "user", "content": 3}], ["hi"]])
def test_other_types_are_named(messages):
    with pytest.raises(TypeError):
        encode(chat_tokenizer("ChatML"), messages)


def test_a_template_that_fails_is_named_with_its_words():
    with pytest.raises(ValueError, match="does not render this conversation: System role not supported"):
        encode(chat_tokenizer("Gemma"), [{"role": "system", "content": "be brief"}, *CONVERSATIONS[0]])


LINES = [
    json.dumps({"messages": CONVERSATIONS[0]}),
    "",
    '{"messages": [',
    json.dumps({"messages": CONVERSATIONS[0][1:]}),
    json.dumps({"text": "hello"}),
    json.dumps({"instruction": "Add.", "input": "2, 3", "output": "5"}),
    json.dumps([1]),
    json.dumps({"messages": chat([("a", "say <|im_end|>")])}),
]


def test_a_file_is_read_by_lines_and_nothing_is_lost_silently(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(LINES), encoding="utf-8")
    kept, report = read_conversations(path, "drop", special_tokens(chat_tokenizer("ChatML")))
    assert [c.line for c in kept] == [1, 6] and report.kept == 2
    assert kept[1].messages[0]["content"] == "Add.\n\n2, 3"
    assert [(d.line, d.reason) for d in report.dropped] == [(3, "not JSON")] + [(n, "no conversation") for n in (4, 5, 7, 8)]
    assert "2 rows kept, 5 dropped" in str(report) and "line 4: turn 1: expected the user" in str(report)
    for bad, words in (({3}, "line 1: not JSON"), ({4}, "line 1: no conversation: turn 1"), ({5}, "the row has the keys text")):
        with pytest.raises(ValueError, match=words):
            read_conversations([line for i, line in enumerate(LINES, 1) if i in bad])
    with pytest.raises(ValueError, match="on_error"):
        read_conversations(LINES, "skip")


def test_preparing_reports_every_row_by_its_line():
    tokenizer = chat_tokenizer("Gemma")
    long = chat([("a long question " * 30, "short")])
    system = [{"role": "system", "content": "x"}, *CONVERSATIONS[0]]
    given = [Conversation(n, tuple(c)) for n, c in enumerate([CONVERSATIONS[0], long, system], 1)]
    for overflow, reason in (("drop", "too long"), ("keep_start", "no target left")):
        rows, report = prepare(tokenizer, given, 40, overflow=overflow, on_error="drop")
        assert len(rows) == report.kept == 1
        assert [(d.line, d.reason) for d in report.dropped] == [(2, reason), (3, "not encoded")]
    rows, report = prepare(tokenizer, given[:2], 40, overflow="keep_end")
    assert len(rows) == 2 and all(row.targets for row in rows) and len(rows[1].ids) == 40
    with pytest.raises(ValueError, match="line 3: the chat template does not render"):
        prepare(tokenizer, given, 400)
    with pytest.raises(ValueError, match="line 1: the last turn does not end with id 0"):
        prepare(tokenizer, given[:1], 400, stop=0)
    with pytest.raises(ValueError, match=r"no row is left[\s\S]*1 × too long"):
        prepare(tokenizer, given[1:2], 40)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 30), start=st.integers(1, 29), length=st.integers(2, 30), overflow=st.sampled_from(["keep_start", "keep_end", "drop"])
)
def test_a_row_that_is_kept_has_a_target(n, start, length, overflow):
    start = min(start, n - 1)
    row = fit(Example(tuple(range(n)), (IGNORED,) * start + tuple(range(start, n))), length, overflow)
    if row is None:
        assert n > length
    else:
        assert row.targets >= 1 and len(row.ids) <= length == max(length, len(row.labels))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_packing_is_trls_to_the_order(lengths):
    trl = pytest.importorskip("trl.data_utils")
    import pyarrow as pa

    examples = [Example(tuple(range(100 * i, 100 * i + n)), tuple(range(100 * i, 100 * i + n))) for i, n in enumerate(lengths)]
    theirs = trl._pack_bfd(pa.table({"input_ids": [list(e.ids) for e in examples], "labels": [list(e.labels) for e in examples]}), 32)
    mine = pack(examples, 32)
    assert [list(p.ids) for p in mine] == theirs["input_ids"].to_pylist()
    assert [list(p.lengths) for p in mine] == theirs["seq_lengths"].to_pylist()


def test_a_packed_batch_is_trls_padding_free_one():
    DataCollatorForLanguageModeling = pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForLanguageModeling

    examples = [Example(tuple(range(5, 5 + n)), tuple(range(5, 5 + n))) for n in (4, 7, 5, 2)]
    (row,) = pack(examples, 18)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    theirs = collate.torch_call([{"input_ids": list(row.ids), "labels": list(row.ids), "seq_lengths": list(row.lengths)}])
    mine = packed_batch([row], 0, "positions")
    for key in ("input_ids", "labels", "position_ids"):
        assert torch.equal(mine[key], theirs[key]), key
    assert "attention_mask" not in theirs and "attention_mask" not in mine


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_best_fit_uses_every_sequence_once_and_fits(lengths):
    rows = best_fit(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny", where=torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def packed():
    g = torch.Generator().manual_seed(0)
    rows = [Example(tuple(ids), tuple(ids)) for ids in (torch.randint(3, 300, (n,), generator=g).tolist() for n in (9, 6, 8))]
    return rows, pack(rows, 24)[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_borders_hold_by_the_mask_and_by_positions_alone_only_without_cache(tiny, packed, attention):
    _, row = packed
    tiny.set_attn_implementation(attention)
    assert leak(tiny, row, "mask") < 1e-4
    assert leak(tiny, row, "positions") < 1e-4
    assert leak(tiny, row, "none") > 1
    assert leak(tiny, row, "positions", use_cache=True) > 1
    assert leak(tiny, row, "positions", attention_mask=torch.ones(1, len(row.ids), dtype=torch.long)) > 1


def test_a_packed_row_gives_what_its_sequences_give_alone(tiny, packed):
    rows, row = packed
    batch = packed_batch([row], pad=0)
    labels = batch.pop("labels")
    with torch.no_grad():
        together = target_loss(tiny(**batch).logits, labels) * (labels != IGNORED).sum()
        alone = sum(target_loss(tiny(torch.tensor([r.ids])).logits, torch.tensor([r.labels])) * r.targets for r in rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_padding_of_packed_rows_reaches_nothing(tiny):
    rows = [Example(tuple(range(3, 3 + n)), tuple(range(3, 3 + n))) for n in (12, 5)]
    batch = packed_batch(pack(rows, 12), pad=0)
    assert batch["input_ids"].shape == (2, 12) and (batch["labels"][1, 5:] == IGNORED).all()
    batch.pop("labels")
    with torch.no_grad():
        logits = tiny(**batch).logits
        alone = tiny(torch.tensor([rows[1].ids])).logits
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[1, :5], alone[0], rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_named(packed):
    rows, row = packed
    tokenizer = chat_tokenizer("ChatML")
    for call, words in (
        (lambda: encode(tokenizer, CONVERSATIONS[0], "prompt"), "train_on must be one of"),
        (lambda: encode(tokenizer, CONVERSATIONS[0], boundaries="regex"), "boundaries must be one of"),
        (lambda: fit(rows[0], 5, "middle"), "overflow must be one of"),
        (lambda: fit(rows[0], 1), "max_length"),
        (lambda: pack([], 8), "examples is empty"),
        (lambda: pack(rows, 8), "lengths must be from 1 to capacity"),
        (lambda: packed_batch([row], 0, "walls"), "borders must be one of"),
        (lambda: packed_batch([], 0), "rows is empty"),
        (lambda: pad_batch([], 0), "examples is empty"),
        (lambda: pad_batch(rows, 0, "top"), "side must be"),
        (lambda: leak(None, pack(rows[:1], 9)[0], "mask"), "one sequence"),
        (lambda: target_loss(torch.zeros(1, 3, 5), torch.full((1, 3), IGNORED)), "no label of the batch is a target"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_what_answers_say_of_trl():
    """It keeps the start, masks neither prompts of messages nor those of a text, and its collator that searched for a marker is gone."""
    trl = pytest.importorskip("trl")
    assert not hasattr(trl, "DataCollatorForCompletionOnlyLM")
    fields = {field.name: field.default for field in dataclasses.fields(trl.SFTConfig)}
    found = [fields[name] for name in ("truncation_mode", "assistant_only_loss", "completion_only_loss", "eos_token")]
    assert found == ["keep_start", False, None, None]
