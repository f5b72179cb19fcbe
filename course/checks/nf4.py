"""The checks of unit 04: levels from quantiles, the nearest code, packing, restoring, occupancy, and one step of Lloyd's iteration.

Wrong answers are one right answer with one part replaced. Inputs are made so that two right answers can't differ by a rounding: ties are
tested on levels that are multiples of 1/32, and everywhere else no value lies next to a midpoint.
"""

import math

import torch
from scipy.special import ndtri
from scipy.stats import norm
from torch import Tensor

from course.checking import Check
from course.checks.blockwise_quantization import TINY, transposed
from reference.blockwise import int_codebook, midpoints
from reference.nf4 import NF4_CODEBOOK, OFFSET, normal_float_codebook, quantize_nf4

# ----------------------------------------------------------------------------------------------------------------- levels


def quantiles(count: int, offset: float, dtype: torch.dtype = torch.float32) -> list:
    """Φ⁻¹ at ``count`` even probabilities from ``offset`` down to ½, which is left out."""
    return list(ndtri(torch.linspace(offset, 0.5, count + 1, dtype=dtype)[:-1].numpy()))


def from_quantiles(exchanged=False, scaled=True, zeros=1, grid=torch.float32, end=None, order=True, shared=False, dtype=torch.float32):
    """The levels, with one part replaced."""

    def levels(negative: int, positive: int, offset: float) -> Tensor:
        below, above = (positive, negative) if exchanged else (negative, positive)
        low = quantiles(below, end or offset, grid)
        high = quantiles(above, end or offset, grid)
        if shared:  # the larger side's grid for both, its innermost levels dropped on the smaller side
            low, high = (quantiles(max(below, above), offset)[:n] for n in (below, above))
        found = torch.tensor([*(-q for q in low), *[0.0] * zeros, *high], dtype=torch.float32)
        if order:
            found = found.sort().values
        return (found / found.max() if scaled else found).to(dtype)

    return levels


def levels_by_ppf(negative: int, positive: int, offset: float) -> Tensor:
    below = norm.ppf(torch.linspace(offset, 0.5, negative + 1))[:-1]
    above = norm.ppf(torch.linspace(offset, 0.5, positive + 1))[:-1]
    sides = [torch.tensor(-below), torch.zeros(1), torch.tensor(above).flip(0)]
    found = torch.cat([side.float() for side in sides])
    return found / found[-1]


def _without_zero(negative: int, positive: int, offset: float) -> Tensor:
    found = ndtri(torch.linspace(1 - offset, offset, negative + positive + 1, dtype=torch.float64).numpy())
    return torch.tensor(found / found.max(), dtype=torch.float32)


def _without_zero_at_all(negative: int, positive: int, offset: float) -> Tensor:
    return from_quantiles(zeros=0)(negative, positive, offset)


def _middles(negative: int, positive: int, offset: float) -> Tensor:
    edges = [ndtri(torch.linspace(offset, 0.5, n + 1).numpy()) for n in (negative, positive)]
    below, above = ((side[1:] + side[:-1]) / 2 for side in edges)
    found = torch.tensor([*-below, 0.0, *above], dtype=torch.float32).sort().values
    return found / found.max()


def _even(negative: int, positive: int, offset: float) -> Tensor:
    return torch.cat([torch.linspace(-1, 0, negative + 1)[:-1], torch.linspace(0, 1, positive + 1)])


