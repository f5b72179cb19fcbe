"""Exercise 6: keep the outliers out."""

import math
import random

import torch
from torch import Tensor

from course.checking import Check, Seen, but, unpacked
from course.checks.blockwise_quantization.shared import number, transposed
from reference.blockwise import dequantize_blockwise, int_codebook, quantize_blockwise


def keep_outliers(
    x: Tensor,
    codebook: Tensor,
    block_size: int,
    k: int,
    *,
    choose=lambda x, k, size: x.flatten().abs().topk(k).indices,
    remove=lambda flat, kept: flat.index_fill(0, kept, 0),
    put_back=lambda rest, kept, flat: rest.index_copy(0, kept, flat[kept]),
    count=lambda k, kept: k,
    each=lambda x, codebook: 8 * x.element_size() + 32,
    price=lambda dense, apart, n: dense + apart / n,
) -> tuple[Tensor, float]:
    """The worked answer: what is kept is zero while the rest is quantized, then comes back; each costs a value and a position."""
    flat, kept = x.flatten(), choose(x, k, block_size)
    q = quantize_blockwise(remove(flat, kept), codebook, block_size)
    bits = price(q.bits_per_value, count(k, kept) * each(x, codebook), x.numel())
    return put_back(dequantize_blockwise(q), kept, flat).view(x.shape), bits


def by_mask(x: Tensor, codebook: Tensor, block_size: int, k: int) -> tuple[Tensor, float]:
    order = sorted(range(x.numel()), key=lambda i: -abs(x.flatten()[i].item()))
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    mask = mask.view(x.shape)
    q = quantize_blockwise(torch.where(mask, 0, x), codebook, block_size)
    bits = math.ceil(math.log2(len(codebook))) * x.numel() + 32 * len(q.absmax) + mask.sum().item() * (torch.finfo(x.dtype).bits + 32)
    return torch.where(mask, x, dequantize_blockwise(q)), bits / x.numel()


def of_each(size: int, flat: Tensor, k: int) -> Tensor:
    pieces = enumerate(flat.abs().split(size))
    return torch.cat([piece.topk(min(k, len(piece))).indices + i * size for i, piece in pieces])


def at_least_the_kth(x: Tensor, k: int, size: int) -> Tensor:
    magnitudes = x.flatten().abs()
    return (magnitudes >= magnitudes.topk(k).values[-1]).nonzero().flatten() if k else magnitudes.topk(0).indices


def clipped(flat: Tensor, kept: Tensor) -> Tensor:
    limit = flat.index_fill(0, kept, 0).abs().max().item()
    return flat.clamp(-limit, limit)


def ordinary(flat: Tensor, kept: Tensor) -> Tensor:
    return torch.ones(len(flat), dtype=torch.bool).index_fill(0, kept, False)


def in_place(x: Tensor, codebook: Tensor, block_size: int, k: int) -> tuple[Tensor, float]:
    right = keep_outliers(x, codebook, block_size, k)
    x[torch.unravel_index(x.flatten().abs().topk(k).indices, x.shape)] = 0
    return right


def observe(answer, seed: int) -> Seen:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    for shape, block_size, bits, k, dtype in (
        ((8, 24), 32, 4, 5, torch.float32),
        ((7, 30), 64, 3, 3, torch.bfloat16),
        ((6, 8, 4), 16, 4, 0, torch.float32),
    ):
        x = torch.randn(shape, generator=g)
        places = rng.sample(range(x.numel()), 5)
        for place_number, place in enumerate(places):  # the largest is negative, no two are equal
            x.view(-1)[place] = -(20 + 8 * place_number + 1 / 3) * (-1) ** place_number  # nor one of 16 bits
        x = x.to(dtype) if k else transposed(x.to(dtype))
        result = answer(x, int_codebook(bits), block_size, k)
        restored, price = unpacked(result, "a pair, (restored, bits), the first a tensor", Tensor, object)
        name = f"{str(dtype).removeprefix('torch.')}{', three dimensions, transposed' * (k == 0)}, {k} values kept, blocks of {block_size}"
        yield f"restored, {name}", restored
        yield f"bits per value, {name}", number(price)
    x = torch.randn(3, 16, generator=g)
    x[:, 0], x[:, 7] = 1.5, torch.tensor([50.0, -50.0, 50.0])  # 1.5 is lost beside 50
    restored, price = unpacked(answer(x, int_codebook(4), 16, 2), "a pair, (restored, bits), the first a tensor", Tensor, object)
    if restored.shape != x.shape:
        return
    spoiled = ((restored.double() - x).abs().amax(1) > 0.5).sum().item()
    yield "2 values kept of three of equal magnitude: blocks whose scale is still that of such a value", spoiled  # whichever are kept
    yield "bits per value, 2 values kept of three of equal magnitude", number(price)


