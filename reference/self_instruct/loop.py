"""The loop around a teacher, and the rules by which its tasks are kept or dropped.

Everything dropped is in the report, by reason: a filter that drops nine of ten rows must not look
like a teacher that had nothing to say.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from reference.arguments import check_integer, check_number
from reference.self_instruct.novelty import Tokenize, latin_words, most_alike, words
from reference.self_instruct.tasks import (
    Task,
    Teacher,
    output_first,
    parse_instance,
    parse_instructions,
    prompt_for_instance,
    prompt_for_instructions,
)

FEWEST, MOST = 4, 150  # words of an instruction
ELSEWHERE = "image images graph graphs picture pictures file files map maps draw plot video audio"
NOVELTY = 0.7  # the highest ROUGE-L with any instruction that is there


@dataclass
class Growth:
    """What a run of the loop made.

    Attributes:
        tasks: the pool, seeds first.
        dropped: (text of the teacher, reason).
        asked: how often the teacher was called.
    """

    tasks: list[Task]
    dropped: list[tuple[str, str]] = field(default_factory=list)
    asked: int = 0

    @property
    def new(self) -> list[Task]:
        return [task for task in self.tasks if task.source != "seed"]

    @property
    def counts(self) -> dict[str, int]:
        """Reason -> how many were dropped for it."""
        return dict(Counter(reason for _, reason in self.dropped).most_common())

    def __str__(self) -> str:
        seeds = len(self.tasks) - len(self.new)
        lines = [f"{seeds} seeds + {len(self.new)} new tasks from {self.asked} calls"]
        return "\n".join(lines + [f"  {n} × {reason}" for reason, n in self.counts.items()])


def instruction_faults(instruction: str) -> list[str]:
    """Self-Instruct's heuristics: why an instruction is not one to learn from; empty if it is."""
    found, text = [], instruction.strip()
    count = len(words(text))
    if count < FEWEST:
        found.append(f"fewer than {FEWEST} words")
    if count > MOST:
        found.append(f"more than {MOST} words")
    if set(latin_words(text)) & set(ELSEWHERE.split()):
        found.append("asks for something that is no text")
    if re.match(r"write a program", text, re.IGNORECASE):
        found.append("asks for a program, and a teacher answers that badly")
    if not text[:1].isalnum():
        found.append("starts with no letter")
    return found


def task_faults(task: Task) -> list[str]:
    """What is wrong with an instance: an output that says nothing, repeats, or was given away."""
    found, output = [], task.output.strip()
    if not output:
        found.append("no output")
    if output and output == task.input.strip():
        found.append("the output is the input")
    if is_given_away(task):
        found.append("the instruction holds the answer")
    said = words(output)
    if len(said) > 12 and len(set(said)) < len(said) / 4:
        found.append("the output goes round in circles")
    return found


def is_given_away(task: Task) -> bool:
    """Whether the whole answer, three words or more, stands in the *instruction*.

    In the input it may: to extract or to copy is a task. A label stands in many an instruction.
    """
    answer, asked = words(task.output), words(task.instruction)
    if len(answer) < 3 or task.classification:
        return False
    n = len(answer)
    return any(asked[i : i + n] == answer for i in range(len(asked) - n + 1))


def bootstrap(
    seeds: Sequence[Task],
    teacher: Teacher,
    target: int,
    seed: int = 0,
    most_calls: int = 1000,
    novelty: float = NOVELTY,
    tokenize: Tokenize = words,
    classifies: Callable[[str], bool] = output_first,
) -> Growth:
    """Ask the teacher until the pool has ``target`` new tasks, or after ``most_calls`` calls.

    Args:
        novelty: the highest ROUGE-L that a new instruction may have with any that is there.
        tokenize: into what ROUGE-L compares.
        classifies: whether an instruction is answered output first.

    Raises:
        TypeError: the teacher does not return a text.
        ValueError: there is no seed, or ``novelty`` is not from 0 to 1.
    """
    check_integer("target", target, least=1)
    check_integer("most_calls", most_calls, least=1)
    check_number("novelty", novelty, 0, 1)
    if not seeds:
        raise ValueError("seeds is empty: Self-Instruct starts from tasks that people wrote")
    grown, rng = Growth(list(seeds)), random.Random(seed)

    def ask(prompt: str) -> str:
        grown.asked += 1
        answer = teacher(prompt)
        if not isinstance(answer, str):
            raise TypeError(f"the teacher must return a text, got {type(answer).__name__}")
        return answer

    while len(grown.new) < target and grown.asked < most_calls:
        for instruction in parse_instructions(ask(prompt_for_instructions(grown.tasks, rng))):
            if len(grown.new) >= target:
                break
            if faults := instruction_faults(instruction):
                grown.dropped.append((instruction, faults[0]))
                continue
            pool = [task.instruction for task in grown.tasks]
            if most_alike(instruction, pool, tokenize, novelty)[0] > novelty:
                grown.dropped.append((instruction, f"ROUGE-L above {novelty:g} with another"))
                continue
            if grown.asked >= most_calls:
                grown.dropped.append((instruction, "no call was left for an instance"))
                continue
            classification = classifies(instruction)
            prompt = prompt_for_instance(instruction, classification, grown.tasks)
            try:
                made = parse_instance(instruction, classification, ask(prompt), str(grown.asked))
            except ValueError as error:
                grown.dropped.append((instruction, str(error)))
                continue
            if faults := task_faults(made):
                grown.dropped.append((instruction, faults[0]))
                continue
            grown.tasks.append(made)
    return grown
