"""What autograd keeps: every tensor that a Llama's forward pass leaves for the backward pass.

An operation keeps what its derivative needs, and nothing else. In y = W·x the gradient of W needs
x and the gradient of x needs W: a *frozen* linear layer keeps no activation at all. LoRA's A, which
is trained, keeps the same x again. A sum keeps nothing, a product of two activations keeps both,
silu its input, softmax its output. One layer of a model trained in full keeps, in bytes,

    n · [ 2·(4·h + 4)       norm inputs, float32, each with its 1/rms
        + 2·c·h             normalized, before the gain
        + c·h               input of q, k, v
        + c·(2·q + 2·kv)    q, k, v and attention's output
        + 4·heads           log-sums of softmax, float32
        + c·h               input of gate, up
        + 3·c·m             gate, silu(gate), up
        + c·m ]             input of down

for n tokens of c bytes a number; h hidden, q = heads·head_dim, kv = kv_heads·head_dim, m MLP width.
In :func:`layer` each group stands with the condition under which it is kept. The layer is that of
the Hugging Face library: RMSNorm in float32, rotary positions, scaled-dot-product attention, loss
in float32. A batch with padding needs a mask, and with a mask that library repeats k and v for
every head: q for kv above, and the mask itself in each layer. The tests count the same bytes in
real models, tensor by tensor. (Korthikanti et al. 2022 do this for GPT. Checkpointing: Chen et al.
2016.)
"""

from dataclasses import dataclass

from reference.arguments import check_integer
from reference.model_shapes import ATTENTION_INPUTS, MLP_INPUTS, ModelShape


@dataclass(frozen=True)
class Run:
    """What a training step does, as far as its activations depend on it.

    Attributes:
        batch, sequence: rows of tokens, and their length.
        compute_bytes: of an activation: 2 (bf16, fp16) or 4.
        trained: the base weights are trained, all of them; else all are frozen.
        targets: linears with an adapter; empty without LoRA.
        rank, adapter_bytes: of the adapters, and of a number in A and B.
        input_copies: where that differs from ``compute_bytes``, each adapter keeps a copy of its
            input in its own dtype.
        attention: "fused" (flash, memory-efficient) never stores the sequence × sequence scores;
            "math" does.
        padding: rows differ in length, so attention gets a mask. A fused one then keeps it, batch ×
            sequence × sequence, and reads k and v repeated for each head.
    """

    batch: int
    sequence: int
    compute_bytes: int
    trained: bool
    targets: tuple[str, ...] = ()
    rank: int = 0
    adapter_bytes: int = 4
    input_copies: bool = False
    attention: str = "fused"
    padding: bool = False

    def __post_init__(self) -> None:
        check_integer("batch", self.batch, 1)
        check_integer("sequence", self.sequence, 1)
        if self.attention not in ("fused", "math"):
            raise ValueError(f"attention must be 'fused' or 'math', got {self.attention!r}")

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def copies(self) -> bool:
        return self.input_copies and self.adapter_bytes != self.compute_bytes

    def keeps_input_of(self, *linears: str) -> bool:
        """Whether ``linears``, which read one tensor, keep it: they are trained, or an A is."""
        return self.trained or (not self.copies and any(name in self.targets for name in linears))


def layer(shape: ModelShape, run: Run, inflow: bool = True) -> dict[str, int]:
    """Bytes that one decoder layer keeps, by group.

    Args:
        inflow: the layer's input needs a gradient. False in the first layer over a frozen
            embedding, which therefore keeps less.
    """
    n, c, h, m = run.tokens, run.compute_bytes, shape.hidden, shape.mlp
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # "flows": a gradient has to reach it
    q_flows, k_flows, v_flows = (inflow or name in run.targets for name in ATTENTION_INPUTS)
    in_attention = q_flows or k_flows or v_flows
    after_attention = in_attention or "o_proj" in run.targets
    gate_flows, up_flows = (after_attention or name in run.targets for name in MLP_INPUTS)
    fused = run.attention == "fused"
    if fused:  # keeps all that it read, whichever needs a gradient, and one log-sum a row of scores
        attended, row = c * n * (q + 2 * (q if run.padding else kv)) * in_attention, 1
    else:  # in float32, k and v repeated for each head; a factor is kept for the other's gradient
        attended = 4 * n * q * (q_flows + k_flows + (q_flows or k_flows))
        row = run.sequence  # the whole row of scores
    copied = sum(shape.linears[name][1] for name in run.targets) * run.copies
    kept = {
        "norm inputs, float32": 4 * n * (h + 1) * (inflow + after_attention) * shape.norms // 2,
        "norms before their gains": c * n * h * shape.norms * run.trained,
        "input of q, k, v": c * n * h * run.keeps_input_of(*ATTENTION_INPUTS),
        "queries, keys, values": attended,
        "softmax, float32": 4 * n * shape.heads * row * in_attention,
        "mask": c * n * run.sequence * (fused and run.padding and in_attention),
        "attention output": c * n * q * ((fused and in_attention) or run.keeps_input_of("o_proj")),
        "input of gate, up": c * n * h * run.keeps_input_of(*MLP_INPUTS),
        "gate, silu(gate), up": c * n * m * (2 * gate_flows * shape.gated + up_flows),
        "input of down": c * n * m * run.keeps_input_of("down_proj"),
        "A's copies of inputs": run.adapter_bytes * n * copied,
        "A·x": run.adapter_bytes * n * run.rank * len(run.targets),
    }
    return {name: count for name, count in kept.items() if count}


