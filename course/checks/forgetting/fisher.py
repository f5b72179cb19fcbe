"""Exercise 1: the Fisher's diagonal of a classifier, by three estimators."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course.checking import Check, Seen, but
from reference.ewc import fisher_diagonal as by_the_reference


def squares(loss: Tensor, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True)
    return {name: g.square() for name, g in zip(trained, gradients, strict=True)}


def every_answer(log_p: Tensor, y: Tensor, trained: dict[str, Tensor], weigh) -> list[tuple[Tensor, dict]]:
    """(weight, squared gradient) of each answer of one row."""
    return [(weigh(log_p)[c].detach(), squares(log_p[c], trained)) for c in range(len(log_p))]


def the_label(log_p: Tensor, y: Tensor, trained: dict[str, Tensor], weigh) -> list[tuple[Tensor, dict]]:
    return [(torch.ones(()), squares(log_p[y], trained))]


def the_likeliest(log_p: Tensor, y: Tensor, trained: dict[str, Tensor], weigh) -> list[tuple[Tensor, dict]]:
    return the_label(log_p, log_p.argmax(), trained, weigh)


def row_by_row(model, x, y, trained, parts, weigh) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for row, label in zip(x, y, strict=True):
        for weight, square in parts(model(row[None]).log_softmax(-1)[0], label, trained, weigh):
            total = {name: value + weight * square[name] for name, value in total.items()}
    return total


def fisher_diagonal(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    estimator: str,
    *,
    exact=every_answer,
    empirical=the_label,
    weigh=torch.exp,
    mean=lambda total, rows: {name: value / rows for name, value in total.items()},
    batch=lambda model, x, y, trained: squares(F.cross_entropy(model(x), y), trained),
    which=lambda p: p.requires_grad,
) -> dict[str, Tensor]:
    """The worked answer: a pass for each row and answer, or for each label, or for the whole batch."""
    trained = {name: p for name, p in model.named_parameters() if which(p)}
    if estimator == "batch":
        return batch(model, x, y, trained)
    parts = exact if estimator == "exact" else empirical
    return mean(row_by_row(model, x, y, trained, parts, weigh), len(x))


def by_squares(model: nn.Module, x: Tensor, y: Tensor, estimator: str) -> dict[str, Tensor]:
    """By the reference module, whose layers are squared without a pass for each row."""
    return by_the_reference(model, [(x, y)], estimator)


def squared_sum(model, x, y, trained) -> dict[str, Tensor]:
    return squares(F.cross_entropy(model(x), y, reduction="sum"), trained)


def entropys_gradient(log_p: Tensor, y: Tensor, trained: dict[str, Tensor], weigh) -> list[tuple[Tensor, dict]]:
    """(∂ Σ p log p)²: the sum is taken before the square, and p is differentiated too."""
    return [(torch.ones(()), squares((log_p.exp() * log_p).sum(), trained))]


def weight_inside(log_p: Tensor, y: Tensor, trained: dict[str, Tensor], weigh) -> list[tuple[Tensor, dict]]:
    return [(log_p[c].exp().detach() ** 2, squares(log_p[c], trained)) for c in range(len(log_p))]


def a_model(g: torch.Generator) -> nn.Module:
    """Two layers, the first of three frozen."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 1.5)
    model[0].requires_grad_(False)
    return model


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for rows in (7, 5):
        model = a_model(g)
        x, y = torch.randn(rows, 4, generator=g), torch.randint(3, (rows,), generator=g)
        model[4].bias.grad = torch.ones(3)
        before = [p.detach().clone() for p in model.parameters()]
        for estimator in ("empirical", "exact", "batch"):
            found = answer(model, x, y, estimator)
            tensors = isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values())
            yield f"{estimator}, {rows} rows", {n: F.detach() for n, F in found.items()} if tensors else found
        yield f"whether the parameters are as they were, {rows} rows", all(map(torch.equal, model.parameters(), before))
        kept = model[4].bias.grad is not None and bool((model[4].bias.grad == 1).all())
        yield f"whether gradients that were there are still there, {rows} rows", kept


check = Check(
    task="the Fisher's diagonal: exact, empirical, batch",
    observe=observe,
    reference=fisher_diagonal,
    second=by_squares,
    misconceptions={
        "exact: the answers are added up without their weights. Each squared gradient counts p(y|x) times": but(weigh=torch.ones_like),
        "exact: you took the likeliest answer of each row. Take every answer, weighed by its probability": but(exact=the_likeliest),
        "exact is what you return for the label alone: sum over every answer the model could give, each times p(y|x)": but(exact=the_label),
        "exact: that is the squared gradient of Σ p·log p. Square the gradient of each log p first, then weigh and add up": but(
            exact=entropys_gradient
        ),
        "exact: the weight p(y|x) is inside the square. Square the gradient of log p alone": but(exact=weight_inside),
        "empirical: the rows are added up, not averaged. F is a mean over rows": but(mean=lambda total, rows: total),
        "batch: that is the square of the sum. The batch's loss is a mean, so its gradient is smaller by the number of rows": but(
            batch=squared_sum
        ),
        "batch: that is the mean of the rows' squares, the empirical Fisher. Here the rows are averaged before the square": but(
            batch=lambda model, x, y, trained: {
                name: value / len(x) for name, value in row_by_row(model, x, y, trained, the_label, torch.exp).items()
            }
        ),
    },
)
