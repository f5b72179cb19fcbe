"""Exercise 2: the bytes of a quantized model, part by part."""

import copy
import math
import random

import torch
from torch import nn

from course.checking import Changed, Check, Seen, but
from course.checks.qlora.shared import BITS, entries
from reference.qlora import NF4Linear, quantize_linears


def last_name(name: str) -> str:
    return name.rpartition(".")[2]


def scale_bytes(blocks: int) -> int:
    return blocks + 4 * math.ceil(blocks / 256) + 4


def quantized_bytes(
    model: nn.Module,
    skip: tuple[str, ...],
    *,
    chosen=lambda name, module: isinstance(module, nn.Linear),
    skipped=lambda name, skip: last_name(name) in skip,
    packed=lambda layer: [layer.weight],
    codes=lambda n: math.ceil(n / 2),
    blocks=lambda n: math.ceil(n / 64),
    counted=lambda blocks: blocks,  # layer by layer
    scales=scale_bytes,
    gone=lambda name, quantized: quantized.get(name, ()),
    once=lambda parameters: {id(p): p for p in parameters}.values(),
    stays=lambda name: True,
    width=2,
    bits=lambda stored, sizes, model: 8 * stored / sum(sizes),
) -> dict[str, float]:
    """The worked answer: codes and scales of each layer that is quantized; what all modules hold besides, in 16 bits."""
    quantized = {name: packed(m) for name, m in model.named_modules() if chosen(name, m) and not skipped(name, skip)}
    sizes = [sum(p.numel() for p in weights) for weights in quantized.values()]
    rest = []
    for name, module in model.named_modules():
        codes_now = {id(p) for p in gone(name, quantized)}
        rest += [p for key, p in module.named_parameters(name, recurse=False) if id(p) not in codes_now and stays(key)]
    rest = once(rest)
    found = {"codes": sum(map(codes, sizes)), "scales": sum(map(scales, counted([blocks(n) for n in sizes])))}
    stored = found["codes"] + found["scales"]
    return found | {"16 bits": width * sum(p.numel() for p in rest), "bits per quantized weight": bits(stored, sizes, model)}


def by_quantizing(model: nn.Module, skip: tuple[str, ...]) -> dict[str, float]:
    """Quantize a copy and look."""
    model = copy.deepcopy(model)
    quantize_linears(model, [name for name, m in model.named_modules() if type(m) is nn.Linear and last_name(name) in skip])
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    codes, scales = sum(m.weight.nbytes for m in layers), sum(m.absmax.nbytes + m.nested_absmax.nbytes + m.offset.nbytes for m in layers)
    rest = sum(p.nbytes for p in model.parameters() if p.dtype == torch.bfloat16)
    weights = sum(m.in_features * m.out_features for m in layers)
    return {"codes": codes, "scales": scales, "16 bits": rest, "bits per quantized weight": (codes + scales) * 8 / weights}


def a_model(rng: random.Random, tied: bool, full: bool = False) -> nn.Module:
    """Embedding, a few blocks with norms and biases, head; in bfloat16. Sizes are odd, or whole multiples at both levels."""
    hidden, mlp, vocabulary = rng.randrange(91, 111, 2), rng.randrange(221, 261, 2), rng.randrange(301, 341, 2)
    if full:  # no partly used byte, block or block of blocks
        hidden, mlp = 128, 128 * rng.randint(1, 3)
    model = nn.Module()
    model.embed = nn.Embedding(vocabulary, hidden)
    model.blocks = nn.ModuleList(
        nn.ModuleDict({"norm": nn.RMSNorm(hidden), "up_proj": nn.Linear(hidden, mlp), "down_proj": nn.Linear(mlp, hidden, bias=False)})
        for _ in range(rng.randint(2, 4))
    )
    model.last_down_proj = nn.Linear(hidden, hidden)  # ends in "down_proj", and is another name
    model.lm_head = nn.Linear(hidden, vocabulary, bias=False)
    if tied:
        model.lm_head.weight = model.embed.weight
    return model.to(torch.bfloat16)


def looks(model: nn.Module) -> list:
    """What a function may not change in a model: its modules, and the bits of its parameters."""
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    return kinds + [(name, p.dtype, p.detach().view(torch.uint8).tolist()) for name, p in model.named_parameters()]


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    for name, model, skip in (
        ("an untied head", a_model(rng, False), ("lm_head",)),
        ("a tied head", a_model(rng, True), ("lm_head",)),
        ("down_proj skipped, and the head is not", a_model(rng, False), ("down_proj",)),
        ("nothing skipped", a_model(rng, False), ()),
        ("a tied head that is quantized too", a_model(rng, True), ()),
        ("all blocks full, skip=('blocks', 'lm_head')", a_model(rng, False, full=True), ("blocks", "lm_head")),
    ):
        before = looks(model)
        found = answer(model, skip)
        yield f"{name}, after your function", Changed(("model",) * (looks(model) != before))
        yield name, entries(found, "codes", "scales", "16 bits", "bits per quantized weight")


