"""What unit 12 states: the study in the small world, leaks of packed rows, ROUGE's blind spots, what padding costs."""

import functools
import itertools
import statistics

import numpy as np
import torch

from course.lab import instructions, models, recorded, training
from course.lab.chat import chat_tokenizer
from reference.instruct import IGNORED, Example, best_fit, leak, pack, pad_batch, render, render_ids
from reference.self_instruct import latin_words, rouge_l, signature, similarity

ASKED = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
SENTENCES = {  # pairs that a novelty filter has to judge
    "the same in Chinese": ("请把这句话翻译成英文", "请把这句话翻译成英文"),
    "one word changed": ("Write a short poem about the sea", "Write a short poem about the moon"),
    "a paraphrase": ("Write a short poem about the sea", "Compose brief verses on the ocean"),
}


# The study


def runs(data: str = "good", rows: int = 192) -> list[dict]:
    """The recorded runs of a setting, one for each seed."""
    found = recorded.load("instruction_tuning", "cpu")["result"]["rows"]
    return [row for row in found if (row["data"], row["rows"]) == (data, rows)]


def study(data: str = "good", rows: int = 192, what: str = "right", of: str = "mean") -> float:
    """Over seeds the "mean", "least" or "most": shares in percent; "general", what is lost on pre-training text, in nats per token."""
    values = [row[what] for row in runs(data, rows)]
    value = {"mean": statistics.fmean, "least": min, "most": max}[of](values)
    return value if what in ("general", "loss", "tokens") else 100 * value


def before(what: str = "right") -> float:
    """Of the pre-trained model: shares in percent."""
    return 100 * recorded.load("instruction_tuning", "cpu")["result"]["before"][what]


def good_beat_bad(few: int, many: int) -> bool:
    """Every seed with so few good rows beats every seed with so many of which 40 % are wrong."""
    return study("good", few, of="least") > study("40% wrong", many, of="most") - 1e-9


# A real model: Gemma 3 270M

OURS, LIBRARIES = "LoRA on NF4", "LoRA on NF4, peft + bitsandbytes"
_OF = {"mean": statistics.fmean, "least": min, "most": max}


@functools.cache
def _gemma() -> dict:
    return recorded.load("gemma_instructions", "h200")["result"]


def gemma_runs(method: str) -> list[dict]:
    """The recorded runs of a method, one for each seed."""
    found = [run for run in _gemma()["runs"] if run["method"] == method]
    assert found, f"no runs of {method!r}"
    return found


def gemma(method: str, what: str = "right", of: str = "mean", kind: str = "") -> float:
    """Percent of the test's instructions with "form", "right" or "stops": over seeds the "mean", "least" or "most"; of all kinds or one."""
    shares = [run["followed"]["by_kind"][kind] if kind else run["followed"]["all"] for run in gemma_runs(method)]
    return 100 * _OF[of](share[what] for share in shares)


def gemma_prompted(examples: int, what: str = "right") -> float:
    """The same of the base, with so many solved examples in its prompt."""
    (row,) = (row for row in _gemma()["prompted"] if row["method"].startswith(f"base, {examples} "))
    return 100 * row["followed"]["all"][what]


def gemma_english(method: str, what: str = "passages", of: str = "mean") -> float:
    """After training: "passages", nats per token lost of English prose; "cloze" or "pairs", percent right."""
    values = [run["english"][what] for run in gemma_runs(method)]
    return _OF[of](values) - _gemma()["base"][what] if what == "passages" else 100 * _OF[of](values)


def gemma_before(what: str) -> float:
    """Of the base: "cloze" or "pairs", percent right."""
    return 100 * _gemma()["base"][what]


def gemma_rates(one: str = OURS, other: str = "full fine-tuning") -> float:
    """The learning rate of one method over the other's."""
    return gemma_runs(one)[0]["lr"] / gemma_runs(other)[0]["lr"]


def gemma_rows() -> int:
    """Instructions to train on."""
    return _gemma()["instructions"]["rows"]


def loss_apart(one: str = OURS, other: str = LIBRARIES) -> float:
    """How far losses differ in a step, nats per token, mean of all steps: the same seed, so the same rows."""
    pairs = zip(gemma_runs(one)[0]["losses"], gemma_runs(other)[0]["losses"], strict=True)
    return statistics.fmean(abs(a - b) for a, b in pairs)


