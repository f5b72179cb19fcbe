"""Probes: batched scores against one forward pass per text, the rules of counting, and the questions themselves."""

import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import binomtest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from course.lab import probes, text
from course.lab.probes import Fact, Pair

ATOL = 1e-3  # sums of up to 100 float32 log-probabilities near −6: a few units in the last place of each


def llama(vocabulary: int, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=256, initializer_range=0.3, **sizes | changes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return text.byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return llama(len(tokenizer))


@torch.no_grad()
def alone(model, ids: list[int], start: int) -> float:
    """log p(ids[start:] | ids[:start]): one token, one forward pass, no padding, no mask."""
    found = 0.0
    for i in range(start, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:i]])).logits[0, -1].double()
        found += logits.log_softmax(-1)[ids[i]].item()
    return found


PROMPTS = ["A short one", "", "This prompt is clearly longer than the other two"]
CONTINUATIONS = [[" a", " bb", " ccc dd"], ["Whole sentence.", "Another"], [" x", " çé"]]


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_scores_equal_one_forward_pass_a_token(model, tokenizer, batch_tokens):
    found = probes.continuations_log_prob(model, tokenizer, PROMPTS, CONTINUATIONS, batch_tokens=batch_tokens)
    for prompt, texts, scores in zip(PROMPTS, CONTINUATIONS, found, strict=True):
        for continuation, score in zip(texts, scores, strict=True):
            given, ids = [[0, *tokenizer(part).input_ids] for part in (prompt, prompt + continuation)]
            assert score.log_prob == pytest.approx(alone(model, ids, len(given)), abs=ATOL)
            assert score.tokens == len(continuation.encode())  # one token for every byte
            assert score.characters == len(continuation.strip())


def test_a_tokenizer_without_bos_scores_from_the_second_token(model, tokenizer):
    bare = text.byte_tokenizer()
    bare.bos_token = None
    ids = bare("Hello you").input_ids
    ((score,),) = probes.continuations_log_prob(model, bare, [""], [["Hello you"]])
    assert (score.tokens, score.log_prob) == (len(ids) - 1, pytest.approx(alone(model, ids, 1), abs=ATOL))
    found = probes.perplexity(model, bare, "Hello you", window=64, stride=32)
    assert (found.tokens, found.characters) == (len(ids) - 1, 8)
    assert found.nats == pytest.approx(-score.log_prob, abs=ATOL)


