"""Output head and cross-entropy together, a few rows at a time: the logits never exist whole.

    loss = mean over counted rows of  −log softmax(h · Wᵀ)[target]
    ∂loss/∂logits = (softmax − onehot) / counted

For 4 × 2048 tokens and a vocabulary of 32,000 the logits take 0.5 GB in 16 bits, 1 GB in the
float32 of the loss, and the gradient as much again: more than all the layers below keep under
checkpointing. But a row of the gradient needs nothing of the other rows except how many are
counted. So each chunk of rows goes all the way, to its share of the loss and to ∂loss/∂h, before
the next begins, and what is kept until the backward is that gradient alone, as large as h. The
forward does the backward's work for the head; the backward multiplies by the gradient of the loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from reference.arguments import check_integer

IGNORED = -100
# Rows: enough for the matrix product's full rate, and 32,000 float32 logits of each are 131 MB.
CHUNK = 1024


def next_tokens(ids: Tensor) -> Tensor:
    """What each position shall predict, (rows, length): the token after it.

    The last one's does not count.
    """
    return F.pad(ids[:, 1:], (0, 1), value=IGNORED)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Mean cross-entropy of ``softmax(hidden · weightᵀ)`` over the targets that count.

    The numbers are those of ``F.cross_entropy(F.linear(hidden, weight).float(), targets)``:
    products in the dtype of the arguments, the softmax in float32. Nothing waits for the device,
    and no shape depends on a value. Differentiable once, in ``hidden`` and ``weight``.

    Args:
        hidden: (..., features), floating.
        weight: of the head, (vocabulary, features), in the same dtype; usually frozen.
        targets: int64, (...); ``IGNORED`` (−100) does not count. If none counts, the loss is NaN,
            as in torch.
        chunk: rows worked on at a time.

    Returns:
        A float32 number.

    Raises:
        ValueError: shapes do not fit, or ``chunk`` is not positive.
        TypeError: the dtypes differ, targets are not int64, or ``chunk`` is no integer.
    """
    if weight.ndim != 2 or hidden.shape != (*targets.shape, weight.shape[1]):
        wanted = "(..., features), (vocabulary, features) and (...)"
        given = {"hidden": hidden, "weight": weight, "targets": targets}
        got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
        raise ValueError(f"shapes must be {wanted}, got {got}")
    same = hidden.dtype == weight.dtype and hidden.is_floating_point()
    if not same or targets.dtype != torch.int64:
        wanted = "hidden and weight must share a floating dtype, and targets be int64"
        raise TypeError(f"{wanted}, got {hidden.dtype}, {weight.dtype} and {targets.dtype}")
    check_integer("chunk", chunk, 1)
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, learns: bool
    ) -> Tensor:
        needs_hidden, needs_weight, *_ = (learns and needed for needed in ctx.needs_input_grad)
        rows = hidden.reshape(-1, hidden.shape[-1])  # (n, features)
        flat = targets.reshape(-1)  # (n,)
        counts = flat != IGNORED  # (n,)
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(rows) if needs_hidden else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        for start in range(0, len(rows), chunk):
            here = slice(start, start + chunk)
            h = rows[here]  # (c, features)
            target, counted = flat[here].clamp(min=0)[:, None], counts[here][:, None]  # (c, 1)
            with torch.autocast(h.device.type, enabled=False):
                logits = F.linear(h, weight).float()  # (c, vocabulary)
            normalizer = logits.logsumexp(1, keepdim=True)  # (c, 1)
            total += ((normalizer - logits.gather(1, target)) * counted).sum()
            if needs_hidden or needs_weight:
                gradient = logits.sub_(normalizer).exp_()  # probabilities, in the logits' place
                gradient.scatter_add_(1, target, torch.full_like(normalizer, -1)).mul_(counted)
                gradient = gradient.to(h.dtype)  # not divided yet, so that no float16 vanishes
                with torch.autocast(h.device.type, enabled=False):
                    if needs_hidden:
                        torch.mm(gradient, weight, out=grad_hidden[here])
                    if needs_weight:
                        grad_weight += gradient.T @ h
        counted = counts.sum()
        ctx.shape, ctx.dtype = hidden.shape, weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight, counted)
        return total / counted

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, counted = ctx.saved_tensors
        scale = grad / counted
        if grad_hidden is not None:
            # A number without axes widens no dtype.
            grad_hidden = (grad_hidden * scale).view(ctx.shape)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None
