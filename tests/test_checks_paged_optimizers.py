"""The checks of unit 07: right answers in other dress pass, the reference modules pass, and sly wrong answers are refused."""

import heapq

import numpy as np
import pytest
import torch

from course.checking import NotYet, mistaken
from course.checks import paged_optimizers as check
from course.checks.paged_optimizers.evict import replace
from course.checks.paged_optimizers.layers import pass_seconds
from course.checks.paged_optimizers.overlap import step_time
from course.checks.paged_optimizers.pages import lay_out
from course.checks.paged_optimizers.update import update_page
from reference.paging import PagedAdamW
from reference.paging.layout import Page
from reference.paging.pool import Pool
from reference.paging.update import Numbers, plain_update


def refused(judge, answer, words, seeds=3):
    for seed in range(seeds):
        with pytest.raises(NotYet, match=words):
            judge._judge(answer, seed)


# right answers in other dress


def one_number_at_a_time(sizes, capacity):
    """A place for each number, then neighbours are joined."""
    pages, place = [], 0
    for number, size in enumerate(sizes):
        for start in range(size):
            page, offset = divmod(place, capacity)
            if offset == 0:
                pages.append([])
            last = pages[page][-1] if pages[page] else None
            if last and last[0] == number:
                pages[page][-1] = (*last[:3], last[3] + 1)
            else:
                pages[page].append((number, start, offset, 1))
            place += 1
    return pages


def tuples_of_numpy(sizes, capacity):
    return tuple(tuple((i, np.int64(s), np.int64(o), np.int64(n)) for i, s, o, n in page) for page in lay_out(sizes, capacity))


def by_heap(accesses, frames, policy):
    """A heap of uses with stale entries left in it."""
    sign = 1 if policy == "lru" else -1
    heap, last, hits, evicted = [], {}, 0, []
    for time, page in enumerate(accesses):
        if page in last:
            hits += 1
        elif len(last) == frames:
            while True:
                when, out = heapq.heappop(heap)
                if last.get(out) == sign * when:
                    break
            del last[out]
            evicted.append(out)
        last[page] = time
        heapq.heappush(heap, (sign * time, page))
    return hits, evicted


def evicted_as_a_tuple(accesses, frames, policy):
    hits, evicted = replace(accesses, frames, policy)
    return [np.int64(hits), tuple(evicted)]


def with_the_pool(accesses, frames, policy):
    """The module's own table."""
    pages = [Page(1024, torch.float32, pinned=False) for _ in range(max(accesses) + 1)]
    pool = Pool(pages, frames, 1024, torch.device("cpu"), policy)
    for page in accesses:
        with pool.use(page):
            pass
    kinds = [event.kind for event in pool.trace]
    return kinds.count("hit"), [event.page for event in pool.trace if event.kind == "out"]


def with_the_module(page, pieces, parameters, gradients, steps, lr, betas, eps, weight_decay):
    group = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
    for number, start, offset, length in pieces:
        if gradients[number] is not None:
            p, g = (x[number][start : start + length] for x in (parameters, gradients))
            m, v = page[:, offset : offset + length]
            plain_update(p, g, m, v, Numbers.of(group, steps[number]))


def in_numpy(page, pieces, parameters, gradients, steps, lr, betas, eps, weight_decay):
    rows = page.numpy()
    for number, start, offset, length in pieces:
        if gradients[number] is None:
            continue
        here, there = slice(start, start + length), slice(offset, offset + length)
        g, p = gradients[number].numpy()[here], parameters[number].numpy()
        rows[0, there] += (1 - betas[0]) * (g - rows[0, there])
        rows[1, there] += (1 - betas[1]) * (g * g - rows[1, there])
        m, v = rows[0, there] / (1 - betas[0] ** steps[number]), rows[1, there] / (1 - betas[1] ** steps[number])
        p[here] += -lr * weight_decay * p[here] - lr * m / (np.sqrt(v) + eps)


def by_clock(pages, frames, load, update, store):
    """Lanes that are given work as soon as they may have it."""
    lanes = {"load": 0.0, "update": 0.0, "store": 0.0}
    free = [0.0] * frames  # when each frame is empty
    for i in range(pages):
        t = max(lanes["load"], free[i % frames]) + load
        lanes["load"] = t
        t = max(lanes["update"], t) + update
        lanes["update"] = t
        t = max(lanes["store"], t) + store
        lanes["store"] = free[i % frames] = t
    return np.float64(max(lanes.values()))


