"""Few-shot classification with a real language model: methods, 16 to 256 examples, T-Few's losses on and off.

    python -m benchmarks.gemma_few_shot --model gemma-3-270m     # one GPU, a minute or two after loading
    python -m benchmarks.gemma_few_shot --smoke                  # a tiny random model on a CPU: every path, no meaning

The task needs nothing but Python: a line of documentation from the standard library, and which of four packages it is from. Answers are
words, one to three tokens; the model's answer is the choice whose tokens have the least mean cross-entropy. 60 lines of each package are
the test, 16 the validation, and a training set of n takes n/4 of each from 64 others, by the seed.

The base is kept in bfloat16, as one would; what is trained is float32. Every method's rate is the best of three, half a decade apart, with
seed 0, at 64 examples, on the validation lines. Three seeds, which decide the training lines, their order and the first values.

Runs are spread over several processes that share the GPU, each with a model of its own; so nothing is timed.
"""

import ast
import copy
import dataclasses
import functools
import multiprocessing
import random
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cli import message, options, rounded
from course.lab import meters, models, recorded, seed_everything
from course.lab.family import METHODS, stored_tensors
from course.lab.meters import show_bytes
from course.lab.tables import columns, wrapped
from course.lab.training import warmup_cosine
from reference.t_few import answer_scores, choice_losses

PACKAGES = "asyncio importlib logging multiprocessing".split()
QUESTION = "\nThis line of documentation is from the Python package"
TOLD = f"Which Python package is this line of documentation from? {', '.join(PACKAGES)}?"  # where soft prompts may start
RATES = {
    "LoRA": 1e-3,
    "DoRA": 1e-3,
    "IA³": 1e-2,
    "adapter, Houlsby": 1e-3,
    "prompt, text": 1e-2,
    "prompt, random": 1e-1,
    "prefix, text": 3.16e-3,
    "prefix, random": 3.16e-2,
}
HALF_DECADE = 10**0.5


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is done; the defaults are the benchmark's, ``SMOKE`` is a dry run."""

    methods: tuple[str, ...] = tuple(RATES)
    plain: tuple[str, ...] = ("LoRA", "IA³")  # also without T-Few's extra losses
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = (16, 64, 256)
    searched_at: int = 64
    steps: int = 32
    rows: int = 8
    test: int = 60  # lines of each package
    validation: int = 16
    length: int = 110  # characters of a line at the most
    rows_at_once: int = 256
    factors: tuple[float, ...] = (1 / HALF_DECADE, 1.0, HALF_DECADE)


SMOKE = Settings(("LoRA", "IA³", "prefix, text"), ("LoRA",), (0, 1), (8, 16), 16, 2, 2, 2, 2, 60, 64, (1.0,))


@dataclasses.dataclass(frozen=True)
class Run:
    method: str
    losses: str  # "lm" or "t-few"
    rate: float
    seed: int
    size: int


@functools.cache
def lines(longest: int) -> dict[str, list[str]]:
    """Package -> first paragraphs of its documentation, each once, in an order that has nothing to do with their place."""
    library, found = Path(sysconfig.get_path("stdlib")), {}
    for package in PACKAGES:
        texts = {}
        for file in sorted((library / package).rglob("*.py")):
            if "test" not in file.name:
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                        texts[" ".join(text.split("\n\n")[0].split())] = None
        found[package] = sorted(text for text in texts if 25 <= len(text) <= longest)
        random.Random(package).shuffle(found[package])
    return found


