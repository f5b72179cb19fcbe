"""A language whose every probability is known: a finite-state source of words.

From each state the source emits one word and moves to one next state. No two transitions of a state share a word, so the words seen so far
say which state the source is in (such a source is called *unifilar*), the exact probability of the next word can be read off, and the
entropy of a text follows from the states alone, without sampling:

    H(T words) = Σ_t Σ_s P(state before word t = s) · h(s),        h(s) = −Σ_w p(w|s) log p(w|s)

(Shannon 1948, section 7.)
"""

import bisect
import functools
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping

State = Hashable
Transitions = dict[str, tuple[float, State]]  # word -> (its probability, the state after it)


def emit(word: str, then: State) -> Transitions:
    """The one word that can stand here."""
    return {word: (1.0, then)}


def uniform(words: Iterable[str], then: Callable[[str], State]) -> Transitions:
    """Each of ``words`` equally often; ``then(word)`` is the state after it."""
    return weighted(dict.fromkeys(words, 1.0), then)


def weighted(words: Mapping[str, float], then: Callable[[str], State]) -> Transitions:
    """Words in proportion to their weights."""
    total = sum(words.values())
    return {word: (weight / total, then(word)) for word, weight in words.items()}


def mixture(*parts: tuple[float, Transitions]) -> Transitions:
    """One of several continuations; their first words must differ, or the text would not say which was meant.

    Raises:
        ValueError: a word begins two of the parts.
    """
    mixed: Transitions = {}
    for share, part in parts:
        for word, (probability, then) in part.items():
            if word in mixed:
                raise ValueError(f"{word!r} begins two continuations: the prefix would be ambiguous")
            mixed[word] = (share * probability, then)
    return mixed


class Source:
    """A source started in one state; a sentence ends where that state comes back.

    Args:
        start: the state at the beginning of every sentence.
        transitions: the words that can follow a state; called once a state.
    """

    def __init__(self, start: State, transitions: Callable[[State], Transitions]) -> None:
        self.start = start
        self.transitions = functools.cache(transitions)
        self._table = functools.cache(self._make_table)
        self._sentence = functools.cache(self._walk_sentence)

    def _make_table(self, state: State) -> tuple[list[str], list[float], list[State]]:
        moves = self.transitions(state)
        cumulative = list(itertools.accumulate(probability for probability, _ in moves.values()))
        return list(moves), cumulative, [then for _, then in moves.values()]

    def sample(self, length: int, rng: random.Random) -> list[str]:
        """``length`` words, sentence after sentence, beginning with a new one; the last may be cut off."""
        words, state = [], self.start
        for _ in range(length):
            choices, cumulative, then = self._table(state)
            chosen = min(bisect.bisect(cumulative, rng.random()), len(choices) - 1)  # min: cumulative[-1] can round below 1
            words.append(choices[chosen])
            state = then[chosen]
        return words

    def log_probs(self, words: Iterable[str]) -> list[float]:
        """Exact log-probability (nats) of each word given those before it.

        Raises:
            ValueError: a word cannot stand where it stands; the message names it and its position.
        """
        logs, state = [], self.start
        for position, word in enumerate(words):
            moves = self.transitions(state)
            if word not in moves:
                raise ValueError(f"word {position}, {word!r}, cannot stand there; expected one of: {', '.join(list(moves)[:8])}")
            probability, state = moves[word]
            logs.append(math.log(probability))
        return logs

    def next_words(self, words: Iterable[str]) -> dict[str, float]:
        """The exact distribution of the word after ``words``, a prefix that begins a sentence."""
        state = self.start
        for word in words:
            if word not in self.transitions(state):
                raise ValueError(f"{word!r} cannot stand where it stands")
            state = self.transitions(state)[word][1]
        return {word: probability for word, (probability, _) in self.transitions(state).items()}

    def entropy(self, length: int) -> float:
        """Entropy (nats) of the first ``length`` words: exact.

        Sentences are independent, so one walk through the states of a sentence is enough: it gives the entropy h_k of a sentence's k-th
        word (0 where it has ended) and the probability f_k that it has k words. A sentence begins at word t with probability
        u_t = Σ_k f_k·u_{t−k}, u_0 = 1, and adds what of it fits.
        """
        by_word, ends = self._sentence()
        within = list(itertools.accumulate(by_word[:length], initial=0.0))  # entropy of a sentence's first k words
        within += [within[-1]] * (length + 1 - len(within))
        begins = [1.0]
        for t in range(1, length):
            begins.append(sum(ends.get(k, 0.0) * begins[t - k] for k in range(1, t + 1)))
        return sum(begins[t] * within[length - t] for t in range(length))

    def _walk_sentence(self) -> tuple[list[float], dict[int, float]]:
        reached, by_word, ends = {self.start: 1.0}, [], {}
        while reached:
            following: defaultdict[State, float] = defaultdict(float)
            by_word.append(0.0)
            for state, mass in reached.items():
                for probability, then in self.transitions(state).values():
                    by_word[-1] -= mass * probability * math.log(probability)
                    following[then] += mass * probability
            ends[len(by_word)] = following.pop(self.start, 0.0)
            # A list can go on for ever with vanishing probability; what is cut here is below one part in 10¹².
            reached = following if sum(following.values()) > 1e-12 else {}
        return by_word, ends

    def words(self) -> list[str]:
        """Every word the source can emit, in the order in which they are met."""
        seen, found, todo = {self.start}, {}, [self.start]
        while todo:
            for word, (_, then) in self.transitions(todo.pop()).items():
                found[word] = None
                if then not in seen:
                    seen.add(then)
                    todo.append(then)
        return list(found)
