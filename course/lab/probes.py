"""What a causal language model knows, asked without letting it write: by the probability it gives to candidates.

- :func:`cloze_accuracy`: facts with one right answer and three wrong ones of the same kind. Chance is 25 %.
- :func:`minimal_pair_accuracy`: a grammatical sentence against one that differs in one point and is wrong. Chance is 50 %.
- :func:`perplexity`: how well a text is predicted, per token and, to compare models with different tokenizers, per byte.

The questions are in ``data/cloze_facts.yaml`` and ``data/minimal_pairs.yaml``. Any model of transformers with a causal head does, on any
device and in any dtype; logits are taken to float32 before the softmax.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DATA = Path(__file__).parent / "data"


class Fact(NamedTuple):
    category: str
    prompt: str
    answer: str
    distractors: tuple[str, ...]


class Pair(NamedTuple):
    category: str
    good: str
    bad: str


class Scored(NamedTuple):
    """One candidate: the log-probability of all its tokens, in nats, and how many tokens and characters those are."""

    log_prob: float
    tokens: int
    characters: int


@functools.cache
def cloze_facts() -> tuple[Fact, ...]:
    """The course's cloze questions."""
    groups = yaml.safe_load((_DATA / "cloze_facts.yaml").read_text(encoding="utf-8"))
    return tuple(Fact(group, f["prompt"], f["answer"], tuple(f["distractors"])) for group, facts in groups.items() for f in facts)


@functools.cache
def minimal_pairs() -> tuple[Pair, ...]:
    """The course's grammatical minimal pairs."""
    groups = yaml.safe_load((_DATA / "minimal_pairs.yaml").read_text(encoding="utf-8"))
    return tuple(Pair(group, pair["good"], pair["bad"]) for group, pairs in groups.items() for pair in pairs)


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share (1927), 95 % by default: unlike p ± z·sd it stays inside 0 to 1 and holds near both ends."""
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"right must be between 0 and total, and total above 0; got {right} of {total}")
    p, half = right / total, z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + half / (2 * total))
    low, high = (p + half - spread) / (1 + 2 * half), (p + half + spread) / (1 + 2 * half)
    return max(0.0, low), min(1.0, high)


@dataclass(frozen=True)
class ProbeResult:
    """The candidates' scores of every question; the right candidate of each comes first.

    Two ways to choose. By the *sum* of the log-probabilities of a candidate's tokens (``accuracy``): the probability of the text itself,
    which favours short candidates where lengths differ. By the sum *per character* (``accuracy_per_character``), which doesn't depend on
    how a tokenizer cuts words. A tie counts as wrong, so that a model that tells nothing apart gets 0, not 1.
    """

    categories: tuple[str, ...]
    scores: tuple[tuple[Scored, ...], ...]

    @property
    def correct(self) -> tuple[bool, ...]:
        return tuple(right.log_prob > max(s.log_prob for s in wrong) for right, *wrong in self.scores)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.scores)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of ``accuracy`` (Wilson): what another sample of as many questions could have given."""
        return wilson(sum(self.correct), len(self.scores))

    @property
    def accuracy_per_character(self) -> float:
        per = [[s.log_prob / s.characters for s in candidates] for candidates in self.scores]
        return sum(right > max(wrong) for right, *wrong in per) / len(per)

    @property
    def nats(self) -> float:
        """Mean −ln of the probability that the right candidate has *among the candidates*; ln 4 or ln 2 is chance.

        A model that forgets shows it here long before its choices change.
        """
        logits = [torch.tensor([s.log_prob for s in candidates], dtype=torch.float64) for candidates in self.scores]
        return -sum(x.log_softmax(0)[0].item() for x in logits) / len(logits)

    @property
    def by_category(self) -> dict[str, tuple[int, int]]:
        """Category -> (right, questions), in the order of the data."""
        found = {category: [0, 0] for category in self.categories}
        for category, right in zip(self.categories, self.correct, strict=True):
            found[category][0] += right
            found[category][1] += 1
        return {category: (right, total) for category, (right, total) in found.items()}

    def changes(self, before: "ProbeResult") -> tuple[int, int]:
        """(lost, gained): questions right before and wrong now, and the other way round. The difference of two accuracies hides both."""
        if len(before.scores) != len(self.scores):
            raise ValueError(f"results of {len(before.scores)} and of {len(self.scores)} questions can't be compared one by one")
        pairs = list(zip(before.correct, self.correct, strict=True))
        return pairs.count((True, False)), pairs.count((False, True))