def joining_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, and "bc" as one token: the end of the prompt "ab" is joined to a continuation that begins with c."""
    vocabulary = {token: i for i, token in enumerate(["<bos>", "a", "b", "c", "d", "bc"])}
    whole = Tokenizer(models.BPE(vocabulary, merges=[("b", "c")]))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<bos>")


def test_candidates_stay_comparable_where_the_tokenizer_joins_prompt_and_continuation():
    joining = joining_tokenizer()
    model = llama(len(joining))
    ((first, second),) = probes.continuations_log_prob(model, joining, ["ab"], [["c", "d"]])
    # <bos> a bc against <bos> a b d: both must be scored from the token after a
    assert first.log_prob == pytest.approx(alone(model, [0, 1, 5], 2), abs=ATOL)
    assert second.log_prob == pytest.approx(alone(model, [0, 1, 2, 4], 2), abs=ATOL)
    assert (first.tokens, second.tokens) == (1, 2)


class Bigrams(torch.nn.Module):
    """A language model that looks one token back: logits from a table, the same in whatever batch a token comes."""

    def __init__(self, vocabulary: int, dtype: torch.dtype):
        super().__init__()
        table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0)) * 5
        self.table = torch.nn.Parameter(table.to(dtype))

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scored_in_float32(tokenizer, dtype):
    model = Bigrams(len(tokenizer), dtype)
    ((score,),) = probes.continuations_log_prob(model, tokenizer, ["A prompt"], [[" and what follows"]])
    ids = [0, *tokenizer("A prompt and what follows").input_ids]
    exact = model.table.double().log_softmax(-1)
    assert score.log_prob == pytest.approx(sum(exact[a, b].item() for a, b in pairwise(ids[8:])), abs=ATOL)


def test_a_half_precision_model_scores_nearly_as_in_float32(tokenizer):
    wide, narrow = llama(len(tokenizer)), llama(len(tokenizer)).to(torch.bfloat16)
    one, other = (probes.continuations_log_prob(m, tokenizer, PROMPTS, CONTINUATIONS) for m in (wide, narrow))
    values = [(a.log_prob, b.log_prob) for xs, ys in zip(one, other, strict=True) for a, b in zip(xs, ys, strict=True)]
    assert all(b == pytest.approx(a, rel=0.05, abs=0.2) for a, b in values)  # bfloat16 keeps 8 bits


def test_the_models_mode_is_kept_and_dropout_is_off(tokenizer):
    model = llama(len(tokenizer), attention_dropout=0.9)
    expected = probes.continuations_log_prob(model, tokenizer, PROMPTS, CONTINUATIONS)
    model.train()
    assert probes.continuations_log_prob(model, tokenizer, PROMPTS, CONTINUATIONS) == expected
    assert model.training


def facts_with_the_likeliest_answer(model, tokenizer, right: bool) -> list[Fact]:
    words, facts = ["lion", "bear", "wolf", "deer"], []
    for prompt in ("The animal is a", "In the forest lives a", "Nobody has seen a"):
        ids = [[0, *tokenizer(f"{prompt} {word}").input_ids] for word in words]
        scores = [alone(model, row, len(row) - 5) for row in ids]
        order = sorted(range(4), key=lambda i: -scores[i])
        answer = words[order[0] if right else order[1]]
        facts.append(Fact(prompt.split()[0], prompt, answer, tuple(word for word in words if word != answer)))
    return facts


@pytest.mark.parametrize("right", [True, False])
def test_cloze_accuracy_is_that_of_the_likeliest_candidate(model, tokenizer, right):
    result = probes.cloze_accuracy(model, tokenizer, facts_with_the_likeliest_answer(model, tokenizer, right))
    assert result.correct == (right,) * 3
    assert all(score.tokens == 5 for scores in result.scores for score in scores)  # a blank and four letters
    assert result.accuracy == result.accuracy_per_character == float(right)  # all candidates are four letters long
    assert result.by_category == {"The": (int(right), 1), "In": (int(right), 1), "Nobody": (int(right), 1)}


def test_without_prompt_every_fact_with_the_same_words_scores_alike(model, tokenizer):
    facts = [Fact("x", prompt, "lion", ("bear", "wolf", "deer")) for prompt in ("One", "Two")]
    first, second = probes.cloze_accuracy(model, tokenizer, facts, with_prompt=False).scores
    assert first == second
    first, second = probes.cloze_accuracy(model, tokenizer, facts).scores
    assert first != second


def test_a_model_that_tells_nothing_apart_gets_no_point_and_the_nats_of_chance(tokenizer):
    model = llama(len(tokenizer))
    model.lm_head.weight.data.zero_()  # every token is equally likely
    cloze = probes.cloze_accuracy(model, tokenizer, [Fact("x", "A", "lion", ("bear", "wolf", "deer"))])
    pairs = probes.minimal_pair_accuracy(model, tokenizer, [Pair("x", "He runs.", "He rung.")])
    assert (cloze.accuracy, pairs.accuracy) == (0.0, 0.0)
    assert (cloze.nats, pairs.nats) == (pytest.approx(math.log(4)), pytest.approx(math.log(2)))


def test_minimal_pairs_are_scored_as_whole_sentences(model, tokenizer):
    pair = Pair("x", "The dogs bark.", "The dogs barks.")
    result = probes.minimal_pair_accuracy(model, tokenizer, [pair])
    good, bad = (alone(model, [0, *tokenizer(sentence).input_ids], 1) for sentence in pair[1:])
    assert [score.log_prob for score in result.scores[0]] == pytest.approx([good, bad], abs=ATOL)
    assert result.accuracy == float(good > bad)
    assert result.nats == pytest.approx(math.log1p(math.exp(bad - good)), abs=ATOL)


def result(*right: bool) -> probes.ProbeResult:
    return probes.ProbeResult(("x",) * len(right), tuple((probes.Scored(float(r), 1, 1), probes.Scored(0.5, 1, 1)) for r in right))


def test_per_character_weighs_long_answers_by_their_length():
    long_but_right = (probes.Scored(-4.0, 1, 8), probes.Scored(-3.0, 3, 3))  # −0.5 against −1 a character
    found = probes.ProbeResult(("x",), (long_but_right,))
    assert (found.accuracy, found.accuracy_per_character) == (0.0, 1.0)


def test_changes_count_lost_and_gained_apart():
    before, after = result(True, True, True, False, False), result(False, False, True, True, False)
    assert after.changes(before) == (2, 1)
    assert before.changes(after) == (1, 2)
    with pytest.raises(ValueError, match="5 and of 2"):
        result(True, True).changes(before)


@pytest.mark.parametrize("right, total", [(0, 10), (10, 10), (3, 7), (283, 320)])
def test_wilson_equals_scipys(right, total):
    expected = binomtest(right, total).proportion_ci(method="wilson")
    assert probes.wilson(right, total, z=1.959963984540054) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_refuses_what_is_no_share():
    with pytest.raises(ValueError, match="5 of 4"):
        probes.wilson(5, 4)


DOCUMENT = "Él midió la presión: 3 µbar, ±0.2. Then nothing happened for a long time, and nobody wrote it down."


@pytest.mark.parametrize("window, stride", [(200, 100), (32, 8), (32, 31), (17, 1), (2, 1)])
def test_perplexity_predicts_every_token_once_from_its_own_window(model, tokenizer, window, stride):
    ids, room = tokenizer(DOCUMENT).input_ids, window - 1  # <bos> takes one place
    expected = 0.0
    for i in range(len(ids)):
        block = 0 if i < room else (i - room) // stride + 1
        end = min(len(ids), room + block * stride)
        expected -= alone(model, [0, *ids[max(0, end - room) : i + 1]], i + 1 - max(0, end - room))
    found = probes.perplexity(model, tokenizer, DOCUMENT, window=window, stride=stride, batch_tokens=100)
    assert found.nats == pytest.approx(expected, abs=ATOL)
    assert (found.tokens, found.characters, found.bytes) == (len(ids), len(DOCUMENT), len(DOCUMENT.encode()))
    assert found.bytes > found.characters  # the text is not ASCII alone


def test_perplexity_of_several_texts_adds_up(model, tokenizer):
    parts = [DOCUMENT, "A second text."]
    both, one, other = (probes.perplexity(model, tokenizer, texts, window=64, stride=32) for texts in (parts, *parts))
    assert both.nats == pytest.approx(one.nats + other.nats, abs=ATOL)
    assert both.tokens == one.tokens + other.tokens
    assert both.nats_per_token * both.tokens == pytest.approx(both.nats_per_character * both.characters)
    assert both.bits_per_byte * math.log(2) * both.bytes == pytest.approx(both.nats)
    assert both.perplexity == pytest.approx(math.exp(both.nats_per_token))


def test_bad_arguments_are_named(model, tokenizer):
    with pytest.raises(ValueError, match="stride 8, window 8"):
        probes.perplexity(model, tokenizer, "text", window=8, stride=8)
    with pytest.raises(ValueError, match=r"256 \(the model's longest"):
        probes.perplexity(model, tokenizer, "text", window=512)
    with pytest.raises(ValueError, match="no token to predict"):
        probes.perplexity(model, tokenizer, "", window=64, stride=32)
    with pytest.raises(ValueError, match="adds no token"):
        probes.continuations_log_prob(model, tokenizer, ["prompt"], [["", "x"]])
    with pytest.raises(ValueError, match="2 prompts but continuations for 1"):
        probes.continuations_log_prob(model, tokenizer, ["a", "b"], [["x"]])
    with pytest.raises(ValueError, match="batch_tokens"):
        probes.continuations_log_prob(model, tokenizer, ["a"], [["x"]], batch_tokens=0)


def test_nan_is_an_error_not_a_score(tokenizer):
    model = llama(len(tokenizer))
    model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        probes.minimal_pair_accuracy(model, tokenizer, [Pair("x", "a", "b")])


# The questions


def test_there_are_enough_facts_of_enough_kinds_and_none_twice():
    facts = probes.cloze_facts()
    kinds = Counter(fact.category for fact in facts)
    assert len(facts) >= 220 and len(kinds) >= 10 and min(kinds.values()) >= 15
    assert max(Counter(fact.prompt for fact in facts).values()) == 1


@pytest.mark.parametrize("fact", probes.cloze_facts(), ids=lambda fact: fact.prompt)
def test_a_fact_is_well_formed(fact):
    candidates = (fact.answer, *fact.distractors)
    assert all(isinstance(part, str) and part == part.strip() and part for part in (fact.prompt, *candidates))
    assert len(fact.distractors) == 3 and len({word.lower() for word in candidates}) == 4
    assert fact.prompt[0].isupper() and (fact.prompt[-1].isalnum() or fact.prompt.endswith((" K.", " R.")))
    assert all(len(word.split()) == 1 for word in candidates)
    assert len({(word[0].isupper(), word[0].isdigit()) for word in candidates}) == 1  # form must not give the answer away
    assert not set(candidates) & set(fact.prompt.replace(",", "").split())


def test_most_distractors_are_answers_elsewhere():
    facts = probes.cloze_facts()
    answers = {fact.answer for fact in facts}
    assert sum(word in answers for fact in facts for word in fact.distractors) > 0.45 * 3 * len(facts)


def test_there_are_enough_pairs_of_enough_kinds_and_no_sentence_twice():
    pairs = probes.minimal_pairs()
    kinds = Counter(pair.category for pair in pairs)
    assert len(pairs) >= 220 and len(kinds) >= 10 and min(kinds.values()) >= 15
    assert max(Counter(sentence for pair in pairs for sentence in pair[1:]).values()) == 1


@pytest.mark.parametrize("pair", probes.minimal_pairs(), ids=lambda pair: pair.good)
def test_a_pair_differs_in_one_point(pair):
    good, bad = Counter(pair.good.split()), Counter(pair.bad.split())
    assert pair.good != pair.bad
    assert all(s == s.strip() and s[0].isupper() and s[-1] in ".?!" and "  " not in s for s in pair[1:])
    assert pair.good[-1] == pair.bad[-1]
    assert abs(good.total() - bad.total()) <= 1
    assert max((good - bad).total(), (bad - good).total()) <= 2  # two words where one is replaced by two, or a word and the full stop


def test_length_does_not_give_the_answer_away():
    longer = [len(pair.bad.split()) - len(pair.good.split()) for pair in probes.minimal_pairs()]
    assert longer.count(0) > 0.85 * len(longer)
    assert abs(longer.count(1) - longer.count(-1)) <= 3


@pytest.mark.parametrize("kind", ["subject_verb_agreement", "agreement_across_attractor", "long_distance_agreement", "anaphor_agreement"])
def test_forms_are_right_as_often_as_wrong(kind):
    right, wrong = Counter(), Counter()
    for pair in probes.minimal_pairs():
        if pair.category == kind:
            good, bad = Counter(pair.good.split()), Counter(pair.bad.split())
            right.update(good - bad)
            wrong.update(bad - good)
    assert (right & wrong).total() > 0.6 * right.total()
