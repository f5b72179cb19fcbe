"""Every method on the same tasks, each at its own learning rate: what it learns and forgets, and from how few examples.

    python -m benchmarks.peft_family            # all cores; saves the recorded result "peft_family"
    python -m benchmarks.peft_family --smoke    # two methods, a few steps; saves to a temporary folder

The tiny model, on text that it has never seen (``course.lab.world``):

- **clinic, sql**: fresh text for every step; the score is nats per token above the floor, on fresh text. What is *forgotten* is the same
  score on the general domain, of the model that learned clinic.
- **few-shot**: 16, 64 or 256 clinic notes; the model reads the complaints and says which of eight diseases is likely. The score is
  accuracy on 320 fresh notes, without T-Few's extra losses ("lm") and, of some methods, with them ("t-few").

How it is made fair. Every run starts from the same weights and sees the same data, which the seed decides, with the first values. Each
method and task has its own rate: the best of three half decades around where the method is usually trained, and of one more where the best
lies at an end; with seed 0, on validation data. Few-shot rates are searched at 64 examples, with 128 notes to validate: more than anybody
with 64 has, so these are what a method can do, not what a rate guessed blindly gives. Seed 0 is one of the three.

Runs are spread over the cores, a thread each. What a method costs in time and memory is measured by ``benchmarks/peft_costs.py``, alone.
"""

import copy
import dataclasses
import functools
import multiprocessing
import os
import statistics
import time

import torch
from torch import Tensor, nn

from benchmarks.cli import options, rounded
from course.lab import models, recorded, seed_everything
from course.lab.family import METHODS, TOKENS
from course.lab.tables import columns, wrapped
from course.lab.training import above_floor, next_token_loss, warmup_cosine
from course.lab.world import DISEASES, World
from reference.t_few import answer_scores, choice_losses

TEXTS, CHOICES = ("clinic", "sql"), tuple(DISEASES)
AROUND = (10**-0.5, 1.0, 10**0.5)  # half decades around a method's usual rate


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is done; the defaults are the benchmark's, ``SMOKE`` is a dry run."""

    methods: tuple[str, ...] = tuple(METHODS)
    also_t_few: tuple[str, ...] = ("LoRA", "DoRA", "IA³", "adapter, Houlsby", "prompt, text", "prefix, random")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 40
    few_steps: int = 30
    rows: int = 8
    length: int = 32
    few_rows: int = 16
    sizes: tuple[int, ...] = (16, 64, 256)
    searched_at: int = 64
    validation: int = 128
    test: int = 320
    test_rows: int = 48
    rates: tuple[float, ...] = AROUND
    walk: int = 1  # further half decades at the most, where the best is at the edge


SMOKE = Settings(("LoRA", "IA³", "prompt, text"), ("LoRA", "IA³"), (0, 1), 2, 2, 4, 16, 4, (4, 8), 4, 8, 8, 4, (1.0,), 0)
WORLD = World()
base = functools.cache(lambda: models.load("tiny", where=torch.device("cpu"))[0].requires_grad_(False))


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: what it takes to repeat it."""

    method: str
    task: str  # "clinic", "sql", "lm" or "t-few"
    rate: float
    seed: int
    size: int = 0  # examples, of the last two


@functools.cache
def notes(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clinic notes up to "likely": ids (count, longest), padded behind; where each ends; which of CHOICES follows."""
    rows = []
    for text in WORLD.sample("clinic", count, 20, seed).tolist():
        end = text.index(WORLD.ids["likely"])
        rows.append((text[: end + 1], CHOICES.index(WORLD.vocabulary[text[end + 1]])))
    ids = torch.zeros(count, max(len(row) for row, _ in rows), dtype=torch.long)
    for i, (row, _) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) - 1 for row, _ in rows]), torch.tensor([answer for _, answer in rows])