def head(shape: ModelShape, run: Run) -> dict[str, int]:
    """Bytes kept outside the decoder layers, by group."""
    n, c, h = run.tokens, run.compute_bytes, shape.hidden
    return {
        "log-probabilities, float32": 4 * n * shape.vocab,
        "last norm, input of the head": 4 * n * (h + 1) + 2 * c * n * h * run.trained,
        # labels; ids, if the embedding is trained; how many there are
        "token ids": 8 * n * (1 + run.trained) + 8 * (run.batch == 1) + 4,
        "rotary tables": 2 * c * run.sequence * shape.head_dim,
    }


def layer_input(shape: ModelShape, run: Run) -> int:
    """Bytes of the residual stream at one place: batch × sequence × hidden."""
    return run.compute_bytes * run.tokens * shape.hidden


def layers(shape: ModelShape, run: Run, checkpointing: bool = False) -> int:
    """Bytes that all decoder layers keep.

    With ``checkpointing`` a layer keeps its input alone and runs again when it is needed.
    """
    if checkpointing:
        return shape.layers * layer_input(shape, run)
    first, other = (sum(layer(shape, run, inflow).values()) for inflow in (run.trained, True))
    return first + (shape.layers - 1) * other


def kept(shape: ModelShape, run: Run, checkpointing: bool = False) -> int:
    """All bytes kept between the forward and the backward pass."""
    return layers(shape, run, checkpointing) + sum(head(shape, run).values())


def done_before_attention(shape: ModelShape, run: Run, inflow: bool = True) -> int:
    """Bytes of :func:`layer` that have had their turn when its backward pass reaches the attention.

    They are those of the MLP, its norm and o_proj.
    """
    groups = layer(shape, run, inflow)
    later = "input of q, k, v", "queries, keys, values", "softmax, float32", "mask"
    done = sum(count for name, count in groups.items() if name not in later)
    return done - groups.get("norm inputs, float32", 0) // 2


def attention_temporaries(shape: ModelShape, run: Run, inflow: bool = True) -> int:
    """Bytes that come and go in an attention that stores its scores, in float32.

    They are the gradients of softmax's output and of its input, and a product of two of them that
    torch's operation makes inside itself on a GPU. 0 for a fused attention: the MLP is wider.
    """
    return 3 * layer(shape, run, inflow).get("softmax, float32", 0) * (run.attention == "math")


def temporaries(shape: ModelShape, run: Run, quantized: bool = False) -> int:
    """Bytes that come and go while one layer runs backward, at their height: in the MLP.

    At the product silu(gate)·up three gradients of MLP width are there (of the product and of both
    factors), while the product itself is gone if it was kept. A float32 adapter on a 16-bit
    ``down_proj`` needs more a moment earlier: its input once more, in float32. A quantized
    ``down_proj`` is there in 16 bits beside the gradients of its output and its input.
    """
    n, c, h, m = run.tokens, run.compute_bytes, shape.hidden, shape.mlp
    widest = c * n * (h + (2 if run.keeps_input_of("down_proj") else 3) * m)
    if "down_proj" in run.targets and run.adapter_bytes > c and not run.copies:
        widest = (run.adapter_bytes + c) * n * (h + m)
    return max(widest, quantized * c * (n * (h + m) + h * m))
