"""What makes a notebook a conversation: guesses that are taken before a result is shown, and cells that the reader writes.

    guess = predict("What share of a quantized model is scales?", unit="%")     # a field, or guess=12
    ...
    guess.compare(11.1)                                                         # You said 12 %; it is 11.1 %.

    scale = yours(scale, worked_scale, (torch.randn(3, 64),))                   # the reader's function, or the worked one until it is right

A notebook that nobody answers runs from top to bottom all the same.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
from IPython.display import Markdown, display

from course.checking import first_difference, unwritten


class Guess:
    """What the reader expects; made by :func:`predict`."""

    def __init__(self, field: ipywidgets.ValueWidget | None, given: Any, unit: str):
        self._field, self._given, self.unit = field, given, unit

    @property
    def value(self) -> Any:
        """The answer; None so far if there is none."""
        if self._field is None or self._given is not None:
            return self._given
        return _number(self._field.value) if isinstance(self._field, ipywidgets.Text) else self._field.value

    def compare(self, value: Any, digits: int = 3) -> None:
        """Show the guess against what came out; a number with so many digits."""
        right, guessed = self._text(value, digits), self.value
        if guessed is None:
            display(Markdown(f"It is **{right}**. *(You made no guess.)*"))
        elif guessed == value or self._text(guessed, digits) == right:
            display(Markdown(f"You said {self._text(guessed, digits)}, and so it is: **{right}**."))
        else:
            display(Markdown(f"You said {self._text(guessed, digits)}; it is **{right}**{_apart(guessed, value)}."))

    def _text(self, value: Any, digits: int) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return str(value)
        number = f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}g}"
        return f"{number} {self.unit}".rstrip()


def _apart(guessed: Any, value: Any) -> str:
    """How far two positive numbers are from each other, where that is telling."""
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) and each > 0 for each in (guessed, value))
    if not numbers or max(guessed / value, value / guessed) < 1.15:
        return ""
    return f", {max(guessed / value, value / guessed):.2g} times as {'little' if guessed > value else 'much'}"


def predict(question: str, options: Sequence[Any] = (), unit: str = "", guess: Any = None) -> Guess:
    """Ask before the result is shown: a field for a number, or a button for each of ``options``.

    Args:
        question: Markdown.
        options: what to choose from; none asks for a number.
        unit: of the number, for the sentence of :meth:`Guess.compare`.
        guess: the answer, in place of the field: for readers without widgets.

    Raises:
        ValueError: ``guess`` is none of the options.
    """
    if guess is not None and options and guess not in options:
        raise ValueError(f"guess must be one of {', '.join(map(str, options))}, got {guess!r}")
    display(Markdown(f"**Your guess.** {question}"))
    if guess is not None:
        return Guess(None, guess, unit)
    if options:
        field = ipywidgets.ToggleButtons(options=[(str(option), option) for option in options], index=None)
    else:
        field = ipywidgets.Text(placeholder=f"a number, in {unit}" if unit else "a number")
    display(field)
    return Guess(field, None, unit)


def _number(text: str) -> float | int | None:
    """What is typed as a number; None if it is none."""
    for kind in (int, float):
        try:
            return kind(text.replace(",", "").replace("%", "").strip())
        except ValueError:
            continue
    return None


def yours(answer: Callable, worked: Callable, *inputs: tuple, rtol: float = 1e-4, atol: float = 1e-6) -> Callable:
    """The reader's ``answer`` if it gives what ``worked`` gives for every one of ``inputs``; else ``worked``, and a line that says why.

    Args:
        answer: the function of the cell above; a stub raises ``NotImplementedError()``.
        inputs: tuples of arguments.

    Raises:
        ValueError: there are no inputs to try it on.
    """
    if not inputs:
        raise ValueError("inputs is empty: give at least one tuple of arguments to try the answer on")
    name = answer.__name__
    for arguments in inputs:
        try:
            found = answer(*copy.deepcopy(arguments))
        except Exception as error:
            why = "is not written yet" if unwritten(error) else f"raised {type(error).__name__}: {error}"
        else:
            difference = first_difference(found, worked(*copy.deepcopy(arguments)), rtol, atol)
            why = f"is not right yet: {difference}" if difference else None
        if why:
            display(Markdown(f"Your `{name}` {why}. From here on the worked version is used; come back and run this again."))
            return worked
    display(Markdown(f"✓ Your `{name}` is right, and is used from here on."))
    return answer
