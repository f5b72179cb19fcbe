"""Speed of the Fisher's diagonal: ours beside BackPACK, torch.func over the whole model, and a loop with a pass for each answer.

    python -m benchmarks.fisher             # on the best device of the machine; saves the recorded result "fisher"
    python -m benchmarks.fisher --smoke     # small; saves to a temporary folder

*Classifier*: an MLP of two sizes on rows without positions, the exact Fisher and the empirical one. *Tiny*: the course's tiny Llama, the
exact Fisher of one row, every position and every one of its 349 words. All contestants do the same work and their results are compared.
Times are medians of rounds in turn, except for the loop, which takes seconds and runs once. "Ours" is without the check that no parameter
is used outside of its module, which nobody else makes; "ours, checked" is the default.

The limit is what the products alone would take, at the rate that a large float32 product reaches on this device: for each answer one
backward pass through what lies above a layer, and where a row has positions one more product to form each gradient.
"""

import contextlib
import itertools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cli import failed, message, options
from course.lab import models, recorded
from course.lab.meters import milliseconds, peak_memory
from course.lab.tables import columns, short, wrapped
from course.lab.world import World
from reference.ewc import fisher_diagonal

Fisher = dict[str, Tensor]


def classifier(width: int, where: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = (784, width, width, 10)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())][:-1]
    return nn.Sequential(*layers).to(where)


def by_loop(model: nn.Module, x: Tensor, y: Tensor | None = None) -> Fisher:
    """One pass for each row and answer, batch 1; with labels ``y`` one for each row: the empirical Fisher."""
    trained = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    count = 0
    for n in range(len(x)):
        out = model(x[n : n + 1])
        logs = getattr(out, "logits", out).flatten(0, -2).log_softmax(-1)  # (positions, classes)
        count += len(logs)
        places = [(0, int(y[n]))] if y is not None else [(t, c) for t in range(len(logs)) for c in range(logs.shape[1])]
        for t, c in places:
            gradients = torch.autograd.grad(logs[t, c], list(trained.values()), retain_graph=True)
            weight = 1.0 if y is not None else logs[t, c].detach().exp()
            for name, g in zip(trained, gradients, strict=True):
                total[name].add_(weight * g.square())
    return {name: value / count for name, value in total.items()}