def in_torch(weights, bits, tokens, operations, bandwidth):
    n = torch.tensor(weights, dtype=torch.float64)
    copy, compute = n * bits / (8 * bandwidth), n * 2 * tokens / operations
    return copy[0] + torch.maximum(compute[:-1], copy[1:]).sum() + compute[-1]


@pytest.mark.parametrize(
    "judge, answer",
    [
        (check.pages, one_number_at_a_time),
        (check.pages, tuples_of_numpy),
        (check.evict, by_heap),
        (check.evict, evicted_as_a_tuple),
        (check.evict, with_the_pool),
        (check.update, with_the_module),
        (check.update, in_numpy),
        (check.overlap, by_clock),
        (check.layers, in_torch),
    ],
)
def test_right_answers_in_other_dress_pass_every_time(judge, answer):
    if answer is with_the_pool:  # it stores only what was changed, and every page here is
        assert answer([0, 1, 2, 0], 2, "lru") == (0, [0, 1])
    for seed in range(5):
        judge._judge(answer, seed)


def test_the_layout_of_the_module_is_that_of_the_exercise():
    """But for the alignment: with sizes that are multiples of it they agree."""
    sizes = [64, 128, 640, 64, 192]
    optimizer = PagedAdamW([torch.nn.Parameter(torch.zeros(size)) for size in sizes], page_bytes=1024)
    assert [list(map(tuple, page.pieces)) for page in optimizer.layout.pages] == lay_out(sizes, 128)


# wrong in ways that are not listed


@pytest.mark.parametrize(
    "judge, answer, words",
    [
        (check.pages, lambda sizes, capacity: [piece for page in lay_out(sizes, capacity) for piece in page], "pieces without pages"),
        (check.pages, lambda sizes, capacity: lay_out(sizes, capacity - 1), "expected"),
        (check.pages, lambda sizes, capacity: [*lay_out(sizes, capacity), []], "too many: page 1"),
        (check.pages, lambda sizes, capacity: [[*page, page[-1]] for page in lay_out(sizes, capacity)], "page 0: too many: piece 3"),
        (
            check.pages,
            lambda sizes, capacity: [[(i, s, o + (i == 1), n) for i, s, o, n in page] for page in lay_out(sizes, capacity)],
            "page 0: piece 1: offset: expected 2, got 3",
        ),
        (check.pages, lambda sizes, capacity: [[piece[:3] for piece in page] for page in lay_out(sizes, capacity)], "it is four integers"),
        (check.pages, lambda sizes, capacity: [len(page) for page in lay_out(sizes, capacity)], "a page is of type int"),
        (check.pages, lambda sizes, capacity: None, "return a list of pages"),
        (
            check.pages,
            mistaken(lay_out, piece=lambda number, start, offset, length, before: (number, start, 0, length)),
            "0 in every piece",
        ),
        (check.pages, lambda sizes, capacity: lay_out(sizes[::-1], capacity), "expected"),
        (check.evict, lambda *given: replace(*given)[0], "return a pair"),
        (check.evict, lambda *given: None, "is the `return` missing"),
        (check.evict, lambda *given: replace(*given)[::-1], "number 2 of them is of type int: return a pair"),
        (check.evict, lambda accesses, frames, policy: replace(accesses, frames, "lru"), "both policies evict"),
        (check.evict, lambda *given: (replace(*given)[0], sorted(replace(*given)[1])), "evicted pages"),
        (check.update, mistaken(update_page, decay=lambda p, lr, wd: p * (1 + lr * wd)), "parameter"),
        (check.update, mistaken(update_page, step_of=lambda steps, number: 1), "parameter"),
        (check.update, mistaken(update_page, step_of=lambda steps, number: steps[number] + 1), "t is one too large"),
        (check.overlap, lambda *given: 1.01 * step_time(*given), "expected"),
        (check.overlap, lambda pages, frames, *times: step_time(pages, max(2, frames), *times), "one frame"),
        (check.overlap, lambda pages, frames, load, update, store: step_time(pages, frames, load, update, load), "expected"),
        (check.layers, lambda weights, *rest: pass_seconds(sorted(weights), *rest), "different size|large layer|4.127"),
        (check.layers, lambda weights, bits, *rest: pass_seconds(weights, round(bits), *rest), "4.127"),
    ],
)
def test_sly_answers_are_refused(judge, answer, words):
    refused(judge, answer, words)


def test_an_update_that_returns_new_tensors_changes_nothing():
    def elsewhere(page, pieces, parameters, *rest, **more):
        update_page(page.clone(), pieces, [p.clone() for p in parameters], *rest, **more)

    refused(check.update, elsewhere, "argument 1 is as it was: change it in place")