def seeds_apart(method: str = OURS) -> float:
    """The same between two seeds of a method, which see the rows in another order: mean of all pairs."""
    pairs = itertools.combinations([run["losses"] for run in gemma_runs(method)], 2)
    return statistics.fmean(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


def teacher(what: str) -> int:
    """Gemma's base in the loop of Self-Instruct: "calls", "kept", or what was "dropped" as a near-copy."""
    found = _gemma()["teacher"]
    return sum(found["counts"].values()) if what == "dropped" else found[what]


# Masks


@functools.cache
def ends(by_id: bool) -> int:
    """How many ends of turn are targets in a padded batch of 8 instructions, with padding = end of text."""
    words_of = instructions.tokenizer()
    rows = instructions.encoded(instructions.tasks(8, 0))
    batch = pad_batch(rows, words_of.eos_token_id)
    labels = batch["labels"]
    if by_id:
        labels = labels.masked_fill(batch["input_ids"] == words_of.eos_token_id, IGNORED)
    return int((labels == words_of.eos_token_id).sum())


def first_tokens(again: bool) -> int:
    """How many <bos> a Llama 3 conversation starts with; ``again``: rendered to text and tokenized as any text."""
    tokenizer = chat_tokenizer("Llama 3")
    ids = tokenizer(render(tokenizer, ASKED)).input_ids if again else render_ids(tokenizer, ASKED)
    return ids[:3].count(tokenizer.bos_token_id)


def marked_without_markers() -> int:
    """How many tokens the library's own mask marks in a conversation whose template has no {% generation %} block."""
    tokenizer = chat_tokenizer("ChatML")
    return sum(tokenizer.apply_chat_template(ASKED, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"])


def marker_differs() -> bool:
    """A marker tokenized alone is not among the tokens of a text that holds it."""
    tokenizer = chat_tokenizer("Zephyr")
    marker, text = "### Response:\n", "Add 2 and 2.\n\n### Response:\n\n4"
    alone, inside = (tokenizer(t, add_special_tokens=False).input_ids for t in (marker, text))
    return not any(inside[i : i + len(alone)] == alone for i in range(len(inside)))


# Packing


@functools.cache
def leaks(borders: str = "mask", cache: bool = False, ones: bool = False) -> float:
    """How far logits of one packed sequence move when another changes: the tiny model, three sequences."""
    model, _ = models.load("tiny", where=torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    rows = [Example(tuple(ids), tuple(ids)) for ids in (torch.randint(3, 300, (n,), generator=g).tolist() for n in (9, 6, 8))]
    (row,) = pack(rows, 24)
    settings = {"use_cache": cache} | ({"attention_mask": torch.ones(1, 23, dtype=torch.long)} if ones else {})
    return leak(model, row, borders, **settings)


@functools.cache
def _lengths() -> tuple[int, ...]:
    drawn = np.random.default_rng(0).lognormal(np.log(150), 0.9, 2048).astype(int)
    return tuple(drawn[(drawn >= 8) & (drawn <= 1024)].tolist())


def wasted_percent(packed: bool = False, batch: int = 16) -> float:
    """Of the places of batches that are padding: random batches padded to their longest, or rows of 1,024 packed best-fit."""
    lengths = _lengths()
    if packed:
        return 100 * (1 - sum(lengths) / (1024 * len(best_fit(lengths, 1024))))
    places = sum(max(part) * len(part) for part in (lengths[i : i + batch] for i in range(0, len(lengths), batch)))
    return 100 * (1 - sum(lengths) / places)


# Novelty


def rouge(pair: str) -> float:
    """ROUGE-L of one of ``SENTENCES``, 0 to 1, by the usual scorer, which reads a–z and 0–9."""
    return rouge_l(*SENTENCES[pair], latin_words)


def minhash_error(size: int = 128) -> float:
    """Standard error of the estimate of a similarity of one half."""
    return (0.25 / size) ** 0.5


def minhash_is_near() -> bool:
    """The estimate from 1,024 numbers lies within four standard errors of a similarity of one third."""
    a, b = ({str(i) for i in range(start, start + 100)} for start in (0, 50))
    return abs(similarity(signature(a, 1024), signature(b, 1024)) - 1 / 3) < 4 * (2 / 9 / 1024) ** 0.5


def facts_known() -> float:
    """Of the small world's facts, what the pre-trained model says right in the form of its text, percent."""
    model, _ = models.load("tiny", where=torch.device("cpu"))
    return 100 * training.fact_accuracy(model, instructions.world())