def observe_levels(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    seen = {"7 levels below zero, 8 above, δ = 0.9677083": answer(7, 8, OFFSET)}
    for _ in range(2):
        negative = int(torch.randint(2, 6, (1,), generator=g))
        positive = negative + int(torch.randint(1, 5, (1,), generator=g))
        offset = 0.9 + 0.09 * torch.rand(1, generator=g).item()
        for below, above in ((negative, positive), (positive, negative)):
            seen[f"{below} levels below zero, {above} above, δ = {offset:.4f}"] = answer(below, above, offset)
    nf4 = answer(7, 8, OFFSET)
    if isinstance(nf4, Tensor) and nf4.dtype == torch.float32 and nf4.shape == NF4_CODEBOOK.shape:
        near = torch.allclose(nf4, NF4_CODEBOOK, rtol=0, atol=1e-6)  # equality takes −0 for 0
        seen["NF4's levels"] = "bit for bit" if torch.equal(nf4, NF4_CODEBOOK) else "right to six digits" if near else "others"
    return seen


levels = Check(
    task="a normal float's levels: quantiles on both sides, an exact zero, the largest 1, NF4's bit for bit",
    observe=observe_levels,
    reference=from_quantiles(),
    second=levels_by_ppf,
    rtol=1e-5,
    misconceptions={
        "the two sides are exchanged: the first count is that of the levels below zero": from_quantiles(exchanged=True),
        "the levels are in standard deviations: divide all of them by the largest": from_quantiles(scaled=False),
        "zero is there three times: both sides end in Φ⁻¹(½) = 0; leave that one out on each side and put zero in once": from_quantiles(
            zeros=3
        ),
        "there is no zero among the levels: add it, and use the two sides' own probabilities": _without_zero,
        "the two sides are right, but zero is missing: neither side holds Φ⁻¹(½), so put zero in": _without_zero_at_all,
        "the levels are evenly spaced: it is the probabilities that are even; the levels are Φ⁻¹ of them": _even,
        "the probabilities start at 1, and Φ⁻¹(1) is infinite: start at δ": from_quantiles(end=1.0),
        "these are middles between neighbouring quantiles, as in the paper's formula: take the quantiles themselves": _middles,
        "δ is an argument: you used NF4's own 0.9677083 whatever `offset` says": from_quantiles(end=OFFSET),
        "the levels fall: code 0 is to be the lowest": lambda negative, positive, offset: from_quantiles()(negative, positive, offset).flip(
            0
        ),
        "the levels are right but not in order: sort them, or a code says nothing about size": from_quantiles(order=False),
        "one side borrows the other's probabilities: each side has its own even steps from δ to ½": from_quantiles(shared=True),
        "the levels are right but not float32": from_quantiles(dtype=torch.float64),
        "right to six digits, but not the table that everybody ships: that one's grid is torch.linspace in float32, its quantiles are "
        "scipy's (ndtri, norm.ppf) or taken in float64, rounded to float32 before all are divided": from_quantiles(grid=torch.float64),
    },
)

# ---------------------------------------------------------------------------------------------------------------- nearest


def by_counting(edges=midpoints, ties_up=False, dtype=torch.uint8, flat=False, turned=False):
    """The nearest code as a count of edges, with one part replaced."""

    def nearest(scaled: Tensor, levels: Tensor) -> Tensor:
        codes = torch.bucketize(scaled, edges(levels), right=ties_up)
        if turned:
            codes = len(levels) - 1 - codes
        return codes.to(dtype).flatten() if flat else codes.to(dtype)

    return nearest


def by_distance(scaled: Tensor, levels: Tensor) -> Tensor:
    return (scaled[..., None].double() - levels.double()).abs().argmin(-1).to(torch.uint8)


def _level_below(scaled: Tensor, levels: Tensor) -> Tensor:
    return (torch.searchsorted(levels, scaled, right=True) - 1).clamp(min=0).to(torch.uint8)


def _level_above(scaled: Tensor, levels: Tensor) -> Tensor:
    return torch.searchsorted(levels, scaled).clamp(max=len(levels) - 1).to(torch.uint8)


def _as_if_even(scaled: Tensor, levels: Tensor) -> Tensor:
    return ((scaled + 1) / 2 * (len(levels) - 1)).round().clamp(0, len(levels) - 1).to(torch.uint8)


def _signed(scaled: Tensor, levels: Tensor) -> Tensor:
    return by_counting()(scaled.abs(), levels)


def observe_nearest(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    seen = {}
    for count, shape, largest, layout in ((16, (40, 7), 1, ""), (5, (90,), 3, ""), (256, (3, 4, 50), 1, ", transposed")):
        inner = (torch.randperm(9999, generator=g)[: count - 2] - 4999) / 5000  # no two are equal: either code would be right
        levels = largest * torch.cat([torch.tensor([-1.0, 1.0]), inner]).sort().values
        scaled = 0.6 * largest * torch.randn(shape, generator=g)  # some beyond the outermost levels
        close = (scaled[..., None] - midpoints(levels)).abs().amin(-1) < 1e-5
        scaled = torch.where(close, levels[0], scaled)
        label = f"codes of {count} levels from −{largest} to {largest}, values of shape {tuple(shape)}{layout}"
        seen[label] = answer(transposed(scaled) if layout else scaled, levels)
    levels = (torch.randperm(63, generator=g)[:16].sort().values - 31) / 32
    seen["codes of values on a midpoint (the lower of the two)"] = answer(midpoints(levels), levels)
    seen["codes of the levels themselves"] = answer(levels.clone(), levels)
    return seen


nearest = Check(
    task="the nearest level's code, for any levels, the lower one on a tie",
    observe=observe_nearest,
    reference=by_counting(),
    second=by_distance,
    misconceptions={
        "a value exactly between two levels gets the upper code: ties go to the lower one (count midpoints strictly below)": by_counting(
            ties_up=True
        ),
        "you take the level below each value: that is rounding down; the nearest changes at the midpoint between two levels": _level_below,
        "you take the level above each value: that is rounding up; the nearest changes at the midpoint between two levels": _level_above,
        "the codes are those of evenly spaced levels: use the levels that are passed in": _as_if_even,
        "you return the levels: the code is the level's index": lambda scaled, levels: levels[by_counting()(scaled, levels).int()],
        "the codes are right but not uint8: a code of at most 256 levels fits a byte": by_counting(dtype=torch.int64),
        "the codes are right but flattened: keep the shape of the values": by_counting(flat=True),
        "the codes count from the largest level down: code 0 is the lowest level": by_counting(turned=True),
        "the sign is lost: values below zero got the code of their absolute value": _signed,
        "the codes count the levels below a value, so they start at 1 and lag behind: count the midpoints": (
            lambda scaled, levels: torch.searchsorted(levels, scaled, right=True).to(torch.uint8)
        ),
    },
)

# ------------------------------------------------------------------------------------------------------------------- pack


def packer(first_high=True, spare=7, keep_odd=True, dtype=torch.uint8):
    """Packing, with one part replaced."""

    def pack(codes: Tensor) -> Tensor:
        if len(codes) % 2:
            codes = torch.cat([codes, codes.new_full((1,), spare)]) if keep_odd else codes[:-1]
        first, second = codes[::2].int(), codes[1::2].int()
        return (first * 16 + second if first_high else second * 16 + first).to(dtype)

    return pack


def pack_one_by_one(codes: Tensor) -> Tensor:
    numbers = [*codes.tolist(), 7][: len(codes) + len(codes) % 2]
    return torch.tensor([numbers[i] << 4 | numbers[i + 1] for i in range(0, len(numbers), 2)], dtype=torch.uint8)


def _halves(codes: Tensor) -> Tensor:
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_full((1,), 7)])
    first, second = codes.chunk(2)
    return first << 4 | second


