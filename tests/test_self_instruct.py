"""`reference.self_instruct`: ROUGE-L against rouge-score, MinHash against Jaccard, and the loop with teachers that misbehave."""

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import self_instruct as si
from reference.self_instruct import Task

SEEDS = [
    Task("Is the following review positive or negative? Give a class label.", "positive", "A joy to read.", True),
    *(
        Task(f"{verb} the following {what} in one sentence.", f"The {what}, {verb.lower()}d.", f"some {what}")
        for verb, what in zip(
            ("Describe", "Shorten", "Translate", "Explain", "Praise", "Continue"), "poem letter joke law cake song".split(), strict=True
        )
    ),
]
TEXTS = st.text("abc ABC12,.-é日本", max_size=40)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS)
def test_rouge_l_is_rouge_scores(one, other):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    assert si.rouge_l(one, other, si.latin_words) == pytest.approx(scorer.score(one, other)["rougeL"].fmeasure)


@given(TEXTS, TEXTS)
def test_most_alike_finds_what_all_pairs_give(one, other):
    pool = [other, "a b c", "", one + " c"]
    assert si.most_alike(one, pool)[0] == pytest.approx(max(si.rouge_l(one, text) for text in pool))


@pytest.mark.parametrize("text", ["请把这句话翻译成英文", "Переведи это предложение", "この文を英語に翻訳してください", "แปลประโยคนี้"])
def test_equal_texts_of_any_script_are_alike(text):
    assert si.rouge_l(text, text, si.latin_words) == 0
    assert si.rouge_l(text, text) == 1
    assert si.rouge_l(text, "Something else entirely") == 0


def test_a_paraphrase_is_new_to_rouge_and_a_small_change_is_not():
    one = "Write a short poem about the sea"
    assert si.rouge_l(one, "Write a short poem about the moon") > 0.8
    assert si.rouge_l(one, "Compose brief verses on the ocean") < 0.3


