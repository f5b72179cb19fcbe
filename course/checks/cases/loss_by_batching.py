"""The mean runs over padding, which is easy to predict: the more of it a batch has, the better its loss looks.

Padding must be left out of the sum and of the count. It can't be told by its id here, since the end of text has the same one and is a
target: go by the lengths.
"""

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from course.cases import loss_by_batching as script
from course.cases.loss_by_batching import PAD, padded
from course.checking import Check, NotYet, Seen


def by_length(ids: Tensor, lengths: list[int]) -> Tensor:
    """True where a place is text, (rows, places)."""
    return torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]


def loss_of(logits: Tensor, ids: Tensor, lengths: list[int]) -> Tensor:
    """The worked answer: a target is a place that is text, and the mean is over these."""
    text = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    return F.cross_entropy(logits[:, :-1][text[:, 1:]], ids[:, 1:][text[:, 1:]])


def varied(counted=by_length, mean=lambda losses, mask: (losses * mask).sum() / mask.sum()):
    """The worked answer with a part replaced."""

    def answer(logits: Tensor, ids: Tensor, lengths: list[int]) -> Tensor:
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        return mean(losses, counted(ids, lengths)[:, 1:])

    return answer


def row_by_row(logits: Tensor, ids: Tensor, lengths: list[int]) -> Tensor:
    """Each row is cut to its length."""
    rows = [F.cross_entropy(logits[i, : n - 1], ids[i, 1:n], reduction="sum") for i, n in enumerate(lengths)]
    return torch.stack(rows).sum() / sum(n - 1 for n in lengths)


def observe(answer, seed: int) -> Seen:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    texts = [[*(rng.randrange(1, 9) for _ in range(n)), PAD] for n in rng.sample(range(2, 9), 3)]
    ids, lengths = padded(texts), [len(text) for text in texts]
    logits = torch.randn(*ids.shape, 9, generator=g).requires_grad_()
    loss = answer(logits, ids, lengths)
    if not isinstance(loss, Tensor) or loss.shape != ():
        raise NotYet("return the loss, a tensor of one number")
    yield "the loss of a padded batch", loss.detach()
    wide = F.pad(ids, (0, 5), value=PAD), F.pad(logits.detach(), (0, 0, 0, 5))
    yield "the same with five more places of padding", answer(wide[1], wide[0], lengths).detach()
    alone = [answer(logits.detach()[i : i + 1, :n], ids[i : i + 1, :n], [n]) for i, n in enumerate(lengths)]
    yield "the loss of each text alone", torch.stack(alone)
    yield "the gradient of the logits", torch.autograd.grad(loss, logits)[0] if loss.requires_grad else torch.zeros(0)


check = Check(
    task="a loss per token of text, whatever the padding",
    observe=observe,
    reference=loss_of,
    second=row_by_row,
    misconceptions={
        "padding is in the mean: leave the places behind each row's length out of the sum and of the count": script.loss_of,
        "padding is left out of the sum and not of the count: the loss still falls with more padding": varied(
            mean=lambda losses, mask: (losses * mask).mean()
        ),
        "padding was told by its id, and the end of text has the same one, which is a target: go by the lengths": varied(
            counted=lambda ids, lengths: ids != PAD
        ),
        "the mean of each row's mean: a token of a short text counts more than one of a long text; divide once, by all tokens": varied(
            mean=lambda losses, mask: ((losses * mask).sum(1) / mask.sum(1)).mean()
        ),
        "the sum over tokens: it does not depend on the padding, but on the number of tokens; divide by it": varied(
            mean=lambda losses, mask: (losses * mask).sum()
        ),
        "the first place behind each text is a target: it is padding; a row has one target less than it has tokens": varied(
            counted=lambda ids, lengths: by_length(ids, [n + 1 for n in lengths])
        ),
        "the loss is right and carries no gradient: it can't train; don't detach it": lambda logits, ids, lengths: loss_of(
            logits.detach(), ids, lengths
        ),
    },
)
