"""Exercise 6: the largest batch that fits."""

import math
import operator
import random

from course.checking import Check, but


def largest_batch(
    capacity: int,
    held: int,
    kept_per_token: int,
    sequence: int,
    vocab: int,
    *,
    loss: int = 12,  # bytes per token and vocabulary entry
    row=lambda sequence, kept, loss: sequence * (kept + loss),
    room=operator.sub,
    whole=math.floor,
    least=lambda left: 0,
) -> int:
    """The worked answer: a token needs what is kept for it, and log-probabilities and two gradients, float32, for each word."""
    left = room(capacity, held)
    return max(least(left), whole(left / row(sequence, kept_per_token, loss * vocab)))


def by_divmod(capacity: int, held: int, kept_per_token: int, sequence: int, vocab: int) -> int:
    rows, _ = divmod(capacity - held, sequence * kept_per_token + 3 * 4 * sequence * vocab)
    return rows if rows > 0 else 0


def observe(answer, seed: int) -> dict:
    rng = random.Random(seed)
    kept, sequence, vocab = rng.randint(200_000, 600_000), rng.choice([256, 384, 512]), rng.choice([32_000, 49_152, 128_256])
    row, held = sequence * (kept + 12 * vocab), rng.randint(10**10, 3 * 10**10)
    rows = rng.randint(200, 300)
    room = {
        "room for some rows and most of another": rows * row + int(0.7 * row),
        "room for some rows and a part of another": rows * row + int(0.3 * row),
        "room for a part of one row": int(0.6 * row),
        "room for rows without a remainder": rows * row,
        "what is held does not fit by itself": -rng.randint(2, 5) * row,
    }
    return {label: answer(max(held + left, 1), held, kept, sequence, vocab) for label, left in room.items()}


check = Check(
    task="largest batch that fits",
    observe=observe,
    reference=largest_batch,
    second=by_divmod,
    misconceptions={
        "the loss is missing: log-probabilities in float32 and two gradients of their size, 12 bytes per token and vocabulary entry": but(
            loss=0
        ),
        "only the log-probabilities are counted: their gradient and the gradient of the logits are there at the same time": but(loss=4),
        "one of the loss's three float32 tensors is missing: log-probabilities, their gradient, the gradient of the logits": but(loss=8),
        "the loss's tensors are float32, also in a bf16 model: 3 · 4 bytes per token and vocabulary entry, not 3 · 2": but(loss=6),
        "the loss's tensors are counted in numbers and not in bytes: a float32 takes 4, so 3 · 4 bytes per token and vocabulary entry": but(
            loss=3
        ),
        "the loss is counted for one token of a row: each of its tokens needs 12 bytes per vocabulary entry": but(
            row=lambda sequence, kept, loss: sequence * kept + loss
        ),
        "this is a number of tokens: divide by the sequence length to get rows": but(row=lambda sequence, kept, loss: kept + loss),
        "you rounded up: a row that does not fit as a whole does not fit": but(whole=math.ceil),
        "you rounded to the nearest number: a row that does not fit as a whole does not fit": but(whole=round),
        "a batch is never negative: where nothing fits, the answer is 0": but(least=lambda left: -math.inf),
        "what is held takes room too: subtract it first": but(room=lambda capacity, held: capacity),
        "a row that does not fit as a whole does not fit: where there is room for a part of one, the answer is 0": but(
            least=lambda left: 1 if left > 0 else 0
        ),
        "a batch has at least one row only where one fits: else the answer is 0": but(least=lambda left: 1),
    },
    rtol=0,
    atol=0,
)
