"""The loop of a kernel is found in the listing of its instructions, and what was counted is recorded."""

import pytest

from benchmarks import nf4_instructions as benchmark
from course.lab import recorded

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from reference.kernels.nf4 import pairs as nf4_pairs
from reference.kernels.nf4 import permute as nf4_permute

LISTING = """
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000fe20000000800 */
.L_x_0:
        /*0010*/                   FADD R2, R2, R3 ;                         /* 0x00000a00ff017b82 */
        /*0020*/              @P0  BRA `(.L_x_0) ;                           /* 0x00000a00ff017b82 */
.L_x_1:
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;              /* 0x00000a00ff017b82 */
        /*0040*/             @!P1  FFMA R5, R4, R4, R5 ;                     /* 0x00000a00ff017b82 */
        /*0050*/              @P2  BRA `(.L_x_2) ;                           /* 0x00000a00ff017b82 */
        /*0060*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;               /* 0x00000a00ff017b82 */
.L_x_2:
        /*0070*/                   BRA `(.L_x_1) ;                           /* 0x00000a00ff017b82 */
.L_x_3:
        /*0080*/                   EXIT ;                                    /* 0x00000a00ff017b82 */
        /*0090*/                   BRA `(.L_x_3);                            /* 0x00000a00ff017b82 */
"""


def test_the_longest_loop_is_found():
    assert benchmark.loop(LISTING) == ["LDG", "FFMA", "BRA", "UIADD3", "BRA"]


def test_without_a_loop_there_is_none():
    assert benchmark.loop(LISTING.replace("BRA", "NOP")) == []


@pytest.mark.parametrize("rows", ["1 row", "16 rows"])
@pytest.mark.parametrize("scales", ["", ", double quantization"])
def test_the_record_holds_together(rows, scales):
    """Each weight is looked up once, by its share of a word's loads from shared memory, or permutes; the kinds are parts of the count; the
    time is the count over the scheduler's rate."""
    row = recorded.load("nf4_instructions", device="cpu")["result"][rows + scales]
    kind, program, name = ("LDS", nf4_pairs.LOOK_UP, "ld.shared") if rows == "1 row" else ("PRMT", nf4_permute.LOOK_UP, "prmt")
    each = program.value.count(name) / 8
    assert each <= row["kinds"][kind] < 1.3 * each
    assert sum(row["kinds"].values()) <= row["instructions"]
    clocks = row["instructions"] * benchmark.SIDE**2 / (benchmark.SMS * benchmark.SCHEDULERS * benchmark.LANES)
    assert row["milliseconds"] == pytest.approx(1e3 * clocks / benchmark.CLOCK)