def test_minhash_estimates_jaccard():
    g = random.Random(0)
    for share in (0.2, 0.5, 0.8):
        common = [str(g.random()) for _ in range(int(200 * share))]
        a, b = (set(common + [str(g.random()) for _ in range((200 - len(common)) // 2)]) for _ in range(2))
        true = si.jaccard(a, b)
        assert si.similarity(si.signature(a, 1024), si.signature(b, 1024)) == pytest.approx(true, abs=4 * (true * (1 - true) / 1024) ** 0.5)


def test_copies_are_found_by_minhash_and_by_embeddings():
    text = " ".join(f"word{i}" for i in range(60))
    texts = [text, "something quite different from it in every way", text.replace("word59", "other"), text.upper()]
    assert si.copies(texts) == [(0, 2), (0, 3)]
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.1], [0.9, 0.8]])
    assert si.alike_by_embedding(vectors, 0.95) == [(0, 2)]
    with pytest.raises(ValueError, match="vectors must be finite"):
        si.alike_by_embedding(torch.tensor([1.0]), 0.9)
    with pytest.raises(ValueError, match="items is empty"):
        si.signature([])


def test_a_classification_is_asked_output_first():
    prompt = si.prompt_for_instance("Is this true or false?", True, SEEDS)
    assert prompt.endswith("Task: Is this true or false?\nClass label:")
    assert prompt.index("Class label: positive") < prompt.index("Input: A joy")
    other = si.prompt_for_instance("Describe a tree.", False, SEEDS)
    assert other.endswith("\nInput:") and "Class label" not in other
    made = si.parse_instance("Is this true or false?", True, " false\nInput: Fish can fly.\n\nTask: more", "1")
    assert (made.output, made.input, made.classification) == ("false", "Fish can fly.", True)
    assert si.parse_instance("Say hello to us.", False, " none\nOutput: Hello!", "1") == Task("Say hello to us.", "Hello!", "", False, "1")
    for text, words in ((" only an input", "no output"), (" x\nInput:", "no input")):
        with pytest.raises(ValueError, match=words):
            si.parse_instance("x", words == "no input", text, "1")


def test_the_prompt_shows_six_of_people_and_two_of_machines():
    pool = SEEDS + [Task(f"machine task number {i}", "x", source="1") for i in range(5)]
    prompt = si.prompt_for_instructions(pool, random.Random(0))
    shown = si.parse_instructions(prompt.partition("tasks:")[2].rpartition("9.")[0])
    assert len(shown) == 8 and sum("machine" in text for text in shown) == 2 and prompt.endswith("\n9.")
    assert len(si.parse_instructions(si.prompt_for_instructions(SEEDS, random.Random(0)).partition("tasks:")[2])) == 7
    with pytest.raises(ValueError, match="pool holds no seed"):
        si.prompt_for_instructions(pool[-2:], random.Random(0))


@pytest.mark.parametrize(
    "instruction, words",
    [
        ("Do it now", "fewer than 4"),
        ("word " * 151, "more than 150"),
        ("Describe the image in this picture please", "no text"),
        ("Write a program that sorts a list of numbers", "a program"),
        ("- list three colours of the rainbow", "no letter"),
    ],
)
def test_instructions_that_teach_nothing_are_named(instruction, words):
    assert words in si.instruction_faults(instruction)[0]


def test_good_instructions_of_any_script_have_no_faults():
    for text in ("Name three rivers of Europe.", "请把这句话翻译成英文", "Назови три реки Европы."):
        assert si.instruction_faults(text) == []


def test_tasks_that_teach_nothing_are_named():
    assert si.task_faults(Task("Give the motto of the town.", "live and let live", "")) == []
    given_away = Task("Say that the motto of the town is live and let live.", "Live and let live!")
    assert si.task_faults(given_away) == ["the instruction holds the answer"]
    assert si.task_faults(Task("Repeat it.", "live and let live", "live and let live")) == ["the output is the input"]
    assert si.task_faults(Task("Classify as good or very bad day.", "very bad day", "rain", True)) == []
    assert si.task_faults(Task("Tell me.", "no no yes " * 8)) == ["the output goes round in circles"]


class Scripted:
    """A teacher that names tasks about animals, some of them bad."""

    def __init__(self, seed: int = 0):
        self.rng, self.prompts = random.Random(seed), []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        asked = re.findall(r"Task: (.*)", prompt)
        if not asked:
            animal = self.rng.choice("otter heron badger viper moth lynx stork newt".split())
            verbs = " ".join(self.rng.sample("swim sleep hunt sing dig climb hide moult".split(), 4))
            return f" Tell me of the {animal}: {verbs}?\n10. Draw the {animal}.\n11. Is a {animal} a mammal, yes or no?"
        if "yes or no" in asked[-1]:
            return " yes\nInput: It has fur."
        return " none" if self.rng.random() < 0.2 else f" none\nOutput: Mostly fish, says task {len(self.prompts)}."


def test_the_loop_keeps_what_is_new_and_says_what_it_dropped():
    teacher = Scripted()
    grown = si.bootstrap(SEEDS, teacher, target=4, most_calls=60)
    assert len(grown.new) == 4 and grown.asked == len(teacher.prompts) <= 60
    assert set(grown.counts) >= {"fewer than 4 words", "ROUGE-L above 0.7 with another"}
    assert str(grown).startswith("7 seeds + 4 new tasks from")
    texts = [task.instruction for task in grown.tasks]
    assert all(si.rouge_l(a, b) <= 0.7 for i, a in enumerate(texts) for b in texts[:i] if i >= len(SEEDS))
    again = si.bootstrap(SEEDS, Scripted(), target=4, most_calls=60)
    assert again.tasks == grown.tasks and again.dropped == grown.dropped


def test_the_loop_ends_with_a_teacher_that_has_nothing_new():
    grown = si.bootstrap(SEEDS, lambda prompt: SEEDS[1].instruction, target=3, most_calls=7)
    assert (grown.asked, len(grown.new)) == (7, 0) and grown.counts == {"ROUGE-L above 0.7 with another": 7}


def test_bad_arguments_are_named():
    for call, error, words in (
        (lambda: si.bootstrap([], str, 1), ValueError, "seeds is empty"),
        (lambda: si.bootstrap(SEEDS, lambda prompt: None, 1), TypeError, "the teacher must return a text"),
        (lambda: si.bootstrap(SEEDS, str, 0), ValueError, "target"),
        (lambda: si.bootstrap(SEEDS, str, 1, novelty=2), ValueError, "novelty"),
    ):
        with pytest.raises(error, match=words):
            call()