def by_func(model: nn.Module, x: Tensor, chunk: int) -> Fisher:
    """torch.func over the whole model: the vector-Jacobian products of all answers of a row, vectorised; exact."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    total, count = {name: torch.zeros_like(p) for name, p in own.items()}, 0
    with sdpa_kernel(SDPBackend.MATH):
        for row in x:

            def outputs(p: Fisher, row: Tensor = row) -> Tensor:
                found = functional_call(model, p, (row[None],))
                return getattr(found, "logits", found).flatten(0, -2)

            logits, back = vjp(outputs, own)
            p = logits.softmax(-1)
            positions, classes = p.shape
            count += positions
            for first in range(0, positions * classes, chunk):
                which = torch.arange(first, min(first + chunk, positions * classes), device=x.device)
                t, c, k = which // classes, which % classes, which - first
                columns = torch.zeros(len(which), positions, classes, device=x.device)
                columns[k, t] = -p[t, c].sqrt()[:, None] * p[t]
                columns[k, t, c] += p[t, c].sqrt()
                for name, g in vmap(back)(columns)[0].items():
                    total[name] += g.square().sum(0)
    return {name: value / count for name, value in total.items()}


def by_backpack(model: nn.Sequential, x: Tensor, y: Tensor, estimator: str) -> Callable[[], Fisher]:
    from backpack import backpack, extend, extensions

    theirs, loss = extend(model), extend(nn.CrossEntropyLoss())
    what = extensions.DiagGGNExact() if estimator == "exact" else extensions.SumGradSquared()

    def work() -> Fisher:
        with backpack(what):
            loss(theirs(x), y).backward()
        if estimator == "exact":
            return {name: p.diag_ggn_exact for name, p in theirs.named_parameters()}
        return {name: p.sum_grad_squared * len(x) for name, p in theirs.named_parameters()}

    return work


def product_rate(where: torch.device, size: int) -> float:
    """Operations per second of a float32 product."""
    a = torch.randn(size, size, device=where)
    return 2 * size**3 / (1e-3 * milliseconds(lambda: a @ a, repeats=5, warmup=2, where=where))


def compare(contestants: dict[str, Callable[[], Fisher]], where: torch.device, rounds: int, repeats: int) -> tuple[dict, dict]:
    """Median milliseconds of each, and how far it is from the first in size of the whole; in place of a time the reason where one fails.

    Without rounds each runs once, and that is its time.
    """
    results, times, failed = {}, {}, {}
    for name, work in contestants.items():
        found: list[Fisher] = []
        try:
            once = milliseconds(lambda work=work, found=found: found.append(work()), repeats=1, warmup=0, where=where)
        except Exception as error:
            failed[name] = message(error)
            continue
        results[name], times[name] = {key: value.detach().clone() for key, value in found[0].items()}, [] if rounds else [once]
    for _ in range(rounds):
        for name, taken in times.items():
            taken.append(milliseconds(contestants[name], repeats=repeats, warmup=1, where=where))
    first = next(iter(results.values()))
    size = torch.stack([value.norm() for value in first.values()]).norm()
    apart = {name: max(((value - first[key]).norm() / size).item() for key, value in found.items()) for name, found in results.items()}
    return {name: statistics.median(taken) for name, taken in times.items()} | failed, apart


def on_classifier(where: torch.device, width: int, rows: int, rounds: int, repeats: int, rate: float, slow: bool) -> list[dict]:
    model = classifier(width, where)
    x, y = torch.randn(rows, 784, device=where), torch.randint(10, (rows,), device=where)
    inner = sum(m.weight.numel() for m in model[1:] if isinstance(m, nn.Linear))
    everything = sum(m.weight.numel() for m in model if isinstance(m, nn.Linear))
    found = []
    for estimator, answers in (("exact", 10), ("empirical", 1)):
        quick = {"ours": lambda estimator=estimator: fisher_diagonal(model, [(x, y)], estimator, check=False)}
        quick["ours, checked"] = lambda estimator=estimator: fisher_diagonal(model, [(x, y)], estimator)
        with contextlib.suppress(ImportError):  # a peer of tests and benchmarks only
            quick["BackPACK"] = by_backpack(classifier(width, where), x, y, estimator)
        times, apart = compare(quick, where, rounds, repeats)
        others = {"loop": lambda estimator=estimator: by_loop(model, x, y if estimator == "empirical" else None)} if slow else {}
        if slow and estimator == "exact":
            others["torch.func"] = lambda: by_func(model, x, 64)
        if slow:  # the first calls of a process load kernels
            by_loop(model, x[:2])
            by_func(model, x[:2], 64)
        slow_times, slow_apart = compare({"ours": quick["ours"]} | others, where, 0, 1)
        times |= {name: value for name, value in slow_times.items() if name != "ours"}  # ours from the longer measurement
        apart |= slow_apart
        limit = 1e3 * (2 * rows * answers * inner + 2 * rows * everything * 2) / rate
        row = {"model": "classifier", "estimator": estimator, "rows": rows, "width": width, "answers": answers, "parameters": everything}
        found.append(row | {"milliseconds": times, "apart": apart, "limit_ms": limit})
    return found


def on_tiny(where: torch.device, positions: int, chunk: int, rate: float, rounds: int) -> list[dict]:
    model, _ = models.load("tiny", where=where)
    ids = World().sample("general", 1, positions + 1, 0).to(where)
    x, y = ids[:, :-1], ids[:, 1:]
    contestants = {
        "ours": lambda: fisher_diagonal(model, [(x, y)], "exact", chunk=chunk, check=False),
        "torch.func": lambda: by_func(model, x, chunk),
    }
    times, apart = compare(contestants, where, rounds, 1)
    by_loop(model, x[:, :1])
    slow, slow_apart = compare({"ours": contestants["ours"], "loop": lambda: by_loop(model, x)}, where, 0, 1)
    times["loop"], apart["loop"] = slow["loop"], slow_apart.get("loop")
    with peak_memory(where) as peak:
        contestants["ours"]()
    answers = positions * model.config.vocab_size
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    limit = 1e3 * 2 * 2 * answers * positions * matrices / rate
    row = {"model": "tiny", "estimator": "exact", "rows": 1, "positions": positions, "answers": answers, "parameters": matrices}
    return [row | {"milliseconds": times, "apart": apart, "limit_ms": limit, "peak_bytes": peak.bytes}]


SIZES = {  # tiny's positions and chunk, its rounds; width, rows, rounds and repeats of the classifiers
    "smoke": ((1, 64), 1, (16, 4, 1, 1), (32, 8, 1, 1)),
    "cpu": ((2, 256), 3, (256, 128, 5, 3), (1024, 256, 5, 2)),
    "cuda": ((3, 256), 5, (1024, 512, 5, 10), (2048, 4096, 5, 5)),
}


def measure(where: torch.device, size: str) -> dict:
    """All comparisons, at a size of ``SIZES``."""
    tiny, rounds, small, large = SIZES[size]
    rate = product_rate(where, {"smoke": 64, "cpu": 1024, "cuda": 8192}[size])
    rows = on_tiny(where, *tiny, rate, rounds)
    rows += on_classifier(where, *small, rate, slow=True)
    rows += on_classifier(where, *large, rate, slow=False)
    return {"product_rate": rate, "rows": rows}


def table(result: dict) -> str:
    names, rows, lines = ("ours", "ours, checked", "BackPACK", "torch.func", "loop"), [], []
    for row in result["rows"]:
        what, times = f"{row['model']} {row['estimator']}, {row['rows']} × {row['answers']}", row["milliseconds"]
        rows.append([what])
        for name in names:
            cell = times.get(name)
            rows[-1].append(short(cell) if isinstance(cell, float) else None if cell is None else "failed")
        rows[-1].append(short(row["limit_ms"]))
        lines += [failed(f"{what}, {name}", cell) for name, cell in times.items() if isinstance(cell, str)]
    apart = {name: [row["apart"][name] for row in result["rows"] if row["apart"].get(name) is not None] for name in names[1:]}
    differ = ", ".join(f"{name} {max(values):.1e}" for name, values in apart.items() if values)
    lines.append(wrapped(f"differ from ours by at most {differ}"))
    heads = ("rows × answers", "ours", "checked", "BackPACK", "func", "loop", "limit")
    return "\n".join(["milliseconds", columns(heads, rows), *lines])


def main() -> None:
    given = options("fisher", __doc__, gpu=False)
    result = measure(given.device, "smoke" if given.smoke else given.device.type)
    print(table(result))
    print("saved to", recorded.save("fisher", result, given.out, given.device))


if __name__ == "__main__":
    main()