check = Check(
    task="the k largest values kept out of the scale",
    observe=observe,
    reference=keep_outliers,
    second=by_mask,
    misconceptions={
        "the outliers were still there when the scales were taken: set them to zero before quantizing, else nothing is gained": but(
            remove=lambda flat, kept: flat
        ),
        "the outliers did not come back: write the kept values into the restored tensor": but(put_back=lambda rest, kept, flat: rest),
        "you chose the largest signed values: an outlier may be negative, so compare absolute values": but(
            choose=lambda x, k, size: x.flatten().topk(k).indices
        ),
        "you kept k values of every row: k counts the whole tensor": but(choose=lambda x, k, size: of_each(x.shape[-1], x.flatten(), k)),
        "you kept k values of every block: k counts the whole tensor": but(
            choose=lambda x, k, size: of_each(size, x.flatten(), k), count=lambda k, kept: len(kept)
        ),
        "the kept values were cut out, and all that follows moved up into other blocks: put zeros in their places": but(
            remove=lambda flat, kept: flat[ordinary(flat, kept)],
            put_back=lambda rest, kept, flat: flat.masked_scatter(ordinary(flat, kept), rest),
        ),
        "one value too few was kept: a mask |x| > threshold loses the k-th largest, which is the threshold": but(
            choose=lambda x, k, size: x.flatten().abs().topk(max(k - 1, 0)).indices
        ),
        "a mask |x| ≥ threshold keeps every value that equals the k-th largest, which can be more than k: keep k, whichever of them": but(
            choose=at_least_the_kth, count=lambda k, kept: len(kept)
        ),
        "a mask |x| ≥ threshold keeps every value that equals the k-th largest, which can be more than k, the number that your bits "
        "count": but(choose=at_least_the_kth),
        "you clipped the outliers to the largest ordinary value: keep them as they are, outside of the codes": but(
            remove=clipped, put_back=lambda rest, kept, flat: rest
        ),
        "you kept the smallest values: topk gives the largest, of the absolute values": but(
            choose=lambda x, k, size: x.flatten().abs().topk(k, largest=False).indices
        ),
        "the positions are missing from the bits: each kept value needs 32 bits more to say where it belongs": but(
            each=lambda x, codebook: 8 * x.element_size()
        ),
        "the kept values are missing from the bits: each costs the bits of its own dtype": but(each=lambda x, codebook: 32),
        "the bits do not count what is kept: value and position, for each of the k": but(each=lambda x, codebook: 0),
        "you took the codes of the kept values off: the codes are a dense tensor, these have one too": but(
            each=lambda x, codebook: 8 * x.element_size() + 32 - math.ceil(math.log2(len(codebook)))
        ),
        "you counted 32 bits for a kept value: it has the dtype of x, 16 bits for bfloat16": but(each=lambda x, codebook: 32 + 32),
        "element_size() counts bytes: everything here is in bits": but(each=lambda x, codebook: x.element_size() + 32),
        "that is the price for all values together: divide by how many there are": but(price=lambda dense, apart, n: dense * n + apart),
        "x itself was changed: work on a copy": in_place,
    },
)
