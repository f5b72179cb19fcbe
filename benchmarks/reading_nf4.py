"""A launch that reads the codes and scales of an NF4 weight, adds them up and does nothing else: a limit that kernels can be held to."""

import torch
import triton
import triton.language as tl

from reference.nf4 import NF4Tensor


@triton.jit
def _read_kernel(packed_ptr, absmax_ptr, codes_ptr, scales_ptr, N, K_BLOCKS, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Sums of ROWS rows' words of codes, and of their scales, over one part of the features; BLOCKS blocks at a time."""
    WORDS: tl.constexpr = BLOCKS * BLOCK // 8
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    turns = K_BLOCKS // BLOCKS
    share = tl.cdiv(turns, tl.num_programs(1))
    first = tl.program_id(1) * share
    words_ptr = packed_ptr + row[:, None] * (K_BLOCKS * (BLOCK // 8)) + tl.arange(0, WORDS)[None, :]
    absmax_ptr += row[:, None] * K_BLOCKS + tl.arange(0, BLOCKS)[None, :]
    codes, scales = tl.zeros((ROWS, WORDS), tl.int32), tl.zeros((ROWS, BLOCKS), tl.float32)
    turn = tl.minimum(first, turns - 1)
    words, absmax = tl.load(words_ptr + turn * WORDS), tl.load(absmax_ptr + turn * BLOCKS)
    for turn in range(first, tl.minimum(first + share, turns)):
        turn = tl.minimum(turn + 1, turns - 1)  # the next are on their way while these are added
        next_words, next_absmax = tl.load(words_ptr + turn * WORDS), tl.load(absmax_ptr + turn * BLOCKS)
        codes, scales = codes + words, scales + absmax
        words, absmax = next_words, next_absmax
    tl.store(codes_ptr + tl.program_id(1) * N + row, tl.sum(codes, 1))
    tl.store(scales_ptr + tl.program_id(1) * N + row, tl.sum(scales, 1))


def read(q: NF4Tensor, parts: int, rows: int = 64, blocks: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """(parts, out_features) sums of codes, eight to a word, and of scales; sizes are multiples of ``rows`` and ``blocks`` blocks."""
    N, K = q.shape
    sums = [torch.empty(parts, N, dtype=dtype, device=q.packed.device) for dtype in (torch.int32, torch.float32)]
    words = q.packed.view(-1).view(torch.int32)
    _read_kernel[(N // rows, parts)](words, q.absmax, *sums, N, K // q.block_size, q.block_size, rows, blocks, num_warps=4)
    return tuple(sums)
