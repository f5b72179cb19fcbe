"""Sizes of the grouped kernels, timed on this GPU for cells of the benchmark multi_lora: what to write into ``sizes.TABLE``.

    python -m benchmarks.tune_multi_lora               # a CUDA device, about a minute: compiles in several processes, then times
    python -m benchmarks.tune_multi_lora --smoke       # on a CPU: two rows of sizes, no times worth reading

For each (tile, rank) it prints rows of sizes, best first, by the geometric mean over the cells of that tile and rank of a row's time
over the best row's there, and the worst of them. Then it prints the table of the winners, ready to be pasted, and what that gives.
Nothing is saved.
"""

import argparse
import functools
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
from benchmarks import multi_lora
from benchmarks.lora_layer import replayed
from course.lab.meters import milliseconds
from reference.kernels.multi_lora import sizes

CELLS = [
    (shape, rows, r, mix)
    for r in (16, 32, 64)
    for shape in ((4096, 4096), (8192, 8192))
    for rows in (16, 64, 256)
    for mix in ("distinct", "uniform", "identical")
    if (r != 32 or shape[0] == 4096) and (rows, mix) != (64, "distinct")  # 256 of them say the same
]
SMOKE = [((48, 32), rows, 16, mix) for rows in (1, 20) for mix in ("identical",)]
Row = tuple[int, ...]