def at_the_end(model: nn.Module, ids: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the word after each note, for each choice (rows, choices, 1, vocabulary), and the choices as labels."""
    logits = model(input_ids=ids).logits[torch.arange(len(ids)), ends]  # padding lies behind, where nothing looks
    labels = torch.tensor([WORLD.ids[choice] for choice in CHOICES]).expand(len(ids), -1)[..., None]
    return logits[:, None, None].expand(-1, len(CHOICES), 1, -1), labels


@torch.no_grad()
def choosing(model: nn.Module, count: int, seed: int) -> tuple[float, float]:
    """On fresh notes: nats of the right choice among the choices, and accuracy."""
    ids, ends, right = notes(count, seed)
    scores = answer_scores(*at_the_end(model, ids, ends))
    return nn.functional.cross_entropy(scores, right).item(), (scores.argmax(1) == right).float().mean().item()


def example(task: str, seed: int) -> Tensor:
    """A text of the task that soft prompts may start from; it is of the training data's kind, and not in the tests."""
    return WORLD.sample(task if task in TEXTS else "clinic", 1, TOKENS + 1, 77_000 + seed)[0, 1:]


def adapted(run: Run) -> nn.Module:
    seed_everything(run.seed)
    return METHODS[run.method].adapt(copy.deepcopy(base()), example(run.task, run.seed)).train()


def loss_of(run: Run, model: nn.Module, step: int, s: Settings, order: Tensor) -> Tensor:
    if run.task in TEXTS:
        return next_token_loss(model, WORLD.sample(run.task, s.rows, s.length, 1000 * (run.seed + 1) + step))
    ids, ends, right = notes(run.size, 40_000 + run.seed)
    chosen = order[torch.arange(step * s.few_rows, (step + 1) * s.few_rows) % len(order)]
    weight = 1.0 if run.task == "t-few" else 0.0
    return choice_losses(*at_the_end(model, ids[chosen], ends[chosen]), right[chosen], ul=weight, ln=weight)["loss"]


def train(run: Run, s: Settings) -> nn.Module | None:
    """The trained model; None where training broke down."""
    model, schedule = adapted(run), warmup_cosine()
    optimizer = METHODS[run.method].optimizer(model, run.rate)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    steps = s.steps if run.task in TEXTS else s.few_steps
    order = torch.randperm(max(run.size, 1), generator=torch.Generator().manual_seed(run.seed))
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step / steps)
        loss = loss_of(run, model, step, s, order)
        if not torch.isfinite(loss):
            return None
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return model.eval()


def carry_out(run: Run, s: Settings) -> dict:
    """Validation score, lower is better, by which rates are chosen; and what is reported."""
    model = train(run, s)
    if model is None:
        return {"validation": 99.0, "score": None, "forgotten": None}
    if run.task in TEXTS:
        return {
            "validation": above_floor(model, WORLD, run.task, s.test_rows, s.length, seed=500_001),
            "score": above_floor(model, WORLD, run.task, s.test_rows, s.length),
            "forgotten": above_floor(model, WORLD, "general", s.test_rows, 48) if run.task == "clinic" else None,
        }
    return {"validation": choosing(model, s.validation, 50_001)[0], "score": choosing(model, s.test, 60_001)[1], "forgotten": None}


def _work(job: tuple[Run, Settings, float]) -> dict:
    """A run that would start too late is left out."""
    *job, until = job
    return carry_out(*job) if time.time() < until else {"validation": 99.0, "score": None, "forgotten": None}


def spread(runs: list[Run], s: Settings, pool, until: float) -> dict[Run, dict]:
    # the first seeds first, should time run out; then the slow ones, so that no core waits for one at the end
    order = sorted(runs, key=lambda run: (run.seed, run.task not in TEXTS, "LSTM" not in run.method))
    return dict(zip(order, pool.imap(_work, [(run, s, until) for run in order], chunksize=1), strict=True))


def search(s: Settings, pool, until: float) -> dict[Run, dict]:
    """Runs with seed 0 on both texts and at one size, walked on until the best rate has neighbours on both sides."""
    tasks, done = {task: 0 for task in TEXTS} | {"lm": s.searched_at}, {}
    wanted = [Run(n, t, METHODS[n].rate * factor, s.seeds[0], tasks[t]) for n in s.methods for t in tasks for factor in s.rates]
    for _ in range(s.walk + 1):
        done |= spread(wanted, s, pool, until)
        wanted = []
        for name in s.methods:
            for task, size in tasks.items():
                scores = tried(done, name, task)
                best, rates = min(scores, key=scores.get), sorted(scores)
                if len(rates) > 1 and best in (rates[0], rates[-1]):
                    further = best * (10**-0.5 if best == rates[0] else 10**0.5)
                    wanted.append(Run(name, task, further, s.seeds[0], size))
    return done


def tried(done: dict[Run, dict], name: str, task: str) -> dict[float, float]:
    """Rate -> validation score."""
    return {run.rate: found["validation"] for run, found in done.items() if (run.method, run.task) == (name, task)}


