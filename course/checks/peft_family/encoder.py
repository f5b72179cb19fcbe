"""Exercise 4: what P-tuning trains, and what of it is saved."""

from numbers import Integral

from course.checking import Check, Seen, but, unpacked


def lstm_numbers(d: int, h: int, directions: int = 2, layers: int = 2, gates: int = 4, biases: int = 2, between: int | None = None) -> int:
    """Of torch's LSTM: a layer and direction has gates·h rows over its input and over its state, and two biases."""
    between = directions * h if between is None else between  # what the second layer reads
    inputs = [d] + [between] * (layers - 1)
    return sum(directions * gates * h * (inside + h + biases) for inside in inputs)


def linear(inside: int, outside: int) -> int:
    return outside * (inside + 1)


def p_tuning_numbers(
    P: int,
    d: int,
    h: int,
    network: str,
    *,
    lstm=lstm_numbers,
    layer=linear,
    head=lambda h: 2 * h,
    mlp_layers=lambda d, h: [(d, h), (h, h), (h, d)],
    rows=lambda P, d: P * d,
    saved=lambda P, d, trained: P * d,
) -> tuple[int, int]:
    """The worked answer: numbers trained, and numbers in the file."""
    trained = rows(P, d)
    if network == "mlp":
        trained += sum(layer(*sizes) for sizes in mlp_layers(d, h))
    else:
        trained += lstm(d, h) + layer(head(h), head(h)) + layer(head(h), d)
    return trained, saved(P, d, trained)


def by_torch(P: int, d: int, h: int, network: str) -> tuple[int, int]:
    from reference.soft_prompts import PromptEncoder

    return sum(p.numel() for p in PromptEncoder(P, d, h, network).parameters()), P * d


def observe(answer, seed: int) -> Seen:
    sizes = [(20, 12, 7), (5, 16, 16), (3, 9, 4 + seed % 5)]
    for network in ("mlp", "lstm"):
        for P, d, h in sizes:
            result = answer(P, d, h, network)
            trained, saved = unpacked(result, "a pair of whole numbers: trained, saved", Integral, Integral)
            yield f"numbers trained for {P} tokens, width {d}, hidden {h}, {network}", trained
            yield f"numbers saved for {P} tokens, width {d}, hidden {h}, {network}", saved


check = Check(
    task="P-tuning's numbers: what is trained, and the little that is saved",
    observe=observe,
    reference=p_tuning_numbers,
    second=by_torch,
    rtol=0,
    atol=0,
    misconceptions={
        "the LSTM reads in one direction only: P-tuning's is bidirectional, twice the numbers, and its second layer reads both": but(
            lstm=lambda d, h: lstm_numbers(d, h, directions=1)
        ),
        "the LSTM has one layer: P-tuning's has two": but(lstm=lambda d, h: lstm_numbers(d, h, layers=1)),
        "the second layer of the LSTM reads both directions of the first, twice as many numbers as one direction gives": but(
            lstm=lambda d, h: lstm_numbers(d, h, between=h)
        ),
        "an LSTM has four gates, each with weights for input and state": but(lstm=lambda d, h: lstm_numbers(d, h, gates=1)),
        "torch's LSTM has two bias vectors in each layer and direction, bias_ih and bias_hh": but(
            lstm=lambda d, h: lstm_numbers(d, h, biases=1)
        ),
        "the linear layers have biases too": but(layer=lambda inside, outside: inside * outside),
        "behind the LSTM the linear layers read both directions": but(head=lambda h: h),
        "the MLP has three linear layers: width → hidden → hidden → width": but(mlp_layers=lambda d, h: [(d, h), (h, d)]),
        "the two numbers are exchanged: first what is trained, then what the file holds": lambda *given: p_tuning_numbers(*given)[::-1],
        "the rows that the network reads are trained too": but(rows=lambda P, d: 0),
        "the network is not saved: after training only what comes out of it is needed, the rows": but(saved=lambda P, d, trained: trained),
    },
)