def rows_for(tile: int, rank: int) -> list[Row]:
    """The row in use, and others that differ from it in one thing or in two that go together."""
    now = sizes.TABLE[tile, rank]
    columns, warps, stages, programs, shares, out, out_warps = now
    found = [now]
    for change in ((128, 4, 3), (128, 4, 4), (256, 4, 3), (256, 8, 3), (128, 8, 4), (64, 4, 5)):
        found.append((*change, programs, shares, out, out_warps))
    for change in ((1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (2, 16), (4, 8), (4, 16)):
        found.append((columns, warps, stages, *change, out, out_warps))
    for change in ((64, 4), (128, 4), (128, 8), (256, 8), (64, 2), (256, 4)):
        found.append((columns, warps, stages, programs, shares, *change))
    return list(dict.fromkeys(found))


def use(tile: int, rank: int, row: Row) -> None:
    sizes.TABLE[tile, rank] = row
    sizes.sizes.cache_clear()


class Cell:
    """A chain of layers, as :func:`benchmarks.multi_lora.cell` times it."""

    def __init__(self, given: tuple, where: torch.device, chain: bool = True):
        (n_out, n_in), rows, self.r, mix = given
        self.name, self.where = f"{n_out}×{n_in}, {rows} rows, r {self.r}, {mix}", where
        named = multi_lora.mixed(mix, rows)
        count = max(named) + 1
        # With one layer it is compiled; more than a cache's worth is timed.
        self.depth = max(2, min(8, multi_lora.COLD // (2 * count * self.r * (n_out + n_in)))) if chain else 1
        self.layers = [multi_lora.Layer(count, self.r, n_out, n_in, where) for _ in range(self.depth)]
        self.batch = multi_lora.Batch(named, where)
        self.x, self.y = (torch.randn(rows, n, device=where).bfloat16() for n in (n_in, n_out))
        self.key = self.batch.plan.tile, max(16, self.r)

    def once(self) -> None:
        multi_lora.ours(self.y, self.x, self.layers[0], self.batch)

    def time(self, repeats: int) -> float:
        """Milliseconds a layer, or infinity where the sizes don't fit this GPU."""
        try:
            self.once()
            chain = replayed(lambda: [multi_lora.ours(self.y, self.x, layer, self.batch) for layer in self.layers], self.where)
            return milliseconds(chain, repeats=repeats, warmup=1, where=self.where) / self.depth
        except Exception as problem:
            if "out of resource" not in str(problem):
                raise
            return math.inf


def compiled(cells: list[tuple], row: int, every: int) -> None:
    """A share of all kernels, into Triton's cache on the disk: in a process of its own."""
    where = torch.device("cuda")
    for given in cells:
        cell = Cell(given, where, chain=False)
        for candidate in rows_for(*cell.key)[row::every]:
            before = sizes.TABLE[cell.key]
            use(*cell.key, candidate)
            try:
                cell.once()
            except Exception as problem:  # the timing says it again
                print(f"{cell.name}, {candidate}: {str(problem)[:80]}")
            use(*cell.key, before)
        del cell
        torch.cuda.empty_cache()


def compile_all(cells: list[tuple], processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        list(pool.map(functools.partial(compiled, cells, every=processes), range(processes)))


def measured(cells: list[tuple], where: torch.device, repeats: int, most: int | None) -> dict[tuple, dict[str, dict[Row, float]]]:
    """(tile, rank) -> cell -> row of sizes -> milliseconds."""
    found: dict[tuple, dict[str, dict[Row, float]]] = {}
    for given in cells:
        cell = Cell(given, where)
        now, times = sizes.TABLE[cell.key], {}
        for row in rows_for(*cell.key)[:most]:
            use(*cell.key, row)
            times[row] = cell.time(repeats)
        use(*cell.key, now)
        found.setdefault(cell.key, {})[cell.name] = times
        del cell
    return found


def ranked(cells: dict[str, dict[Row, float]]) -> list[tuple[float, float, Row]]:
    """Mean and worst of each row's time over the cell's best, best row first."""
    found = []
    for row in next(iter(cells.values())):
        over = [times[row] / min(times.values()) for times in cells.values()]
        found.append((math.exp(sum(map(math.log, over)) / len(over)), max(over), row))
    return sorted(found)


def joined(cells: dict[str, dict[Row, float]], now: Row) -> Row:
    """The best of each part of a row, since parts are tried one at a time: shrink, how many programs, expand."""
    order = [row for _, _, row in ranked(cells)]
    shrink = next(row for row in order if row[3:] == now[3:])
    share = next(row for row in order if row[:3] + row[5:] == now[:3] + now[5:])
    expand = next(row for row in order if row[:5] == now[:5])
    return shrink[:3] + share[3:5] + expand[5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--processes", type=int, default=max(1, min(14, len(os.sched_getaffinity(0)) - 1)))
    given = parser.parse_args()
    cells, began = SMOKE if given.smoke else CELLS, time.perf_counter()
    where = torch.device("cpu" if given.smoke else "cuda")
    if not given.smoke:
        compile_all(cells, given.processes)
        print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    with torch.no_grad():
        found = measured(cells, where, 1 if given.smoke else 5, 2 if given.smoke else None)
    table = dict(sizes.TABLE)
    for key, times in sorted(found.items()):
        print(f"\ntile, rank {key}: mean and worst over the cell's best, of {len(times)} cells")
        for mean, worst, row in ranked(times)[:6]:
            print(f"  {mean:6.3f} {worst:6.3f}  {row}{'  now' if row == table[key] else ''}")
        for name, by_row in times.items():
            best = min(by_row, key=by_row.get)
            print(f"    {name:38} now {1e3 * by_row[table[key]]:7.1f} µs, best {1e3 * by_row[best]:7.1f}  {best}")
        table[key] = joined(times, table[key])
    print(f"\nafter {time.perf_counter() - began:.0f} s. The best parts joined, for sizes.TABLE:")
    for key, row in table.items():
        print(f"    {key}: {row},")
    for key, row in table.items():
        use(*key, row)
    print("\nwith it, µs a layer (the table before):")
    for given_cell in cells:
        cell = Cell(given_cell, where)
        before = found[cell.key][cell.name]
        print(f"    {cell.name:38}{1e3 * cell.time(1 if given.smoke else 7):8.1f} ({1e3 * next(iter(before.values())):.1f})")


if __name__ == "__main__":
    main()
