"""Prompt tuning: words that no vocabulary has, put before the text and trained.

A model reads embeddings, (length, d). Prompt tuning puts P trained rows before those of the text
and trains nothing else: P·d numbers for a whole model.

    logits = model(embeddings = [prompt; E[tokens]])

The model's code stays as it is, and each text of a batch could have a prompt of its own. In return
each text is P positions longer, and nothing can be merged.

A start decides much. A trained embedding's entries are small, and N(0, 1), the usual default, is
some fifty times as large: the first steps are spent on coming back. Rows of the model's own
embedding are a better start: those of a text that says what is wanted, or of drawn tokens.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning" (2104.08691).
"""

import torch
from torch import Tensor, nn

from reference.arguments import check_integer

IGNORED = -100  # the label of a position that is not scored


class Prompt(nn.Module):
    """P trained rows. ``forward()`` gives them, (P, d).

    Args:
        start: (P, d), the first values; see :func:`text_start` and :func:`sampled_start`.
    """

    def __init__(self, start: Tensor):
        super().__init__()
        if start.dim() != 2 or not start.is_floating_point():
            wanted = "real numbers of shape (tokens, width)"
            raise ValueError(f"start must be {wanted}, got {tuple(start.shape)} {start.dtype}")
        if start.numel() == 0 or not torch.isfinite(start).all():
            raise ValueError("start must hold at least one row, and no NaN or infinity")
        # float32 beside a half-precision model too; a new tensor: no row of the vocabulary trains
        self.embedding = nn.Parameter(start.detach().float().clone())

    def forward(self) -> Tensor:
        return self.embedding


class PromptTuning(nn.Module):
    """A frozen model that reads ``prompt()`` before each text.

    Args:
        model: takes ``inputs_embeds`` and has ``get_input_embeddings()``, as all of transformers'.
        prompt: a :class:`Prompt`, or a :class:`reference.soft_prompts.PromptEncoder` (P-tuning).
    """

    def __init__(self, model: nn.Module, prompt: nn.Module):
        super().__init__()
        table, width = model.get_input_embeddings().weight, prompt().shape[1]
        if width != table.shape[1]:
            raise ValueError(f"prompt has width {width}, the model's embedding {table.shape[1]}")
        self.base = model.requires_grad_(False)
        self.prompt = prompt.to(table.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **more,
    ):
        """What the model gives for [prompt; text], logits of the prompt's positions included.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length), 1 where there is text.
            labels: of each token, (batch, length): the prompt's positions are not scored. Labels of
                another shape, a text's class, are passed on as they are.

        Raises:
            ValueError: ``position_ids`` are given, which would count without the prompt.
        """
        if more.get("position_ids") is not None:
            raise ValueError("position_ids must not be given: the prompt moves every position")
        text = self.base.get_input_embeddings()(input_ids)  # (batch, length, d)
        prompt = self.prompt().to(text.dtype).expand(len(text), -1, -1)  # (batch, P, d)
        if attention_mask is not None:
            more["attention_mask"] = before(attention_mask, prompt.shape[1], 1)
        if more.get("token_type_ids") is not None:  # BERT's: the prompt is of the first segment
            more["token_type_ids"] = before(more["token_type_ids"], prompt.shape[1], 0)
        if labels is not None:
            of_tokens = labels.shape == input_ids.shape
            more["labels"] = before(labels, prompt.shape[1], IGNORED) if of_tokens else labels
        return self.base(inputs_embeds=torch.cat([prompt, text], 1), **more)


def before(rows: Tensor, count: int, value: int) -> Tensor:
    """(batch, length) -> (batch, count + length), with ``value`` in front."""
    return torch.cat([rows.new_full((len(rows), count), value), rows], 1)


def text_start(embedding: nn.Module, ids: list[int], tokens: int) -> Tensor:
    """The embedding's rows of a text, repeated or cut to ``tokens``: (tokens, d).

    Args:
        embedding: ``model.get_input_embeddings()``; called, since some scale what they look up.
        ids: the text's tokens.

    Raises:
        ValueError: there are no ids, or ``tokens`` is below 1.
    """
    check_integer("tokens", tokens, 1)
    if not len(ids):
        raise ValueError("ids is empty: give the tokens of a text")
    chosen = [ids[i % len(ids)] for i in range(tokens)]
    with torch.no_grad():
        return embedding(torch.tensor(chosen, device=embedding.weight.device)).float()


def sampled_start(
    embedding: nn.Module, tokens: int, generator: torch.Generator | None = None
) -> Tensor:
    """The embedding's rows of ``tokens`` drawn tokens: (tokens, d)."""
    check_integer("tokens", tokens, 1)
    ids = torch.randint(len(embedding.weight), (tokens,), generator=generator).tolist()
    return text_start(embedding, ids, tokens)
