"""T-Few's three losses: how a model learns to choose among answers from a few examples.

An example is a prompt with several choices, one of which is right. Each choice is scored by the
model's cross-entropy of its tokens given the prompt.

    LM   cross-entropy of the right choice's tokens: say it
    UL   −log(1 − p + 0.01), mean over the tokens of the wrong choices: don't say those
    LN   cross-entropy over choices, with −(a choice's cross-entropy)/(its tokens) as its logit:
         prefer it, however long it is

T-Few trains IA³ (:mod:`reference.ia3`) on their plain sum. The 0.01 keeps the second finite where a
wrong token has probability one. The published code adds −log 1.01 for every padded token and every
token of the right choice to the second sum, a constant without a gradient; it is left out here.

Liu et al. 2022 (2205.05638); Tam et al. 2021 (2103.11955) for LN; Welleck et al. 2020 for UL.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that is not scored


def choice_losses(
    logits: Tensor, labels: Tensor, right: Tensor, ul: float = 1.0, ln: float = 1.0
) -> dict[str, Tensor]:
    """T-Few's loss and its parts for a batch of examples with equally many choices.

    Args:
        logits: (batch, choices, length, vocabulary), each already at the place that predicts the
            label: for a causal model, shifted by one.
        labels: (batch, choices, length), −100 at prompts and padding.
        right: (batch,), the index of the right choice.
        ul, ln: weights of the second and third loss; 0 turns one off.

    Returns:
        "loss", the weighted sum, and "lm", "ul", "ln", scalars in float32.

    Raises:
        ValueError: shapes don't fit, a choice has no token, or there is only one choice.
    """
    _check(logits, labels, right)
    batch = torch.arange(len(labels), device=labels.device)
    costs = F.cross_entropy(
        logits.flatten(0, 2).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)  # (batch, choices, length): −log p of each token, 0 where ignored
    scored = labels != IGNORED
    wrong = scored.clone()
    wrong[batch, right] = False
    lm = costs[batch, right].sum() / scored[batch, right].sum()
    unlikely = -torch.log(1 - torch.exp(-costs) + 1e-2)
    parts = {
        "lm": lm,
        "ul": unlikely[wrong].mean(),
        "ln": F.cross_entropy(scores(costs, scored), right),
    }
    return {"loss": lm + ul * parts["ul"] + ln * parts["ln"], **parts}


def scores(costs: Tensor, scored: Tensor) -> Tensor:
    """−(mean cost of a choice's tokens), (batch, choices): the highest is the model's answer."""
    return -costs.sum(-1) / scored.sum(-1)


def answer_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """The model's score of each choice, (batch, choices); arguments of :func:`choice_losses`."""
    costs = F.cross_entropy(
        logits.flatten(0, 2).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    return scores(costs, labels != IGNORED)


def _check(logits: Tensor, labels: Tensor, right: Tensor) -> None:
    if logits.shape[:-1] != labels.shape or labels.dim() != 3:
        words = "(batch, choices, length) before the vocabulary"
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"logits and labels must agree on {words}, got {shapes}")
    if labels.shape[1] < 2:
        raise ValueError("labels has one choice: there must be a wrong one to learn from")
    if right.shape != labels.shape[:1] or ((right < 0) | (right >= labels.shape[1])).any():
        words = f"one index below {labels.shape[1]} for each of {len(labels)} examples"
        raise ValueError(f"right must be {words}, got {right.tolist()}")
    if (labels == IGNORED).all(-1).any():
        raise ValueError("labels: a choice has no token to score, only −100")
