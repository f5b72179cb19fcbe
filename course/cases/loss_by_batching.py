"""The same model and the same texts: the loss depends on how the texts are batched.

Sorted by length, the evaluation gives one number; shuffled, a much better one. The model predicts
the padding very well. Mend `loss_of`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

PAD = 0


def loss_of(logits: Tensor, ids: Tensor, lengths: list[int]) -> Tensor:
    """Mean cross-entropy of the next token: logits (rows, places, words), ids (rows, places).

    A row's first ``lengths[row]`` ids are text, which ends with PAD: it is the end of text, too.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def padded(texts: list[list[int]]) -> Tensor:
    return torch.tensor([text + [PAD] * (max(map(len, texts)) - len(text)) for text in texts])


def main(loss_of=loss_of) -> None:
    torch.manual_seed(0)
    texts = [[*torch.randint(1, 20, (n,)).tolist(), PAD] for n in (3, 3, 4, 4, 30, 30, 31, 31)]
    table = torch.randn(20, 20)  # a model: the next word's logits, from the last word
    table[PAD, PAD] = 12.0
    for name, order in (("sorted", range(8)), ("shuffled", (0, 4, 1, 5, 2, 6, 3, 7))):
        batches = [[texts[i] for i in order][k : k + 2] for k in (0, 2, 4, 6)]
        losses = [
            loss_of(table[padded(batch)], padded(batch), list(map(len, batch))) for batch in batches
        ]
        counts = [sum(map(len, batch)) - len(batch) for batch in batches]
        mean = sum(count * loss for count, loss in zip(counts, losses, strict=True)) / sum(counts)
        print(f"{name:9} loss per token {mean:.3f}")
