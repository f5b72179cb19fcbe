"""Instruction data from a few seeds: a model is asked for new tasks, then for instances of them.

Self-Instruct (Wang et al. 2022) starts from some written tasks, the seeds, and goes round:

    1. show the teacher 8 instructions of the pool, 6 of them people's, and ask for more;
    2. for each new instruction, ask for an instance: an input and the right output;
    3. keep what is well formed and new, put it into the pool, and begin again.

Step 2 has a trap. Asked for "an input, then its label", a teacher invents inputs of one kind and
one label. So a *classification* task is answered **output first**: the label, then an input that
deserves it. Any other task is answered input first.

A teacher is any callable from a prompt to a text: a language model, an API, a grammar.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Teacher = Callable[[str], str]
HUMAN, MACHINE = 6, 2  # instructions of the pool that a prompt shows
NUMBERED = re.compile(r"^\s*\d+\s*[.)]\s*", re.MULTILINE)
FIELD = re.compile(r"^\s*(?P<name>Input|Output|Class label)\s*:\s*", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Task:
    """An instruction with one instance.

    Attributes:
        input: what the instruction is about; empty where it says it all.
        classification: whether the output is one of a few labels.
        source: "seed", or the round that it comes from.
    """

    instruction: str
    output: str
    input: str = ""
    classification: bool = False
    source: str = "seed"

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a conversation of one question and one answer."""
        asked = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": self.output}]


def prompt_for_instructions(pool: Sequence[Task], rng: random.Random) -> str:
    """Numbered instructions of the pool in random order, and the number of the next one.

    Raises:
        ValueError: the pool holds no seed.
    """
    human = [task.instruction for task in pool if task.source == "seed"]
    machine = [task.instruction for task in pool if task.source != "seed"]
    if not human:
        raise ValueError("pool holds no seed: Self-Instruct starts from tasks that people wrote")
    shown = rng.sample(machine, min(MACHINE, len(machine)))
    shown += rng.sample(human, min(HUMAN + MACHINE - len(shown), len(human)))
    rng.shuffle(shown)
    lines = [f"{i}. {' '.join(text.split())}" for i, text in enumerate(shown, 1)]
    return "\n".join(["Come up with a series of tasks:", "", *lines, f"{len(shown) + 1}."])


def parse_instructions(text: str) -> list[str]:
    """The items of a numbered list; the first number stands in the prompt already."""
    items = (" ".join(item.split()) for item in NUMBERED.split(text))
    return [item for item in items if item]


def prompt_for_instance(
    instruction: str, classification: bool, pool: Sequence[Task], examples: int = 2
) -> str:
    """Instances of like tasks, then the instruction: output first if it classifies."""
    shown = [task for task in pool if task.classification == classification][:examples]
    blocks = [instance_text(task) for task in shown]
    first = "Class label:" if classification else "Input:"
    return "\n\n".join([*blocks, f"Task: {instruction}\n{first}"])


def instance_text(task: Task) -> str:
    """A task with its instance, in the order in which the teacher is to write one."""
    if task.classification:
        return f"Task: {task.instruction}\nClass label: {task.output}\nInput: {task.input}"
    return f"Task: {task.instruction}\nInput: {task.input or 'none'}\nOutput: {task.output}"


def parse_instance(instruction: str, classification: bool, text: str, source: str) -> Task:
    """The teacher's continuation of :func:`prompt_for_instance` as a task.

    Raises:
        ValueError: a field is missing or empty; the message says which.
    """
    first = "Class label: " if classification else "Input: "
    text = (first + text).split("\nTask:")[0]
    pieces = FIELD.split(text)[1:]
    found = {
        name.lower(): value.strip() for name, value in zip(pieces[::2], pieces[1::2], strict=True)
    }
    output = found.get("class label" if classification else "output", "")
    given = found.get("input", "")
    if not output:
        raise ValueError(f"the teacher gave no {'label' if classification else 'output'}")
    if classification and not given:
        raise ValueError("the teacher gave a label and no input")
    given = "" if given.lower() in ("none", "n/a", "<noinput>") else given
    return Task(instruction, output, given, classification, source)


def output_first(instruction: str) -> bool:
    """Whether an instruction asks for one of a few labels, by its words.

    The paper asks a model. A few words do for a start, and what they miss costs balance, not
    correctness.
    """
    words = r"classif|categor|true or false|yes or no|which of|sentiment|label|is it|does it|odd or"
    return bool(re.search(words, instruction, re.IGNORECASE))
