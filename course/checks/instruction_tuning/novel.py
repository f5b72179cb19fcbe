"""Exercise 6: copies and given answers slip through. A filter that reads one alphabet, and does not look at outputs."""

import random
import re

from course.checking import Check, NotYet, Seen, but
from reference.self_instruct import Task, is_given_away, longest_common, most_alike, words

Pair = tuple[str, str]


def longest(one: list[str], other: list[str]) -> int:
    return longest_common(one, other)


def f_measure(common: int, m: int, n: int) -> float:
    return 2 * common / (m + n) if m and n else 0.0


def stands_in(answer: list[str], asked: list[str]) -> bool:
    return any(asked[i : i + len(answer)] == answer for i in range(len(asked) - len(answer) + 1))


def keep(
    pool: list[str],
    pairs: list[Pair],
    threshold: float,
    *,
    tokens=words,
    common=longest,
    score=f_measure,
    against=lambda pool, kept: [*pool, *kept],
    alike=lambda score, threshold: score > threshold,
    least=3,
    given=stands_in,
) -> list[Pair]:
    """The worked answer: new among all that is there, in any script, and its answer not in the question."""
    kept: list[Pair] = []
    for instruction, output in pairs:
        mine, said = tokens(instruction), tokens(output)
        others = [tokens(text) for text in against(pool, [each for each, _ in kept])]
        if any(alike(score(common(mine, other), len(mine), len(other)), threshold) for other in others):
            continue
        if len(said) >= least and given(said, mine):
            continue
        kept.append((instruction, output))
    return kept


def by_the_reference(pool: list[str], pairs: list[Pair], threshold: float) -> list[Pair]:
    seen, kept = list(pool), []
    for instruction, output in pairs:
        if most_alike(instruction, seen, enough=threshold)[0] > threshold or is_given_away(Task(instruction, output)):
            continue
        kept.append((instruction, output))
        seen.append(instruction)
    return kept


def every_one_counts(pool: list[str], pairs: list[Pair], threshold: float) -> list[Pair]:
    seen = [words(text) for text in pool]
    kept = []
    for instruction, output in pairs:
        mine, said = words(instruction), words(output)
        new = all(f_measure(longest(mine, other), len(mine), len(other)) <= threshold for other in seen)
        seen.append(mine)
        if new and not (len(said) >= 3 and stands_in(said, mine)):
            kept.append((instruction, output))
    return kept


def latin(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def by_spaces(text: str) -> list[str]:
    return text.split()


def longest_run(one: list[str], other: list[str]) -> int:
    return max((n for n in range(len(one) + 1) for i in range(len(one) - n + 1) if n and stands_in(one[i : i + n], other)), default=0)


def of_sets(one: list[str], other: list[str]) -> int:
    return len(set(one) & set(other))


THINGS = "river harbour lantern meadow violin bakery glacier orchard".split()
HAN = "河港灯田琴面冰果"


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    a, b, c, d = rng.sample(THINGS, 4)
    x, y, z = rng.sample(HAN, 3)
    pool = [f"Describe the {a} in three short words.", f"请用一句话描述这个{x}吧", f"Опиши одним словом эту реку и {y}"]
    pairs = [
        (f"Describe the {b} in three short words.", "old and grey"),  # one word of seven differs
        (f"Tell a story about a {b} and a {c} at night", "Once there was one."),
        (f"Tell a story about a {c} and a {b} at night", "It began late."),  # like the one before it, which is kept
        (f"请用一句话描述这个{y}吧", "很好"),
        (f"{z}{x}为什么会发光", "因为热"),
        (f"Опиши одним словом эту реку и {z}", "Тихая"),
        (f"Say that the motto of the {d} is live and let live", "Live and let live!"),
        (f"Which is older, the {c} or the {d}?", f"The {d}"),
        (f"Count {a} words three in a line then stop the short Describe", "done at last"),
        (f"describe THE {a}, in three; short words", "as it is"),
        (f"Is the lively {d} alive and let down by a liver?", "live and let"),
        (f"Did somebody say {a} {b} {c} before, and to whom?", f"{a}, {b}, {c}"),  # three in a row
        (f"Was this {c} older than that {a} when the {b} broke?", f"{a} {b} {c}"),  # all of them, in another place
        (f"Describe the {a} in three short words, then sing of it", "La la."),  # 14 of 18
        ("In three words", f"{a} {b} {c}"),
        (f"Describe the {a} in three short words, then sing of harvests, of winters, of long roads home", "Why not."),
    ]
    chains = [
        [  # the first is a copy, the second is given away; each has one like it behind it, which is compared with what was kept alone
            (f"Describe the {a} in three short words, once more", "So."),
            (f"Do name the {a} in three short words, once more please", "So it is."),
        ],
        [
            (f"Repeat after me: green {c} and old {d}", f"green {c} and old {d}"),
            (f"Repeat after me: green {c} and old {d}!", "Never."),
        ],
    ]
    pairs.append((f"Are {a} and {c} or {d} the words?", f"{a} {c} {d}"))  # with gaps between
    rng.shuffle(pairs)
    for chain in chains:
        at = rng.randint(0, len(pairs))
        pairs[at:at] = chain
    for threshold in (0.7, 2 * 6 / 14):
        kept = answer(list(pool), list(pairs), threshold)
        if not isinstance(kept, list) or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in kept):
            raise NotYet("return the list of pairs (instruction, output) that are kept, in their order")
        kept = [tuple(map(str, pair)) for pair in kept]
        for instruction, output in pairs:
            what = f'whether "{instruction}" with the output "{output}" is kept at {threshold:.3f}'
            yield what, (instruction, output) in kept
        yield f"all that is kept, in order, at {threshold:.3f}", kept