class Task:
    """Lines as tokens, padded on the left; the model of this process."""

    def __init__(self, model: nn.Module, tokenizer, s: Settings):
        self.base, self.tokenizer, self.s = model.eval().requires_grad_(False), tokenizer, s
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.told = torch.tensor(self.tokens(TOLD))
        self.answers = [self.tokens(f" {package}") for package in PACKAGES]
        self.keep = max(map(len, self.answers))
        every, train = lines(s.length), max(s.sizes) // len(PACKAGES)
        borders = (0, s.test, s.test + s.validation, s.test + s.validation + train)
        short = {package: len(texts) for package, texts in every.items() if len(texts) < borders[-1]}
        if short:
            raise ValueError(f"this Python's library has too few lines: {short}, and {borders[-1]} are needed")
        self.splits = {
            split: [(bos + self.tokens(text + QUESTION), i) for i, p in enumerate(PACKAGES) for text in every[p][low:high]]
            for split, low, high in zip(("test", "validation", "train"), borders, borders[1:], strict=False)
        }
        self.width = max(len(ids) for rows in self.splits.values() for ids, _ in rows) + self.keep

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def batch(self, examples: list[tuple[list[int], int]], only_right: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids and mask (rows, width), labels of the last ``keep`` tokens (rows, keep), the right choices; a row for each choice."""
        where, ids, labels = self.base.device, [], []
        for prompt, right in examples:
            for answer in [self.answers[right]] if only_right else self.answers:
                ids.append([0] * (self.width - len(prompt) - len(answer)) + prompt + answer)
                labels.append([-100] * (self.keep - len(answer)) + answer)
        choices = 1 if only_right else len(PACKAGES)
        lengths = [len(p) + len(a) for p, r in examples for a in ([self.answers[r]] if only_right else self.answers)]
        mask = (torch.arange(self.width) >= self.width - torch.tensor(lengths)[:, None]).long()
        right = torch.tensor([r for _, r in examples])
        assert len(ids) == choices * len(examples)
        return torch.tensor(ids).to(where), mask.to(where), torch.tensor(labels).to(where), right.to(where)

    def logits(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        """Of the places that predict the last ``keep`` tokens: (rows, keep, vocabulary)."""
        return model(input_ids=ids, attention_mask=mask, logits_to_keep=self.keep + 1).logits[:, :-1]

    def loss(self, model: nn.Module, examples: list, losses: str) -> Tensor:
        if losses == "lm":
            ids, mask, labels, _ = self.batch(examples, only_right=True)
            return F.cross_entropy(self.logits(model, ids, mask).flatten(0, 1).float(), labels.flatten())
        ids, mask, labels, right = self.batch(examples)
        shape = (len(examples), len(PACKAGES), self.keep)
        return choice_losses(self.logits(model, ids, mask).view(*shape, -1), labels.view(shape), right)["loss"]

    @torch.no_grad()
    def measure(self, model: nn.Module, split: str) -> tuple[float, float]:
        """Nats of the right choice among the choices, and accuracy."""
        rows, found, answers = self.splits[split], [], []
        step = max(1, self.s.rows_at_once // len(PACKAGES))
        for i in range(0, len(rows), step):
            ids, mask, labels, right = self.batch(rows[i : i + step])
            shape = (len(right), len(PACKAGES), self.keep)
            found.append(answer_scores(self.logits(model, ids, mask).view(*shape, -1), labels.view(shape)))
            answers.append(right)
        scores, right = torch.cat(found), torch.cat(answers)
        return F.cross_entropy(scores, right).item(), (scores.argmax(1) == right).float().mean().item()

    def training_rows(self, run: Run) -> list:
        """n/8 of each package, then in an order of their own; again and again."""
        rng, rows = random.Random(run.seed), []
        for i in range(len(PACKAGES)):
            own = [row for row in self.splits["train"] if row[1] == i]
            rows += rng.sample(own, run.size // len(PACKAGES))
        rng.shuffle(rows)
        return rows

    def train(self, run: Run) -> nn.Module | None:
        seed_everything(run.seed)
        model = METHODS[run.method].adapt(copy.deepcopy(self.base), self.told.to(self.base.device)).train()
        optimizer, schedule, rows, s = METHODS[run.method].optimizer(model, run.rate), warmup_cosine(), self.training_rows(run), self.s
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        losses = []
        for step in range(s.steps):
            for group in optimizer.param_groups:
                group["lr"] = run.rate * schedule(step / s.steps)
            chosen = [rows[i % len(rows)] for i in range(step * s.rows, (step + 1) * s.rows)]
            loss = self.loss(model, chosen, run.losses)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            losses.append(loss.detach())
        return model.eval() if torch.stack(losses).isfinite().all() else None

    def carry_out(self, run: Run, split: str) -> tuple[float, float] | None:
        model = self.train(run)
        return None if model is None else self.measure(model, split)

    def costs(self, name: str) -> dict:
        """Numbers, and the peak of a step on the right answers alone."""
        seed_everything(0)
        model = METHODS[name].adapt(copy.deepcopy(self.base), self.told.to(self.base.device)).train()
        optimizer, rows = METHODS[name].optimizer(model, 1e-5), self.splits["train"][: self.s.rows]
        self.loss(model, rows, "lm").backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with meters.peak_memory(self.base.device) as peak:
            self.loss(model, rows, "lm").backward()
            optimizer.step()
        return {
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "stored": sum(tensor.numel() for tensor in stored_tensors(model).values()),
            "peak_bytes": peak.bytes,
        }

    def about(self) -> dict:
        """What there is to say without training."""
        nats, accuracy = self.measure(self.base, "test")
        table = self.base.get_input_embeddings()
        looked_up = table(torch.arange(min(4096, len(table.weight)), device=self.base.device))
        return {
            "lines": {package: len(texts) for package, texts in lines(self.s.length).items()},
            "answer_tokens": [len(answer) for answer in self.answers],
            "zero_shot": {"nats": nats, "accuracy": accuracy},
            "parameters": sum(p.numel() for p in self.base.parameters()),
            "embedding_std": looked_up.float().std().item(),
        }


_task: Task | None = None
_deadline = float("inf")


def _begin(name: str | None, s: Settings, where: torch.device, until: float) -> None:
    """In each process: a model of its own on the device."""
    global _task, _deadline
    torch.set_num_threads(1)
    model, tokenizer = stand_in() if name is None else models.load(name, torch.bfloat16, where=torch.device("cpu"))
    _task, _deadline = Task(model.to(where), tokenizer, s), until


def _work(job: tuple[Run, str]) -> tuple[float, float] | str | None:
    """Its scores; None if training broke down; a message if it failed or there was no time for it."""
    if time.time() > _deadline:
        return "no time"
    try:
        return _task.carry_out(*job)
    except Exception as error:  # one run's failure must not cost the others
        return message(error)


def _call(job: tuple[str, tuple]) -> dict:
    """A method of the process's task."""
    name, arguments = job
    try:
        return getattr(_task, name)(*arguments)
    except Exception as error:
        return {"failed": message(error)}


def spread(pool, runs: list[Run], split: str) -> dict[Run, tuple[float, float] | str | None]:
    """By size of the seed first: if time runs out, every method has its first seeds."""
    order = sorted(runs, key=lambda run: run.seed)
    found = dict(zip(order, pool.imap(_work, [(run, split) for run in order], chunksize=1), strict=True))
    for said in sorted({result for result in found.values() if isinstance(result, str)}):
        print("failed:", said, flush=True)
    return found


def measure(name: str | None, s: Settings, where: torch.device, workers: int, until: float) -> dict:
    started = time.time()
    # Not forked: libraries may have started CUDA here, and a fork of such a process can't use it.
    with multiprocessing.get_context("spawn").Pool(workers, _begin, (name, s, where, until)) as pool:
        about = pool.apply(_call, (("about", ()),))
        print(f"{about} after {time.time() - started:.0f} s", flush=True)
        wanted = [Run(n, "t-few", RATES[n] * factor, s.seeds[0], s.searched_at) for n in s.methods for factor in s.factors]
        tried: dict[str, dict[float, float]] = {method: {} for method in s.methods}
        for run, found in spread(pool, wanted, "validation").items():
            tried[run.method][run.rate] = found[0] if isinstance(found, tuple) else 99.0
        chosen = {method: min(scores, key=scores.get) for method, scores in tried.items()}
        print(f"rates after {time.time() - started:.0f} s: { ({n: f'{rate:.3g}' for n, rate in chosen.items()}) }", flush=True)
        final = [Run(n, "t-few", chosen[n], seed, size) for n in s.methods for size in s.sizes for seed in s.seeds]
        final += [Run(n, "lm", chosen[n], seed, size) for n in s.plain for size in s.sizes for seed in s.seeds]
        found = spread(pool, final, "test")
        costs = dict(zip(s.methods, pool.map(_call, [("costs", (method,)) for method in s.methods], chunksize=1), strict=True))
    rows = []
    for run, scores in found.items():
        if isinstance(scores, tuple):
            rows.append(dataclasses.asdict(run) | {"nats": scores[0], "accuracy": scores[1]})
        else:
            rows.append(dataclasses.asdict(run) | {"nats": None, "accuracy": None, "failed": scores or "diverged"})
    return rounded(
        {"model": Path(name).stem if name else "tiny, random", "settings": dataclasses.asdict(s), "packages": PACKAGES}
        | about
        | {
            "rates": chosen,
            "tried": {method: {f"{rate:.3g}": score for rate, score in sorted(scores.items())} for method, scores in tried.items()},
            "costs": costs,
            "runs": rows,
            "workers": workers,
            "seconds": time.time() - started,
        }
    )


def table(result: dict) -> str:
    settings, rows = result["settings"], []
    for method in settings["methods"]:
        for losses in ("t-few", "lm"):
            scores = {size: [] for size in settings["sizes"]}
            for row in result["runs"]:
                if (row["method"], row["losses"]) == (method, losses) and row["accuracy"] is not None:
                    scores[row["size"]].append(row["accuracy"])
            if any(scores.values()):
                cells = (f"{statistics.fmean(each):.3f} ({max(each) - min(each):.3f})" if each else None for each in scores.values())
                rows.append([f"{method}, {losses}", f"{result['rates'][method]:.3g}", *cells])
    costs = [(method, cost["parameters"], cost["stored"], show_bytes(cost["peak_bytes"])) for method, cost in result["costs"].items()]
    about = f"{result['model']}: accuracy without training {result['zero_shot']['accuracy']:.3f}; then the mean of the seeds (spread), "
    about += f"from so many examples; {result['seconds']:.0f} s on {result['workers']} processes"
    heads = ("method, losses", "rate", *(f"{size}" for size in settings["sizes"]))
    return "\n".join([wrapped(about), columns(heads, rows), "", columns(("", "trained", "stored", "peak"), costs)])


def stand_in() -> tuple[nn.Module, object]:
    """A tiny random Gemma with the course's tokenizer of bytes, for a dry run."""
    from benchmarks.gemma_lora import stand_in as gemma

    return gemma()


def main() -> None:
    given = options(
        "gemma_few_shot",
        __doc__,
        gpu=False,
        model={"help": "what course.lab.models.load takes (default with --smoke: tiny, random)"},
        workers={"type": int, "default": 8, "help": "processes that share the GPU"},
        until={"type": float, "default": float("inf"), "help": "Unix time after which no run starts"},
    )
    name = given.model or (None if given.smoke else "gemma-3-270m")
    result = measure(name, SMOKE if given.smoke else Settings(), given.device, 1 if given.smoke else given.workers, given.until)
    print("saved to", recorded.save("gemma_few_shot", result, given.out))
    print(table(result))


if __name__ == "__main__":
    main()
