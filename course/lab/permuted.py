"""Permuted digits: the classic of continual learning, in a second a run.

The digits are scikit-learn's, 8 × 8 pixels. In each task the 64 pixels are shuffled by a permutation of its own: as hard as the one before,
and sharing nothing with it but the classes. One small network learns five tasks in a row and is asked about all of them after each.
"""

import functools
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from reference.ewc import EWC, fisher_diagonal, uniform_fisher
from reference.progressive import ProgressiveNetwork
from reference.rehearsal import ReplayBuffer, dark_experience, project_gradient

TASKS, HIDDEN, ROWS, EPOCHS, LR, HELD_OUT = 5, 256, 32, 10, 1e-3, 397
SETTINGS = {  # method -> what its number means, and the number that did best with seed 0 in benchmarks/permuted_digits.py
    "plain": ("", 0.0),
    "L2 to the start": ("λ", 0.03),
    "EWC": ("λ", 100.0),
    "A-GEM": ("rows in the buffer", 200.0),
    "replay": ("rows in the buffer", 200.0),
    "DER++": ("rows in the buffer", 200.0),
    "progressive": ("", 0.0),
    "all tasks at once": ("", 0.0),
}


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Pixels in 0 … 1, (1797, 64), and labels, shuffled once."""
    found = load_digits()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order]


def task(number: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and y to train on, x and y that are held out; task 0 is not permuted."""
    x, y = digits()
    if number:
        x = x[:, torch.randperm(64, generator=torch.Generator().manual_seed(100 * seed + number))]
    return x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


@torch.no_grad()
def accuracy(outputs: Callable[[Tensor], Tensor], number: int, seed: int) -> float:
    """Share of a task's held-out digits."""
    *_, x, y = task(number, seed)
    return (outputs(x).argmax(-1) == y).float().mean().item()


def run(method: str, seed: int = 0, value: float | None = None, tasks: int = TASKS, epochs: int = EPOCHS) -> list[list[float]]:
    """Accuracies: row i holds those on all tasks after task i was learned.

    Args:
        value: of the method's setting; None takes that of ``SETTINGS``.

    Raises:
        ValueError: there is no such method.
    """
    if method not in SETTINGS:
        raise ValueError(f"method must be one of {', '.join(SETTINGS)}, got {method!r}")
    value = SETTINGS[method][1] if value is None else value
    torch.manual_seed(seed)
    return Learner(method, value, seed, tasks, epochs).learn()


class Learner:
    """One run; the loss and the gradient of a step depend on the method."""

    def __init__(self, method: str, value: float, seed: int, tasks: int, epochs: int):
        self.method, self.value, self.seed, self.tasks, self.epochs = method, value, seed, tasks, epochs
        self.model = network()
        self.net = ProgressiveNetwork([self.model[0], self.model[2]])
        self.ewc: EWC | None = None
        rows = int(value) if method in ("replay", "A-GEM", "DER++") else 1
        self.buffer = ReplayBuffer(rows, seed)  # of pixels, label and the logits of the time when it was stored, in one row

    def learn(self) -> list[list[float]]:
        table = []
        for number in range(self.tasks):
            if self.method == "progressive" and number:
                self.net.add_column([nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, 10)], lambda i: nn.Linear(HIDDEN, 10, bias=False))
            trained = [p for p in (self.net if self.method == "progressive" else self.model).parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(trained, lr=LR)
            x, y, *_ = task(number, self.seed)
            for _ in range(self.epochs):
                for chosen in torch.randperm(len(x)).split(ROWS):
                    self.step(optimizer, trained, *self.mixed(x[chosen], y[chosen], number))
            self.consolidate(x, y)
            table.append([self.asked(k) for k in range(self.tasks)])
        return table

    def mixed(self, x: Tensor, y: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """For all tasks at once: rows of every task so far, as many of each as a task alone would have."""
        if self.method != "all tasks at once" or number == 0:
            return x, y
        parts = [(x, y)]
        for k in range(number):
            x_k, y_k, *_ = task(k, self.seed)
            chosen = torch.randint(len(x_k), (ROWS,))
            parts.append((x_k[chosen], y_k[chosen]))
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def outputs(self, x: Tensor) -> Tensor:
        return self.net(x) if self.method == "progressive" else self.model(x)

    def asked(self, number: int) -> float:
        if self.method != "progressive":
            return accuracy(self.model, number, self.seed)
        known = min(number, len(self.net.columns) - 1)  # the column of the task, once there is one
        return accuracy(lambda x: self.net(x, known), number, self.seed)

    def remembered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, labels and stored logits of a draw from the buffer."""
        rows = self.buffer.sample(min(ROWS, len(self.buffer)))
        return rows[:, :64], rows[:, 64].long(), rows[:, 65:]

    def step(self, optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], x: Tensor, y: Tensor) -> None:
        logits = self.outputs(x)
        loss = F.cross_entropy(logits, y)
        if self.ewc:
            loss = loss + self.ewc.penalty()
        past = len(self.buffer) and self.buffer.seen
        if self.method == "replay" and past:
            old_x, old_y, _ = self.remembered()
            loss = loss + F.cross_entropy(self.model(old_x), old_y)
        if self.method == "DER++" and past:
            (one, _, stored), (two, labels, _) = self.remembered(), self.remembered()
            loss = loss + dark_experience(self.model(one), stored, self.model(two), labels, 0.5, 0.5)
        gradients = torch.autograd.grad(loss, trained)
        if self.method == "A-GEM" and past:
            old_x, old_y, _ = self.remembered()
            gradients = project_gradient(gradients, torch.autograd.grad(F.cross_entropy(self.model(old_x), old_y), trained))
        for p, g in zip(trained, gradients, strict=True):
            p.grad = g
        optimizer.step()

    def consolidate(self, x: Tensor, y: Tensor) -> None:
        """What a method does between two tasks."""
        if self.method in ("replay", "A-GEM", "DER++"):
            with torch.no_grad():
                self.buffer.add(torch.cat([x, y[:, None].float(), self.model(x)], 1))
        if self.method in ("EWC", "L2 to the start"):
            fisher = fisher_diagonal(self.model, [(x, None)]) if self.method == "EWC" else uniform_fisher(self.model)
            if self.ewc is None:
                self.ewc = EWC(self.model, fisher, self.value)
            elif self.method == "EWC":
                self.ewc.consolidate(fisher)
            else:
                self.ewc.consolidate(fisher, gamma=0.0)