def measure(s: Settings, workers: int, until: float) -> dict:
    torch.set_num_threads(1)
    base()  # before the workers, who share it
    started = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        found = search(s, pool, until)
        rates = {(n, task): tried(found, n, task) for n in s.methods for task in (*TEXTS, "lm")}
        chosen = {key: min(scores, key=scores.get) for key, scores in rates.items()}
        final = [Run(n, task, chosen[n, task], seed) for n in s.methods for task in TEXTS for seed in s.seeds]
        final += [
            Run(n, losses, chosen[n, "lm"], seed, size)
            for n in s.methods
            for losses in ("lm", "t-few")[: 1 + (n in s.also_t_few)]
            for size in s.sizes
            for seed in s.seeds
        ]
        found |= spread([run for run in final if run not in found], s, pool, until)

    def scores(name: str, task: str, rate: float, size: int = 0, what: str = "score") -> list[float]:
        """Of the seeds; one that broke down, or for which there was no time, is left out."""
        every = [found[Run(name, task, rate, seed, size)][what] for seed in s.seeds]
        return [value for value in every if value is not None]

    rows = []
    for name in s.methods:
        method = METHODS[name]
        row = {"method": name, "kind": method.kind, "merges": method.merges}
        row["rates"] = {task: chosen[name, task] for task in (*TEXTS, "lm")}
        row["tried"] = {task: {f"{rate:.3g}": score for rate, score in sorted(rates[name, task].items())} for task in (*TEXTS, "lm")}
        for task in TEXTS:
            row[task] = scores(name, task, chosen[name, task])
        row["forgotten"] = scores(name, "clinic", chosen[name, "clinic"], what="forgotten")
        few = functools.partial(scores, name, rate=chosen[name, "lm"])
        kinds = ("lm", "t-few")[: 1 + (name in s.also_t_few)]
        row["few"] = {losses: {str(size): few(losses, size=size) for size in s.sizes} for losses in kinds}
        rows.append(row)
    untouched = base()
    before = {task: above_floor(untouched, WORLD, task, s.test_rows, s.length) for task in TEXTS}
    before |= {"general": above_floor(untouched, WORLD, "general", s.test_rows, 48), "few": choosing(untouched, s.test, 60_001)[1]}
    result = {
        "settings": dataclasses.asdict(s) | {"methods": len(s.methods)},
        "base": before,
        "methods": rows,
        "seconds": time.perf_counter() - started,
        "workers": workers,
    }
    return rounded(result)


def table(result: dict) -> str:
    def mean(values: list | None) -> float | None:
        return statistics.fmean(values) if values else None

    def few(row: dict, losses: str) -> list[float | None]:
        return [mean(row["few"].get(losses, {}).get(size)) for size in sizes]

    sizes, methods, base = [str(size) for size in result["settings"]["sizes"]], result["methods"], result["base"]
    seeds = max(len(row["sql"]) for row in methods)
    about = f"means of {seeds} seed{'s' * (seeds > 1)}: nats above the floor in two domains, nats of the general text that are lost; the"
    about += f" share of right answers from so many examples, with the usual loss (lm) and with T-Few's (T); {result['seconds']:.0f} s"
    heads = ("", "clinic", "sql", "forgot", *(f"lm {size}" for size in sizes), *(f"T {size}" for size in sizes))
    rows = [("base", base["clinic"], base["sql"], 0.0, *[base["few"]] * len(sizes), *[None] * len(sizes))]
    for row in methods:
        rows.append((row["method"], *(mean(row[key]) for key in ("clinic", "sql", "forgotten")), *few(row, "lm"), *few(row, "t-few")))
    rates = [(row["method"], *(f"{rate:.2g}" for rate in row["rates"].values())) for row in methods]
    return "\n".join([wrapped(about), columns(heads, rows), "", columns(("learning rate", *methods[0]["rates"]), rates)])


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # processes that fork must not know of a GPU
    cores = max(1, (os.cpu_count() or 1) - 1)
    given = options(
        "peft_family",
        __doc__,
        gpu=False,
        workers={"type": int, "default": cores, "help": "processes"},
        until={"type": float, "default": float("inf"), "help": "Unix time after which no run starts"},
    )
    result = measure(SMOKE if given.smoke else Settings(), given.workers, given.until)
    print(table(result))
    print("saved to", recorded.save("peft_family", result, given.out, torch.device("cpu")))


if __name__ == "__main__":
    main()