check = Check(
    task="instructions that are new in any script, and hold no answer",
    observe=observe,
    reference=keep,
    second=by_the_reference,
    misconceptions={
        "words are runs of a–z and 0–9: a text in another script has none, and scores 0 with its own copy; take letters of every "
        "script": but(tokens=latin),
        "that is the filter of the script: it has no words for other scripts than a–z, and does not look at outputs": but(
            tokens=latin, given=lambda answer, asked: False
        ),
        "words are what stands between spaces: capitals and commas make other words of the same ones, and a Chinese sentence is one "
        "word; use "
        "the tokens of the exercise": but(tokens=by_spaces),
        "a new instruction is compared with the pool alone: those that were kept before it count too": but(against=lambda pool, kept: pool),
        "a new instruction is compared with the ones kept before it, and not with the pool: compare with both": but(
            against=lambda pool, kept: kept
        ),
        "a score at the threshold counts as too alike: drop what is above it": but(
            alike=lambda score, threshold: score >= threshold - 1e-12
        ),
        "the order of words is not looked at: ROUGE-L takes the longest common subsequence, not the common words": but(common=of_sets),
        "the words in common must follow one another: a subsequence may leave words out": but(common=longest_run),
        "the score is the recall: F is 2·l/(m + n)": but(score=lambda common, m, n: common / n if n else 0.0),
        "the score is the share of the longer text: F is 2·l/(m + n)": but(
            score=lambda common, m, n: common / max(m, n) if m and n else 0.0
        ),
        "each Chinese character is a token of its own, not a run of them": but(tokens=lambda text: re.findall(r"\w+", text.casefold())),
        "answers of exactly three tokens are kept: three or more that stand in the instruction are dropped": but(least=4),
        "an instruction that was dropped counts for later ones: compare with the pool and with those that were kept": every_one_counts,
        "an answer counts as given although words of the instruction stand between its own: they must stand one behind the other": but(
            given=lambda answer, asked: longest(answer, asked) == len(answer)
        ),
        "an answer counts as given wherever its tokens are: they must stand one behind the other": but(
            given=lambda answer, asked: set(answer) <= set(asked)
        ),
        "answers that stand in the instruction are kept: a model learns to copy from them; drop them": but(
            given=lambda answer, asked: False
        ),
        "short answers are dropped too: a label or a name of one or two tokens stands in many a good question": but(least=1),
        "an answer counts as given if its letters stand in the instruction: compare whole tokens": but(
            given=lambda answer, asked: " ".join(answer) in " ".join(asked)
        ),
    },
)
