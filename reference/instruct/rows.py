"""From conversations to batches: what is too long, what has no target, and padding that hides none.

Two silent failures live here. A row cut at its end may lose its whole answer: all labels are −100,
and the mean over no target is NaN. And padding with the end-of-text token, then masking labels by
that *id*, also masks the one token that tells a model to stop. So rows are judged by their targets,
and padding is known by its place.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from reference.arguments import check_integer
from reference.instruct.conversation import Conversation, Dropped, Report
from reference.instruct.masks import IGNORED, Example, encode, special_tokens

OVERFLOW = ("drop", "keep_start", "keep_end")


def fit(example: Example, max_length: int, overflow: str = "drop") -> Example | None:
    """``example`` within ``max_length`` tokens; None if it can't be, or no target would be left.

    Args:
        overflow: "drop" a longer row; "keep_start" cuts its end, and with it the end of the
            answer; "keep_end" cuts its start, and with it the system prompt.

    Raises:
        ValueError: ``max_length`` is below 2, or ``overflow`` none of these.
    """
    check_integer("max_length", max_length, least=2)
    if overflow not in OVERFLOW:
        raise ValueError(f"overflow must be one of {', '.join(OVERFLOW)}, got {overflow!r}")
    if len(example.ids) > max_length:
        if overflow == "drop":
            return None
        kept = slice(max_length) if overflow == "keep_start" else slice(-max_length, None)
        example = Example(example.ids[kept], example.labels[kept], example.seam)
    return example if example.targets else None


def prepare(
    tokenizer,
    conversations: Iterable[Conversation],
    max_length: int,
    train_on: str = "assistant",
    boundaries: str = "rendered",
    overflow: str = "drop",
    on_error: str = "raise",
    stop: int | None = None,
) -> tuple[list[Example], Report]:
    """Rows to train on, and what became of every conversation.

    Args:
        stop: the id that must be a target in the last turn, or generation will not end; default:
            the tokenizer's end of text. See :func:`encode` and :func:`fit` for the others.
        on_error: "raise" at a conversation that can't be encoded, or "drop" it.

    Raises:
        ValueError: what ``encode`` and ``fit`` refuse, with the line; an answer without ``stop``;
            no row is left.
    """
    if on_error not in ("raise", "drop"):
        raise ValueError(f"on_error must be 'raise' or 'drop', got {on_error!r}")
    stop = tokenizer.eos_token_id if stop is None else stop
    examples, report = [], Report()
    reserved = special_tokens(tokenizer)  # Gemma has thousands: listed once, not for each row
    for each in conversations:
        reason = "not encoded"
        try:
            whole = encode(tokenizer, each.messages, train_on, boundaries, reserved)
            reason = "no end of turn"
            check_stop(whole, stop)
        except ValueError as error:
            if on_error == "raise":
                raise ValueError(f"line {each.line}: {error}") from error
            report.dropped.append(Dropped(each.line, reason, str(error)))
            continue
        fitting = fit(whole, max_length, overflow)
        if fitting is None:
            long = len(whole.ids) > max_length
            reason = "no target left" if long and overflow != "drop" else "too long"
            report.dropped.append(Dropped(each.line, reason, f"{len(whole.ids)} tokens"))
            continue
        examples.append(fitting)
    report.kept = len(examples)
    if not examples:
        raise ValueError(f"no row is left to train on: {report}")
    return examples, report


def check_stop(example: Example, stop: int | None) -> None:
    """Raise unless the end of the last turn is a target.

    Raises:
        ValueError: ``stop`` is not among the last turn's targets.
    """
    if stop is None:
        raise ValueError("the tokenizer has no end of text: say which id ends a turn (stop=…)")
    last = []
    for label in reversed(example.labels):
        if label == IGNORED and last:
            break
        last += [label] * (label != IGNORED)
    if stop not in last:
        raise ValueError(
            f"the last turn does not end with id {stop}, so the model would not learn to stop: "
            "say which id ends a turn (stop=…), or put it into the template"
        )


def pad_batch(examples: Sequence[Example], pad: int, side: str = "right") -> dict[str, Tensor]:
    """Rows of one length: "input_ids", "attention_mask", "labels", each (rows, longest), int64.

    Args:
        pad: any id, that of the end of text too: labels are masked by place and not by id.
        side: "right" to train, "left" to generate.

    Raises:
        ValueError: there is no row, or ``side`` is neither word.
    """
    if not examples:
        raise ValueError("examples is empty: a batch needs a row")
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    longest = max(len(example.ids) for example in examples)
    batch = {
        "input_ids": torch.full((len(examples), longest), pad),
        "attention_mask": torch.zeros(len(examples), longest, dtype=torch.long),
        "labels": torch.full((len(examples), longest), IGNORED),
    }
    for row, example in enumerate(examples):
        n = len(example.ids)
        place = slice(n) if side == "right" else slice(longest - n, longest)
        batch["input_ids"][row, place] = torch.tensor(example.ids)
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = torch.tensor(example.labels)
    return batch


def target_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the targets of the whole batch.

    Args:
        logits: (rows, n, vocabulary).
        labels: (rows, n), not shifted.

    Raises:
        ValueError: no label is a target: the mean over nothing is NaN.
    """
    aims = labels[:, 1:].flatten()
    if not (aims != IGNORED).any():
        raise ValueError("no label of the batch is a target: leave out rows without an answer")
    flat = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(flat, aims, ignore_index=IGNORED)