@dataclass(frozen=True)
class Perplexity:
    """How well a text was predicted: ``nats`` in all, over so many tokens, characters and bytes (UTF-8) of it."""

    nats: float
    tokens: int
    characters: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def nats_per_character(self) -> float:
        return self.nats / self.characters

    @property
    def bits_per_byte(self) -> float:
        """The measure that compares models with different tokenizers."""
        return self.nats / self.bytes / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(nats per token): as unsure as when choosing among so many equally likely tokens."""
        return math.exp(self.nats_per_token)


def cloze_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact] | None = None,
    *,
    with_prompt: bool = True,
    batch_tokens: int = 2048,
) -> ProbeResult:
    """Score each fact's answer and distractors as continuations of its prompt.

    Args:
        facts: default: the course's own.
        with_prompt: False scores the bare candidates, which is what knowing how common the words are would give.
        batch_tokens: padded tokens in one forward pass; a vocabulary of 262,144 makes 1 MB of float32 logits of every one.
    """
    facts = cloze_facts() if facts is None else facts
    prompts = [fact.prompt if with_prompt else "" for fact in facts]
    candidates = [[f" {word}" for word in (fact.answer, *fact.distractors)] for fact in facts]
    scores = continuations_log_prob(model, tokenizer, prompts, candidates, batch_tokens=batch_tokens)
    return ProbeResult(tuple(fact.category for fact in facts), tuple(map(tuple, scores)))


def minimal_pair_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair] | None = None, *, batch_tokens: int = 2048
) -> ProbeResult:
    """Score both whole sentences of each pair. Arguments as for :func:`cloze_accuracy`."""
    pairs = minimal_pairs() if pairs is None else pairs
    candidates = [[pair.good, pair.bad] for pair in pairs]
    scores = continuations_log_prob(model, tokenizer, [""] * len(pairs), candidates, batch_tokens=batch_tokens)
    return ProbeResult(tuple(pair.category for pair in pairs), tuple(map(tuple, scores)))


def continuations_log_prob(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    continuations: Sequence[Sequence[str]],
    *,
    batch_tokens: int = 2048,
) -> list[list[Scored]]:
    """log p(continuation | prompt) of several continuations of each prompt, batched with padding on the right.

    Prompt and continuation are cut into tokens *together*, since that is what the model saw in training. Where a tokenizer joins the end of
    a prompt to a continuation, all continuations of that prompt are scored from the first token that differs from the prompt's own, so
    that they remain comparable. The tokenizer's <bos> is put in front, where it has one; without it, the first token of an empty prompt is
    given.

    Raises:
        ValueError: a continuation adds no token to its prompt, the lists have different lengths, or the model returns NaN.
    """
    if len(prompts) != len(continuations):
        raise ValueError(f"{len(prompts)} prompts but continuations for {len(continuations)}")
    together = iter(_encode(tokenizer, [prompt + text for prompt, texts in zip(prompts, continuations, strict=True) for text in texts]))
    items = []
    for prompt, given, candidates in zip(prompts, _encode(tokenizer, prompts), continuations, strict=True):
        rows = [next(together) for _ in candidates]
        start = max(1, min(_shared(given, row) for row in rows))  # nothing predicts the very first token
        if empty := [candidate for candidate, row in zip(candidates, rows, strict=True) if len(row) <= start]:
            raise ValueError(f"continuation {empty[0]!r} adds no token to the prompt {prompt!r}")
        items += [(row, start) for row in rows]
    sums = iter(_log_probs(model, items, batch_tokens))
    lengths = iter(len(row) - start for row, start in items)
    return [[Scored(next(sums), next(lengths), len(candidate.strip())) for candidate in candidates] for candidates in continuations]


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Iterable[str],
    *,
    window: int = 512,
    stride: int = 256,
    batch_tokens: int = 2048,
) -> Perplexity:
    """Predict every token of ``text`` once, through a window that slides by ``stride`` tokens.

    A token is predicted from at least ``window`` − ``stride`` tokens before it, once the text is that long; without the overlap the first
    tokens of each window would be guessed from nothing, and the text would look harder than it is. Each window starts with <bos>, if any.

    Args:
        text: one text, or several that are read one by one.

    Raises:
        ValueError: ``stride`` not from 1 to ``window`` − 1, a window longer than the model allows, or a text without a token to predict.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or window
    if not 1 <= stride < window <= longest:
        raise ValueError(f"need 1 <= stride < window <= {longest} (the model's longest input), got stride {stride}, window {window}")
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    items, characters, size = [], 0, 0
    documents = [text] if isinstance(text, str) else list(text)
    for document, encoded in zip(documents, _encode(tokenizer, documents), strict=True):
        ids = encoded[len(first) :]
        scored = 1 - len(first)  # without <bos> the first token has nothing to be predicted from
        if len(ids) <= scored:
            raise ValueError(f"the text {document[:40]!r} has no token to predict")
        spared = "" if first else tokenizer.decode(ids[:1])
        characters += len(document) - len(spared)
        size += len(document.encode()) - len(spared.encode())
        while scored < len(ids):
            room = window - len(first)
            end = min(len(ids), max(room, scored + stride)) if scored < 2 else min(len(ids), scored + stride)
            begin = max(0, end - room)
            items.append((first + ids[begin:end], len(first) + scored - begin))
            scored = end
    nats = -sum(_log_probs(model, items, batch_tokens))
    return Perplexity(nats, sum(len(row) - start for row, start in items), characters, size)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of every text, <bos> first if there is one."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [first + list(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids] if texts else []


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@torch.no_grad()
def _log_probs(model: PreTrainedModel, items: Sequence[tuple[list[int], int]], batch_tokens: int) -> list[float]:
    """For every (ids, start): the sum of log p(ids[i] | ids[:i]) over i from ``start`` on, which is at least 1."""
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    where, was_training = next(model.parameters()).device, model.training
    model.eval()
    by_length = sorted(range(len(items)), key=lambda i: -len(items[i][0]))  # neighbours of like length need little padding
    found: list[Tensor] = []
    try:
        position = 0
        while position < len(by_length):
            longest = len(items[by_length[position]][0])
            batch = [items[i] for i in by_length[position : position + max(1, batch_tokens // longest)]]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)  # the padding's id is of no account: nothing may attend to it
            mask = torch.zeros_like(ids)
            for row, (tokens, _) in enumerate(batch):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
            ids = ids.to(where)
            logits = model(input_ids=ids, attention_mask=mask.to(where)).logits  # (rows, longest, vocabulary)
            for row, (tokens, start) in enumerate(batch):
                log_p = logits[row, start - 1 : len(tokens) - 1].float().log_softmax(-1)  # (scored, vocabulary)
                found.append(log_p.gather(-1, ids[row, start : len(tokens), None]).double().sum())
            position += len(batch)
    finally:
        model.train(was_training)
    sums = torch.stack(found).tolist()  # one wait for the device, at the end
    if not all(map(math.isfinite, sums)):
        raise ValueError("the model gives log-probabilities that are NaN or infinite: its weights or its dtype overflow")
    result = [0.0] * len(items)
    for i, value in zip(by_length, sums, strict=True):
        result[i] = value
    return result
