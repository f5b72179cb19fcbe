"""All ids are labels, so most of the loss is the instruction that every conversation repeats.

Predicting it is easy, and forty tokens of it drown the two of the answer: the mean is low while every answer is wrong. Targets are the
answer's tokens, and the model still reads the prompt.
"""

import random

from course.cases import good_loss_wrong_answers as script
from course.checking import Check, NotYet, Seen

IGNORED = -100


def example(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    """The worked answer."""
    return prompt + answer, [IGNORED] * len(prompt) + answer


def varied(ids=lambda prompt, answer: prompt + answer, labels=lambda prompt, answer: [IGNORED] * len(prompt) + answer):
    """The worked answer with a part replaced."""
    return lambda prompt, answer: (ids(prompt, answer), labels(prompt, answer))


def by_place(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    ids = [*prompt, *answer]
    return ids, [token if place >= len(prompt) else -100 for place, token in enumerate(ids)]


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    for length in (1, rng.randrange(4, 9)):
        prompt = [rng.randrange(1, 30) for _ in range(rng.randrange(5, 9))]
        said = [prompt[0], prompt[-1], *(rng.randrange(1, 30) for _ in range(length))][-length - 1 :]  # an answer may repeat the prompt
        found = answer(list(prompt), list(said))
        if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, list) for part in found)):
            raise NotYet("return two lists: the ids and the labels")
        yield f"the ids, an answer of {len(said)} tokens", found[0]
        yield f"the labels, an answer of {len(said)} tokens", found[1]


check = Check(
    task="labels that are the answer's tokens alone",
    observe=observe,
    reference=example,
    second=by_place,
    misconceptions={
        "the prompt is a target too, and drowns the answer: its labels are −100": script.example,
        "the prompt was taken out of the ids: the loss is the answer's, but the model never sees the question; mask the labels and keep "
        "the ids": varied(ids=lambda prompt, answer: list(answer), labels=lambda prompt, answer: list(answer)),
        "the prompt's ids became 0 in the input: the model must read the question; only its labels are masked": varied(
            ids=lambda prompt, answer: [0] * len(prompt) + answer
        ),
        "the answer's first token is no target: the loss shifts the labels itself, so label each place with its own id": varied(
            labels=lambda prompt, answer: [IGNORED] * (len(prompt) + 1) + answer[1:]
        ),
        "the labels are shifted already: the loss shifts them once more, and each token learns the one after the next": varied(
            labels=lambda prompt, answer: [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]
        ),
        "nothing is a target: the mean over no token is NaN, or a loss that says nothing": varied(
            labels=lambda prompt, answer: [IGNORED] * (len(prompt) + len(answer))
        ),
        "the prompt's last token is a target: it is the user's, and was given": varied(
            labels=lambda prompt, answer: [IGNORED] * (len(prompt) - 1) + prompt[-1:] + answer
        ),
    },
)
