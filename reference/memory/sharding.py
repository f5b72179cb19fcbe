"""QLoRA on several cards: bytes on each, and bytes between them in one step.

Four engines divide the work in four ways. With R cards (ranks), each receives in a step

    DDP         2·(R−1)/R · gradients
    FSDP        (R−1)/R · (2·layers + outer + gradients)
    tensor      2·(R−1)/R · 6 · number of layers · stream
    pipeline    2 · stream            (the first and the last card have one neighbour: 1 · stream)

gradients: bytes of the adapters' (float32), which DDP sums everywhere and FSDP deals out. layers:
bytes of all layers as they are kept, codes, scales, norms and adapters, gathered twice; outer: of
embedding, head and last norm, gathered once. stream: bytes of the residual stream, tokens · h · 2;
tensor parallelism sums it six times a layer: twice in the forward pass, twice in the one that
checkpointing repeats, twice in the backward. Sums and gatherings go round in rings; none receives
less. Under DDP and FSDP each card has tokens of its own; the streams are those of the whole batch.

FSDP deals tensors out by rows and fills the last card's share up where they don't divide, so
(R−1)/R is, to the byte, R − 1 shares of ceil(rows/R) rows. FSDP: Rajbhandari et al. 2020 (ZeRO),
Zhao et al. 2023. Tensor parallel: Shoeybi et al. 2019 (Megatron). Pipeline: Huang et al. 2019.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from reference.arguments import check_integer
from reference.model_shapes import ModelShape

SCALES_BLOCK = 256
Rows = tuple[int, int]  # rows of a tensor, and bytes of a row


def layer_tensors(shape: ModelShape, block: int | None = 64, other_bytes: int = 2) -> list[Rows]:
    """The frozen tensors of one decoder layer; arguments as of :func:`sharded_memory`."""
    found: list[Rows] = [(shape.hidden, other_bytes)] * shape.norms
    for rows, into in shape.linears.values():
        packed = [(rows, into // 2), (rows, into // block)] if block else []
        found += packed or [(rows, other_bytes * into)]
    return found


def adapter_tensors(
    shape: ModelShape, rank: int, targets: str | Iterable[str] = "all-linear"
) -> list[Rows]:
    """A (r, in) and B (out, r) of one layer, float32."""
    shape.adapter_parameters(rank, targets)  # refuses a rank out of range
    sizes = [shape.linears[name] for name in shape.targets(targets)]
    return [pair for out, into in sizes for pair in ((rank, 4 * into), (out, 4 * rank))]


def outer_tensors(shape: ModelShape, other_bytes: int = 2) -> list[Rows]:
    """What lies outside the layers: embedding, head, last norm."""
    tables = 1 if shape.tied else 2
    return [(shape.vocab, other_bytes * shape.hidden)] * tables + [(shape.hidden, other_bytes)]


def share_bytes(tensors: list[Rows], cards: int) -> int:
    """Bytes of a card's share, filled up."""
    return sum(-(-rows // cards) * each for rows, each in tensors)


def whole_everywhere(shape: ModelShape, block: int | None = 64) -> int:
    """Bytes of the scales' scales and offsets, which every card holds."""
    scales = [out * into // block for out, into in shape.linears.values()] if block else []
    return shape.layers * sum(4 * (1 - (-count // SCALES_BLOCK)) for count in scales)


@dataclass(frozen=True)
class Sharded:
    """Bytes on one card of several under FSDP.

    Attributes:
        shares: of the frozen weights, between steps; with what is whole everywhere.
        adapters: shares of A and B, their gradients and Adam's two moments.
        gathered: the most of others' shares that is there at once: one layer as it was received
            and as it is used, or the next as it arrives; embedding and head.
        received: from the other cards in one step.
    """

    shares: int
    adapters: int
    gathered: int
    received: int

    @property
    def held(self) -> int:
        """Bytes between steps, without gradients."""
        return self.shares + self.adapters * 3 // 4


def sharded_memory(
    shape: ModelShape,
    cards: int,
    rank: int = 16,
    targets: str | Iterable[str] = "all-linear",
    block: int | None = 64,
    other_bytes: int = 2,
) -> Sharded:
    """What :func:`reference.sharded.quantize_and_shard` costs a card; activations not counted.

    Args:
        block: weights that share a scale in the layers' linears, NF4 with double quantization; None
            for linears that are not quantized.
        other_bytes: of a frozen weight that is not quantized.

    Raises:
        TypeError: ``cards`` is not an integer.
        ValueError: it is below 1; a rank or target that the shape does not have.
    """
    check_integer("cards", cards, 1)
    adapters = adapter_tensors(shape, rank, targets)
    frozen, outer = layer_tensors(shape, block, other_bytes), outer_tensors(shape, other_bytes)
    layer = share_bytes(frozen + adapters, cards)
    trained = shape.layers * share_bytes(adapters, cards)
    rest = share_bytes(outer, cards)
    return Sharded(
        shares=shape.layers * share_bytes(frozen, cards) + rest + whole_everywhere(shape, block),
        adapters=4 * trained,
        gathered=cards * (2 * layer + rest),
        received=(cards - 1) * (2 * shape.layers * layer + rest + trained),
    )


def received_bytes(
    engine: str, shape: ModelShape, cards: int, tokens: int, rank: int = 16
) -> float:
    """Bytes that a card receives in one step of QLoRA on all linears, by the formulas above.

    Args:
        engine: "DDP", "FSDP", "tensor" or "pipeline".
        tokens: of the whole batch.

    Raises:
        ValueError: another engine; a number below 1.
    """
    check_integer("tokens", tokens, 1)
    fsdp = sharded_memory(shape, cards, rank).received
    trained, stream = 4 * shape.adapter_parameters(rank), 2 * tokens * shape.hidden
    ring = (cards - 1) / cards
    found = {
        "DDP": 2 * ring * trained,
        "FSDP": fsdp,
        "tensor": ring * 2 * 6 * shape.layers * stream,
        "pipeline": (min(cards, 3) - 1) * stream,
    }
    if engine not in found:
        raise ValueError(f"engine must be one of {', '.join(found)}, got {engine!r}")
    return found[engine]