check = Check(
    task="bytes of a quantized model, part by part",
    observe=observe,
    reference=quantized_bytes,
    second=by_quantizing,
    misconceptions={
        "skip is ignored: the layers that it names, here the output head, stay in 16 bits": but(skipped=lambda name, skip: False),
        "skip is looked for inside of names: 'last_down_proj' is another layer than 'down_proj'; compare with what follows the last "
        "dot": but(skipped=lambda name, skip: any(part in name for part in skip)),
        "skip is compared with the ends of names: 'last_down_proj' ends in 'down_proj' and is another layer; compare with what follows the "
        "last dot": but(skipped=lambda name, skip: name.endswith(skip)),
        "the output head is skipped where skip does not name it: skip says all, and may be empty": but(
            skipped=lambda name, skip: last_name(name) in (*skip, "lm_head")
        ),
        "skip is compared with every part of a name: only what follows the last dot counts, so 'blocks' is no layer's name": but(
            skipped=lambda name, skip: any(part in skip for part in name.split("."))
        ),
        "the output head alone is skipped: skip may name other layers too, and 'down_proj' means every layer whose name ends in "
        "'.down_proj'": but(skipped=lambda name, skip: name in skip),
        "an odd number of weights leaves half a byte unused, and it is stored: round up in each layer": but(codes=lambda n: n / 2),
        "half a byte is lost where a layer has an odd number of weights: round up in each layer, not down": but(codes=lambda n: n // 2),
        "n // 2 + 1 is one byte too many where n is even; rounded up, n/2 is math.ceil(n / 2)": but(codes=lambda n: n // 2 + 1),
        "n // 64 + 1 is one block too many where the last one is full; rounded up, n/64 is math.ceil(n / 64)": but(
            blocks=lambda n: n // 64 + 1
        ),
        "blocks // 256 + 1 is one too many where the last 256 are full; rounded up, it is math.ceil(blocks / 256)": but(
            scales=lambda blocks: blocks + 4 * (blocks // 256 + 1) + 4
        ),
        "a short last block has a scale too: round the number of blocks up in each layer": but(blocks=lambda n: n // 64),
        "where the last group of 256 blocks is short it has a scale too: round their number up in each layer": but(
            scales=lambda blocks: blocks + 4 * (blocks // 256) + 4
        ),
        "the bias is quantized with the weight: it stays in 16 bits": but(packed=lambda layer: list(layer.parameters())),
        "the quantized layers are counted in 16 bits too: what became codes is no longer there": but(gone=lambda name, quantized: ()),
        "these are the bits of a large layer, by formula: divide the codes and scales of these layers by their weights": but(
            bits=lambda stored, sizes, model: BITS
        ),
        "the embedding is counted in 4 bits: it is a table, not an nn.Linear, and stays in 16": but(
            chosen=lambda name, module: isinstance(module, (nn.Linear, nn.Embedding))
        ),
        "a tied head is counted twice: it is the embedding's own tensor": but(once=list),
        "the embedding is missing where the head is its own tensor and is quantized: the head then has codes of its own, and the embedding "
        "keeps the tensor": but(gone=lambda name, quantized: [weight for weights in quantized.values() for weight in weights]),
        "the embedding is missing: it stays in 16 bits": but(stays=lambda name: not name.startswith("embed")),
        "the biases are missing: they are not quantized, and stay in 16 bits": but(stays=lambda name: not name.endswith("bias")),
        "the norms are missing: they stay in 16 bits": but(stays=lambda name: "norm" not in name),
        "what is not quantized is counted in 4 bytes: it is bfloat16 here, 2 bytes": but(width=4),
        "the scales are counted in float32: double quantization keeps one byte for each, and a float32 for each 256 of them": but(
            scales=lambda blocks: 4 * blocks
        ),
        "the scales' own scales are missing: one float32 for each 256 scales of a layer": but(scales=lambda blocks: blocks + 4),
        "the offset is missing: the mean of a layer's scales, one float32": but(scales=lambda blocks: scale_bytes(blocks) - 4),
        "the scales of all layers are counted as if they were one layer's: each layer has its own offset, and its own last, short "
        "block": but(counted=lambda blocks: [sum(blocks)]),
        "the scales are missing: each block of 64 weights has one": but(scales=lambda blocks: 0),
        "the bits are spread over all parameters: divide by the number of quantized weights": but(
            bits=lambda stored, sizes, model: 8 * stored / sum(p.numel() for p in model.parameters())
        ),
    },
    rtol=1e-9,
)