def _shifted_too_far(codes: Tensor) -> Tensor:
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_full((1,), 7)])
    return codes[::2] << 4 + codes[1::2]


def _filled_in_front(codes: Tensor) -> Tensor:
    return packer()(torch.cat([codes.new_full((len(codes) % 2,), 7), codes]))


def _always_filled(codes: Tensor) -> Tensor:
    return packer()(torch.cat([codes, codes.new_full((2 - len(codes) % 2,), 7)]))


def _lone_code_low(codes: Tensor) -> Tensor:
    packed = packer()(codes)
    if len(codes) % 2:
        packed[-1] = 7 << 4 | codes[-1]
    return packed


def observe_pack(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    seen = {}
    for n in (2, 64, 1, 65, 2 * int(torch.randint(40, 90, (1,), generator=g)) + 1):
        codes = torch.randint(0, 16, (n,), generator=g, dtype=torch.uint8)
        codes[-1] = (codes[-1] % 7) + 8  # not the spare code, and not its mirror image
        if n % 2 == 0:
            codes[0] = (codes[-1] + 3) % 8  # the two halves of a byte differ
        given, name = codes.clone(), f"{n} codes" if n > 1 else "a single code"
        packed = seen[name] = answer(codes)
        seen[f"what was passed in, {name}, afterwards"] = "as before" if torch.equal(codes, given) else "changed"
        if not isinstance(packed, Tensor) or packed.shape != ((n + 1) // 2,):
            return seen  # an answer without a place for a lone code fails here, before it raises for longer ones
    return seen


pack = Check(
    task="two codes a byte, the first in the high bits, odd lengths filled with the code of zero",
    observe=observe_pack,
    reference=packer(),
    second=pack_one_by_one,
    misconceptions={
        "the nibbles are swapped: the first of two codes belongs into the high four bits, so that [1, −1] is 0xF0": packer(
            first_high=False
        ),
        "the last code of an odd length is lost: it has no partner, so append a 7 before you pair; 65 codes need 33 bytes": packer(
            keep_odd=False
        ),
        "the unused half of the last byte is 0, which is the code of −1: fill it with 7, the code of zero": packer(spare=0),
        "the unused half of the last byte is 15, which is the code of 1: fill it with 7, the code of zero": packer(spare=15),
        "a lone last code sits in the low bits: it is a first code too, so it goes into the high ones": _lone_code_low,
        "a byte holds a code of the first half and one of the second half: it should hold two neighbours": _halves,
        "every code still has a byte of its own: two of them go into one": lambda codes: codes.clone(),
        "an even length got a byte more: fill up only if n is odd": _always_filled,
        "the filling came first, and every code moved by half a byte: append it at the end": _filled_in_front,
        "`+` binds tighter than `<<`: a << 4 + b shifts by 4 + b; write (a << 4) + b, or a << 4 | b": _shifted_too_far,
        "the bytes are right but not uint8": packer(dtype=torch.int64),
    },
)

# ------------------------------------------------------------------------------------------------------------- dequantize


def restorer(
    first_high=True, codebook=NF4_CODEBOOK, scales=None, cast=True, one_rounding=True, reshape=True, combine=torch.mul, levels_first=False
):
    """Restoring, with one part replaced."""

    def dequantize(packed: Tensor, absmax: Tensor, shape: tuple, block_size: int, dtype: torch.dtype) -> Tensor:
        n = torch.Size(shape).numel()
        halves = [packed >> 4, packed & 15]
        codes = torch.stack(halves if first_high else halves[::-1], 1).flatten()[:n].int()
        scale = (scales or each_block)(absmax, n, block_size)
        levels = codebook[codes].to(dtype) if levels_first else codebook[codes]
        values = combine(levels, scale) if one_rounding else combine(levels.to(dtype), scale.to(dtype))
        values = values.to(dtype) if cast else values.float()
        return values.view(shape) if reshape else values

    return dequantize


def each_block(absmax: Tensor, n: int, block_size: int) -> Tensor:
    return absmax.repeat_interleave(block_size)[:n]


def _spread_evenly(absmax: Tensor, n: int, block_size: int) -> Tensor:
    """As if all blocks were equally long."""
    return absmax[torch.arange(n) * len(absmax) // n]


def _tiled(absmax: Tensor, n: int, block_size: int) -> Tensor:
    return absmax.repeat(block_size)[:n]


def _all_high_first(packed: Tensor, absmax: Tensor, shape: tuple, block_size: int, dtype: torch.dtype) -> Tensor:
    n = torch.Size(shape).numel()
    codes = torch.cat([packed >> 4, packed & 15])[:n].int()
    return (NF4_CODEBOOK[codes] * each_block(absmax, n, block_size)).to(dtype).view(shape)


def dequantize_by_pairs(packed: Tensor, absmax: Tensor, shape: tuple, block_size: int, dtype: torch.dtype) -> Tensor:
    pairs = torch.cartesian_prod(NF4_CODEBOOK, NF4_CODEBOOK)  # (256, 2): row b holds both levels of byte b
    flat = pairs[packed.long()].flatten()[: torch.Size(shape).numel()]
    return torch.cat([piece * scale for piece, scale in zip(flat.split(block_size), absmax, strict=True)]).to(dtype).reshape(shape)


def _indexed_with_uint8(packed: Tensor, absmax: Tensor, shape: tuple, block_size: int, dtype: torch.dtype) -> Tensor:
    n = torch.Size(shape).numel()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:n]
    return (NF4_CODEBOOK[codes] * each_block(absmax, n, block_size)).to(dtype).view(shape)


AS_MASK = "an IndexError: the index was taken for a mask"


def looked_up(answer, *arguments) -> object:
    """What the answer gives; ``AS_MASK`` where torch took an index, uint8 or bool, for a mask and found it of another length."""
    try:
        return answer(*arguments)
    except IndexError as error:
        if "The shape of the mask" not in str(error):
            raise
        return AS_MASK


def observe_dequantize(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    seen = {}
    for shape, block_size, dtype, size in (
        ((4, 32), 64, torch.float32, 1.0),
        ((7, 15), 32, torch.float32, 1.0),
        ((333,), 64, torch.bfloat16, 1.0),
        ((3, 50, 5), 128, torch.float16, 1.0),
        ((2, 96), 64, torch.float32, TINY),
    ):
        x = size * torch.randn(shape, generator=g) * (0.5 + torch.rand(1, generator=g))
        q = quantize_nf4(x, block_size)
        label = f"a {str(dtype).removeprefix('torch.')} tensor of shape {tuple(shape)} in blocks of {block_size}"
        label += f", values of about {TINY:.0e}" * (size == TINY)
        seen[label] = looked_up(answer, q.packed.view(-1).clone(), q.absmax.clone(), tuple(shape), block_size, dtype)
        if seen[label] is AS_MASK:
            return seen
    return seen


dequantize = Check(
    task="restoring packed NF4: the high nibble first, each block its scale, one rounding, any shape and length",
    observe=observe_dequantize,
    reference=restorer(),
    second=dequantize_by_pairs,
    rtol=0.0,  # a table lookup, one float32 product and one rounding: nothing is left to differ
    atol=0.0,
    misconceptions={
        "the nibbles are read in the wrong order: every weight sits where its neighbour belongs; the first is in the high bits": restorer(
            first_high=False
        ),
        "the levels are not scaled: multiply each by the absmax of its block": restorer(combine=lambda level, scale: level),
        "the levels are divided by absmax: it was divided by when quantizing; multiply": restorer(combine=torch.div),
        "the scales are spread as if all blocks were equally long: the last block may be short, the others hold block_size values": (
            restorer(scales=_spread_evenly)
        ),
        "the scales go round and round, one value each: absmax[b] belongs to block_size neighbours (repeat_interleave)": restorer(
            scales=_tiled
        ),
        "every block has the first one's scale: absmax[b] belongs to block b": restorer(scales=lambda absmax, n, b: absmax[:1].expand(n)),
        "the values are right but float32: round to the dtype that is asked for": restorer(cast=False),
        "levels and scales are rounded to the dtype before they are multiplied: multiply in float32, then round once": restorer(
            one_rounding=False
        ),
        "the levels are rounded to the dtype before they are multiplied: multiply in float32, then round once": restorer(levels_first=True),
        "all high halves come first, then all low ones: the two halves of a byte are neighbours (stack and flatten, not cat)": (
            _all_high_first
        ),
        "the values are right but flat: give them the tensor's shape": restorer(reshape=False),
        "torch takes an index of dtype uint8 for a mask, as it does one of bool: a mask selects entries, and has to be as long as what it "
        "selects from; codes are positions, so index with NF4_CODEBOOK[codes.int()]": _indexed_with_uint8,
        "codes are looked up in evenly spaced levels: use NF4_CODEBOOK": restorer(codebook=torch.linspace(-1, 1, 16)),
    },
)

# -------------------------------------------------------------------------------------------------------------- occupancy


def absolute_max(block: Tensor) -> Tensor:
    return block.abs().max()


def sharer(largest=absolute_max, short="own", whole=False, share=1.0, edges=midpoints, minlength=True, guard=True):
    """The shares, with one part replaced."""

    def occupancy(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
        flat = x.flatten().float()
        pieces = [flat] if whole else list(flat.split(block_size))
        if short == "dropped" and len(pieces[-1]) < block_size:
            pieces = pieces[:-1]
        if short == "padded":
            pieces[-1] = torch.nn.functional.pad(pieces[-1], (0, block_size - len(pieces[-1])))
        scaled = torch.cat([piece / (largest(piece).clamp(min=1e-38) if guard else largest(piece)) for piece in pieces])
        codes = torch.bucketize(scaled, edges(levels))
        counts = torch.bincount(codes, minlength=len(levels) if minlength else 0)
        return (share * counts / len(scaled) if share else counts).float()

    return occupancy


def occupancy_by_comparing(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
    n = x.numel()
    padded = torch.nn.functional.pad(x.reshape(-1).float(), (0, -n % block_size)).view(-1, block_size)
    scale = padded.abs().amax(1, keepdim=True)
    scaled = (padded / torch.where(scale == 0, 1.0, scale)).view(-1)[:n]
    codes = (scaled[:, None] - levels).abs().argmin(1)
    return (codes[:, None] == torch.arange(len(levels))).float().mean(0)


def _distribution(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return torch.full((len(levels),), 1 / len(levels))


def _count(scaled: Tensor, levels: Tensor) -> Tensor:
    return torch.bincount(torch.bucketize(scaled, midpoints(levels)), minlength=len(levels)).float()


def _in_16_bits(largest=absolute_max, guard=True):
    """The shares, with blocks divided in the tensor's own dtype; ``guard`` is against a block of zeros alone."""

    def occupancy(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
        pieces = x.flatten().split(block_size)
        scaled = [piece / largest(piece) if piece.any() or not guard else piece for piece in pieces]
        return _count(torch.cat(scaled).float(), levels) / x.numel()

    return occupancy


def _last_borrows(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
    pieces = x.float().flatten().split(block_size)
    scales = [piece.abs().max().clamp(min=1e-38) for piece in pieces]
    if len(pieces[-1]) < block_size:
        scales[-1] = scales[-2]
    return _count(torch.cat([piece / scale for piece, scale in zip(pieces, scales, strict=True)]), levels) / x.numel()


def _padded_but_divided_by_n(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
    padded = torch.nn.functional.pad(x.flatten().float(), (0, -x.numel() % block_size)).view(-1, block_size)
    return _count((padded / padded.abs().amax(1, keepdim=True).clamp(min=1e-38)).flatten(), levels) / x.numel()


def _mean_of_blocks(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
    pieces = x.float().flatten().split(block_size)
    return torch.stack([_count(piece / piece.abs().max().clamp(min=1e-38), levels) / len(piece) for piece in pieces]).mean(0)


def _without_zeros(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
    scaled = torch.cat([piece / piece.abs().max() for piece in x.float().flatten().split(block_size) if piece.any()])
    return _count(scaled, levels) / len(scaled)


def _even_bins(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
    scaled = torch.cat([piece / piece.abs().max().clamp(min=1e-38) for piece in x.float().flatten().split(block_size)])
    return torch.histc(scaled, len(levels), -1, 1) / len(scaled)


def _off_the_midpoints(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """``x`` with zeros where a value's share of its block's largest is next to the middle of two levels."""
    flat = x.flatten().clone()
    for block in flat.split(block_size):
        share = block.double() / block.double().abs().max().clamp(min=1e-38)
        block[(share[:, None] - midpoints(levels.double())).abs().amin(1) < 1e-5] = 0
    return flat.view(x.shape)


def observe_occupancy(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    seen = {}
    sizes = torch.tensor([0.2, 3.0, 1.0])  # blocks of different scale, so that one scale for all shows
    for label, levels, shape, block_size, dtype in (
        ("NF4's bins, blocks of 64, a short last block", NF4_CODEBOOK, (64 * 60 + 37,), 64, torch.float32),
        ("a bfloat16 tensor, blocks of 256", NF4_CODEBOOK, (256 * 18 + 101,), 256, torch.bfloat16),
        ("five bits, a transposed float16 tensor of three dimensions", normal_float_codebook(5), (12, 16, 20), 32, torch.float16),
    ):
        n = math.prod(shape)
        x = torch.randn(n, generator=g)
        x *= sizes[torch.arange(n) // block_size % 3]
        x[-(n % block_size or block_size) :] += 1.5  # the last block is not like the others
        x = _off_the_midpoints(x.to(dtype), levels, block_size).view(shape)
        seen[label] = answer(transposed(x) if len(shape) > 1 else x, levels.clone(), block_size)
    x = torch.randn(64, 40, generator=g)  # rows end inside of a block
    x.view(-1)[7 * 64 : 8 * 64] = 0
    seen["a matrix with a block of zeros"] = answer(_off_the_midpoints(x, NF4_CODEBOOK, 64), NF4_CODEBOOK.clone(), 64)
    few, many = 0.2 + 0.7 * torch.rand(2, generator=g), 0.2 + 0.7 * torch.rand(7, generator=g)
    levels = torch.cat([torch.tensor([-1.0, 0.07, 1.0]), -few, many]).sort().values  # none is 0, and code 3 is the nearest to it
    seen["a block of zeros, levels without a zero"] = answer(_off_the_midpoints(x, levels, 64), levels.clone(), 64)
    x = _off_the_midpoints(TINY * torch.randn(20 * 64, generator=g), NF4_CODEBOOK, 64)
    seen[f"values of about {TINY:.0e}"] = answer(x, NF4_CODEBOOK.clone(), 64)
    x = _off_the_midpoints(-1 - torch.rand(300, generator=g), int_codebook(4), 32)
    seen["values that leave the upper bins empty"] = answer(x, int_codebook(4), 32)
    return seen


occupancy = Check(
    task="what the bins hold: each block scaled by its own largest absolute value, the last one too",
    observe=observe_occupancy,
    reference=sharer(),
    second=occupancy_by_comparing,
    rtol=0.0,
    atol=1e-4,  # one value in four thousand would be 2.5e-4
    misconceptions={
        "every bin has the same share: that is what one reads; scale the blocks, find the codes, and count": _distribution,
        "the whole tensor was divided by one number: each block has its own largest value": sharer(whole=True),
        "blocks were divided by their largest value, without abs(): values below −max then lie outside": sharer(largest=torch.max),
        "blocks were divided by their standard deviation: absmax scaling divides by the largest absolute value": sharer(
            largest=lambda block: block.std()
        ),
        "the short last block was left out: it counts like the others, with its own scale": sharer(short="dropped"),
        "the zeros that fill up the last block were counted: only the tensor's own values count": sharer(short="padded"),
        "the zeros that fill up the last block were counted in zero's bin: cut them off again before you count": _padded_but_divided_by_n,
        "these are counts: divide by the number of values": sharer(share=0),
        "these are percentages: return shares that sum to 1": sharer(share=100.0),
        "a bin without values has no entry: return one share for every level (minlength)": sharer(minlength=False),
        "blocks were divided in the tensor's own 16-bit dtype: convert x to float32 first": _in_16_bits(),
        "blocks were divided in the tensor's own 16-bit dtype, and by no less than a least value: convert x to float32 first, and guard "
        "against 0 alone": _in_16_bits(largest=lambda block: absolute_max(block).clamp(min=1e-7)),
        "blocks were divided in the tensor's own 16-bit dtype, and a block of zeros by zero: convert x to float32 first; zeros belong to "
        "the code of zero": _in_16_bits(guard=False),
        "the short last block was divided by the largest value of the block before it: it has its own": _last_borrows,
        "these are the blocks' shares averaged: a short last block then counts as much as a whole one; count values": _mean_of_blocks,
        "blocks of zeros were left out: their values are zero, and they count": _without_zeros,
        "bins were cut at even steps from −1 to 1: cut at the midpoints between `levels`": _even_bins,
        "bins were cut at the levels: they are cut at the midpoints between levels": sharer(edges=lambda levels: levels[1:]),
        "a block of zeros was divided by zero: its values are zero, and belong to the code of zero": sharer(guard=False),
        "a number was added to the divisor, or it has a least value: beside it a block of tiny values is lost; guard against 0 alone": (
            sharer(largest=lambda block: absolute_max(block) + 1e-8)
        ),
    },
)

# ------------------------------------------------------------------------------------------------------------- lloyd_step


def stepper(
    weigh=lambda w: w, centre="mean", empty="stays", fixed=None, after=lambda levels: levels, in_place=False, edges=midpoints, more=0.0
):
    """One step of Lloyd's iteration, with one part replaced."""

    def lloyd_step(scaled: Tensor, weight: Tensor, levels: Tensor, kept: tuple = ()) -> Tensor:
        codes = torch.bucketize(scaled, edges(levels))
        kept = kept if fixed is None else fixed
        new = levels if in_place else levels.clone()
        for code in range(len(levels)):
            if code in kept:
                continue
            values, weights = scaled[codes == code], weigh(weight[codes == code])
            if len(values) == 0:
                new[code] = {"stays": new[code].item(), "zero": 0.0, "nan": float("nan")}[empty]
            elif centre == "mean":
                new[code] = ((weights.double() * values).sum() / (weights.double().sum() + more)).float()
            elif centre == "median":
                new[code] = values.median()
            else:
                new[code] = (values.min() + values.max()) / 2
        return after(new)

    return lloyd_step


def lloyd_step_by_sums(scaled: Tensor, weight: Tensor, levels: Tensor, kept: tuple = ()) -> Tensor:
    codes = (scaled[:, None] - levels).abs().argmin(1)
    mass = torch.zeros(len(levels), dtype=torch.float64).index_add(0, codes, weight.double())
    moment = torch.zeros(len(levels), dtype=torch.float64).index_add(0, codes, weight.double() * scaled.double())
    new = torch.where(mass > 0, moment / mass, levels.double()).float()
    new[list(kept)] = levels[list(kept)]
    return new


def _all_weights(scaled: Tensor, weight: Tensor, levels: Tensor, kept: tuple = ()) -> Tensor:
    codes = torch.bucketize(scaled, midpoints(levels))
    new = levels.clone()
    for code in set(range(len(levels))) - set(kept):
        if (codes == code).any():
            new[code] = (weight * scaled)[codes == code].sum() / weight.sum()
    return new


def _weighted_median(scaled: Tensor, weight: Tensor, levels: Tensor, kept: tuple = ()) -> Tensor:
    codes = torch.bucketize(scaled, midpoints(levels))
    new = levels.clone()
    for code in set(range(len(levels))) - set(kept):
        if (codes == code).any():
            values, order = scaled[codes == code].sort()
            mass = weight[codes == code][order].cumsum(0)
            new[code] = values[(mass >= mass[-1] / 2).nonzero()[0].item()]
    return new


def _weights_of_the_bin_only(scaled: Tensor, weight: Tensor, levels: Tensor, kept: tuple = ()) -> Tensor:
    codes = torch.bucketize(scaled, midpoints(levels))
    new = levels.clone()
    for code in set(range(len(levels))) - set(kept):
        if (codes == code).any():
            new[code] = (weight * scaled)[codes == code].mean()
    return new


def observe_lloyd_step(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    seen = {}
    for label, levels, kept in (
        ("NF4's levels", NF4_CODEBOOK, ()),
        ("NF4's levels, with −1, 0 and 1 kept", NF4_CODEBOOK, (0, 7, 15)),
        ("32 levels, with codes 20 and 3 kept", normal_float_codebook(5), (20, 3)),
        ("NF4's levels, with codes 2, 9 and 12 kept", NF4_CODEBOOK, (2, 9, 12)),
    ):
        blocks = torch.randn(60, 64, generator=g) * (0.3 + 2 * torch.rand(60, 1, generator=g))
        absmax = blocks.abs().amax(1)
        scaled, weight = (blocks / absmax[:, None]).flatten(), absmax.square().repeat_interleave(64)
        scaled = torch.where((scaled[:, None] - midpoints(levels)).abs().amin(1) < 1e-5, 0, scaled)
        given = levels.clone()
        seen[label] = answer(scaled, weight, given, kept)
        seen[f"{label}: what was passed in, afterwards"] = "as before" if torch.equal(given, levels) else "changed"
    scaled, weight = 0.3 * torch.rand(200, generator=g) + 0.1, 0.5 + torch.rand(200, generator=g)
    scaled = torch.where((scaled[:, None] - midpoints(NF4_CODEBOOK)).abs().amin(1) < 1e-5, 0.25, scaled)
    seen["values that leave some levels unused"] = answer(scaled, weight, NF4_CODEBOOK.clone(), ())
    seen["weights of about 1e-20"] = answer(scaled, 1e-20 * weight, NF4_CODEBOOK.clone(), ())
    return seen


lloyd_step = Check(
    task="one step of Lloyd's iteration: weighted means, unused and kept levels where they were",
    observe=observe_lloyd_step,
    reference=stepper(),
    second=lloyd_step_by_sums,
    misconceptions={
        "the mean is not weighted: an error in a block of large values is larger in the weight's own unit; use weight": stepper(
            weigh=torch.ones_like
        ),
        "the weights were squared once more: they are absmax² already": stepper(weigh=torch.square),
        "the root of the weights was used: squared error wants absmax², which is what is passed in": stepper(weigh=torch.sqrt),
        "the weighted sum is divided by the number of values: divide it by the sum of the weights": _weights_of_the_bin_only,
        "the weighted sum is divided by all weights: divide by the sum of the weights in the level's own bin": _all_weights,
        "each level moves to the weighted median: that is for absolute error; for squared error it is the weighted mean": _weighted_median,
        "each level moves to the middle between its smallest and largest value: the squared error is least at the mean": stepper(
            centre="middle"
        ),
        "each level moves to the median: that is for absolute error, and without weights; here it is the weighted mean": stepper(
            centre="median"
        ),
        "the kept levels moved too: the codes in kept stay where they are": stepper(fixed=()),
        "codes 0, 7 and 15 stayed where they were, whatever `kept` says: only the codes in kept do": stepper(fixed=(0, 7, 15)),
        "a number was added to the sum of weights, or it has a least value: beside it the weights of small blocks are lost; divide by the "
        "sum itself": stepper(more=1e-8),
        "a level without values became NaN (0/0): leave it where it is": stepper(empty="nan"),
        "a level without values moved to zero: leave it where it is": stepper(empty="zero"),
        "the new levels were divided by their largest: Lloyd's step ends with the means": stepper(after=lambda new: new / new.abs().max()),
        "the levels that were passed in were changed: make a copy": stepper(in_place=True),
        "values were sorted into bins that begin at the levels: each goes to its nearest level": stepper(edges=lambda levels: levels[1:]),
    },
)
