"""Learning against forgetting on the tiny model: every method, setting and rate, over six seeds, compared at equal learning.

    python -m benchmarks.forgetting             # a minute or two on a GPU with --workers 8, an hour or two on a CPU
    python -m benchmarks.forgetting --smoke     # every path in seconds, no meaning

The tiny model knows the small world's general domain; it learns clinic notes. Along each run the losses on fresh text of both domains
are followed, in nats per token above the floor, and the share of facts that it still answers. What a method forgot is read where its loss
on clinic notes first reaches a level (``course.lab.forgetting``): a method that learns less would else look as if it forgot less.

- **Choice and report are apart.** At each level a method's setting and learning rate are those that forgot least with seed 0; reported
  are the five other seeds at that choice.
- **Old data.** Methods that need some draw from a reservoir of 512 rows of general text. The Fisher is taken of other rows.
- **One arithmetic.** All runs of a method are one stack (``course.lab.stacked``); a test holds a copy against the model trained alone
  and the penalties against ``reference.ewc`` and ``reference.rehearsal``.

Two more studies: *foreign*, general text with every word replaced by another one, a domain as far from pre-training as can be; and
*sequence*, clinic, legal and SQL one after the other.
"""

import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from benchmarks.cli import options
from course.lab import models, recorded
from course.lab.forgetting import at_equal_learning
from course.lab.stacked import Stack, StackedAdam, next_token_losses
from course.lab.tables import columns
from course.lab.world import World
from reference.ewc import fisher_diagonal
from reference.lora import inject_lora, lora_layers
from reference.rehearsal import ReplayBuffer, mix_batches

LENGTH = 40
LEVELS = (1.5, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)  # nats per token above the floor, on clinic notes
MOMENTS = (0, 4, 8, 12, 16, 20, 26, 32, 40, 50, 60, 75, 90, 110, 135, 160)
FULL_LRS, LORA_LRS = (3e-4, 1e-3, 3e-3), (2e-3, 5e-3, 1.2e-2)
OLD_ROWS = 4  # of general text in each step, where a method takes them beside the new batch
TEMPERATURE = 2.0
BOTH_ENDS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Sizes:
    seeds: int = 6  # the first chooses, the others are reported
    rows: int = 16
    moments: tuple[int, ...] = MOMENTS
    held_out: int = 48
    fisher_rows: int = 2048
    reservoir: int = 512
    values: int = 99  # at most so many settings of a method
    rates: int = 99  # and learning rates
    settings: tuple[float, ...] = ()  # these alone, if any
    only_rates: tuple[float, ...] = ()
    at_once: int = 256  # copies in a stack
    foreign: tuple[int, ...] = (0, 25, 50, 100, 200, 300)
    sequence_steps: int = 100


SMALL = Sizes(
    seeds=2, rows=2, moments=(0, 1, 2), held_out=2, fisher_rows=2, reservoir=4, values=1, rates=1, foreign=(0, 1), sequence_steps=2
)


@dataclass
class Step:
    """What a loss can look at; a leading axis of copies everywhere."""

    stack: Stack
    study: "Study"
    value: Tensor  # the setting, (copies,)
    ids: Tensor
    logits: Tensor
    loss: Tensor  # on the new batch, (copies,)
    old: Tensor | None  # (copies, rows, length) of general text


@dataclass(frozen=True)
class Method:
    """One way to learn clinic notes.

    Attributes:
        values: of its setting. lrs: learning rates that are tried.
        loss: from a :class:`Step` to the loss of each copy.
        ranks: of a copy's adapter, from its setting; None trains all weights.
        fraction: of rows that are replayed, from its setting.
        old_rows: of general text beside the batch.
        project: whether gradients are projected (A-GEM). lateral: a new column beside the frozen model.
    """

    name: str
    setting: str
    values: tuple[float, ...]
    lrs: tuple[float, ...] = FULL_LRS
    loss: Callable[[Step], Tensor] = field(default=lambda step: step.loss)
    ranks: Callable[[float], int] | None = None
    fraction: Callable[[float], float] | None = None
    old_rows: int = 0
    project: bool = False
    lateral: bool = False
    ends: bool | None = None  # whether embeddings and head train, if not as usual


def anchored(fisher: str | None) -> Callable[[Step], Tensor]:
    """λ/2 Σ F (θ − θ*)²; None: F = 1."""

    def loss(step: Step) -> Tensor:
        F_of = step.study.fishers[fisher] if fisher else {}
        rise = 0
        for name, p in step.stack.trained.items():
            square = (p - step.study.start[name]).square()
            rise = rise + (square * F_of[name] if fisher else square).flatten(1).sum(1)
        return step.loss + step.value / 2 * rise

    return loss


def anchored_update(step: Step) -> Tensor:
    """EWC on ΔW of adapters."""
    F_of = step.study.fishers["sampled"]
    rises = [(F_of[f"{name}.weight"] * step.stack.delta(name).square()).flatten(1).sum(1) for name in step.stack.linears()]
    return step.loss + step.value / 2 * torch.stack(rises).sum(0)


def anchored_factors(step: Step) -> Tensor:
    """EWC on A and B as parameters: F of A is zero where B is, and F of B is that of the first A."""
    squares = {name: step.stack.trained[f"{name}.lora_B"].square() for name in step.stack.linears()}
    rises = [(step.stack.factor_fisher[name] * square).flatten(1).sum(1) for name, square in squares.items()]
    return step.loss + step.value / 2 * torch.stack(rises).sum(0)


def distilled(rows: str) -> Callable[[Step], Tensor]:
    """The weight of distillation to the base, on old rows or on the new batch itself."""

    def loss(step: Step) -> Tensor:
        ids = step.old if rows == "old" else step.ids
        ours = step.stack(ids) if rows == "old" else step.logits
        theirs = step.study.base(ids)
        log_p, log_q = (F.log_softmax(x[:, :, :-1] / TEMPERATURE, -1) for x in (ours, theirs))
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).flatten(1).mean(1)
        return step.loss + step.value * TEMPERATURE**2 * kl

    return loss


def dark(step: Step) -> Tensor:
    """DER++: MSE of logits on half of the old rows, cross-entropy on the others; the setting is this weight, ten times the first."""
    half = step.old.shape[1] // 2
    logits = step.stack(step.old)
    stored = step.study.base(step.old[:, :half])
    mse = (logits[:, :half] - stored).square().flatten(1).mean(1)
    labels = next_token_losses(logits[:, half:], step.old[:, half:])
    return step.loss + 0.1 * step.value * mse + step.value * labels


def methods() -> list[Method]:
    r16, lambdas = (lambda value: 16), (1.0, 10.0, 100.0, 1000.0, 1e4, 1e5)
    fractions = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
    weights = (0.1, 0.3, 1.0, 3.0, 10.0)
    return [
        Method("full fine-tuning", "", (0.0,), (1e-4, *FULL_LRS)),
        Method("LoRA", "r", (1, 2, 4, 8, 16, 32, 64), (1e-3, *LORA_LRS), ranks=int),
        Method("LoRA, embeddings and head too", "r", (4, 16), (1e-3, 2e-3, 5e-3), ranks=int, ends=True),
        Method("full, embeddings and head fixed", "", (0.0,), (1e-4, *FULL_LRS), ends=False),
        Method("L2 to the start", "λ", (1e-3, 1e-2, 0.1, 1.0, 10.0), loss=anchored(None)),
        Method("EWC", "λ", lambdas, loss=anchored("sampled")),
        Method("EWC, batch Fisher", "λ", (1e3, 1e4, 1e5, 1e6, 1e7), loss=anchored("batch")),
        Method("replay", "share of old rows", fractions, fraction=float),
        Method("distillation, old text", "weight", weights, loss=distilled("old"), old_rows=OLD_ROWS),
        Method("distillation, new text", "weight", weights, loss=distilled("new")),
        Method("A-GEM", "", (0.0,), (1e-4, *FULL_LRS), old_rows=OLD_ROWS, project=True),
        Method("DER++", "weight", weights, loss=dark, old_rows=OLD_ROWS),
        Method("LoRA + EWC on ΔW", "λ", lambdas, LORA_LRS, loss=anchored_update, ranks=r16),
        Method("LoRA + EWC on A, B", "λ", lambdas, LORA_LRS, loss=anchored_factors, ranks=r16),
        Method("LoRA + replay", "share of old rows", fractions, LORA_LRS, ranks=r16, fraction=float),
        Method("progressive column", "", (0.0,), (1e-3, 3e-3, 6e-3), lateral=True),
    ]


Path = dict[str, list[float]]  # "new", "old", "facts": what was measured at each moment


@dataclass(frozen=True)
class Run:
    value: float
    lr: float
    seed: int


class Study:
    def __init__(self, sizes: Sizes, where: torch.device):
        self.sizes, self.where, self.world = sizes, where, World()
        self.model, _ = models.load("tiny", where=where)
        self.frozen = Stack(self.model, 1, ranks=[0])
        self.start = self.frozen.weights
        held_out = {domain: self.world.sample(domain, sizes.held_out, 48, 1_000_003) for domain in ("general", "clinic", "legal", "sql")}
        self.held_out = {domain: (ids.to(where), -self.world.log_probs(domain, ids).mean().item()) for domain, ids in held_out.items()}
        self.questions = self._questions()
        self.fishers = {kind: self._fisher(kind) for kind in ("sampled", "batch")}

    def base(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.frozen(ids)

    def _fisher(self, kind: str) -> dict[str, Tensor]:
        rows = self.world.sample("general", self.sizes.fisher_rows, LENGTH, 600_000).to(self.where)
        parts = [(ids[:, :-1], ids[:, 1:]) for ids in rows.split(self.sizes.rows if kind == "batch" else 64)]
        return fisher_diagonal(self.model, parts, kind, generator=torch.Generator().manual_seed(0))

    def factor_fisher(self, stack: Stack) -> dict[str, Tensor]:
        """F of B at B = 0, (copies, out, r): of an injected model with each copy's A. That of A is zero there."""
        found: dict[int, dict[str, Tensor]] = {}
        rows = self.world.sample("general", max(2, self.sizes.fisher_rows // 8), LENGTH, 600_000).to(self.where)
        parts = [(ids[:, :-1], ids[:, 1:]) for ids in rows.split(64)]
        for copy, seed in enumerate(stack.seeds):
            if seed in found:
                continue
            model, _ = models.load("tiny", where=self.where)
            inject_lora(model, 16, 32)  # the rank of all copies that are anchored so
            for name, layer in lora_layers(model):
                layer.lora_A.data = stack.trained[f"{name}.lora_A"][copy].detach().clone()
            fisher = fisher_diagonal(model, parts, "sampled", generator=torch.Generator().manual_seed(0))
            found[seed] = {name: fisher[f"{name}.lora_B"] for name, _ in lora_layers(model)}
        return {name: torch.stack([found[seed][name] for seed in stack.seeds]) for name in stack.linears()}

    # data

    @functools.cache  # noqa: B019  a study lives as long as its process
    def batches(self, domain: str, seed: int, steps: int) -> list[Tensor]:
        return [self.world.sample(domain, self.sizes.rows, LENGTH, 1000 * seed + step) for step in range(steps)]

    def reservoir(self, seed: int) -> ReplayBuffer:
        buffer = ReplayBuffer(self.sizes.reservoir, seed)
        buffer.add(self.world.sample("general", 2 * self.sizes.reservoir, LENGTH, 700_000 + seed))
        return buffer

    def stream(self, method: Method, runs: list[Run], steps: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(ids, old rows) of each step, both with an axis of copies."""
        buffers = {run.seed: self.reservoir(run.seed) for run in runs}
        new = {seed: self.batches("clinic", seed, steps) for seed in buffers}
        if method.fraction:
            each = [mix_batches(new[run.seed], self.reservoir(run.seed).sample, method.fraction(run.value)) for run in runs]
        else:
            each = [iter(new[run.seed]) for run in runs]
        for _ in range(steps):
            ids = torch.stack([next(one) for one in each])
            old = None
            if method.old_rows:
                drawn = {seed: buffer.sample(min(method.old_rows, len(buffer))) for seed, buffer in buffers.items()}
                old = torch.stack([drawn[run.seed] for run in runs]).to(self.where)
            yield ids.to(self.where), old

    # measures

    def _questions(self) -> list[tuple[Tensor, Tensor]]:
        """Facts as (ids (questions, length), answers), a tensor for each length."""
        found: dict[int, list] = {}
        for question, answer in self.world.facts():
            ids = self.world.tokenizer(question).input_ids
            found.setdefault(len(ids), []).append((ids, self.world.ids[answer]))
        return [
            (torch.tensor([q for q, _ in pairs], device=self.where), torch.tensor([a for _, a in pairs], device=self.where))
            for pairs in found.values()
        ]

    @torch.no_grad()
    def above_floor(self, stack: Stack, domain: str, as_seen: Callable[[Tensor], Tensor] = lambda ids: ids) -> list[float]:
        ids, floor = self.held_out[domain]
        rows = as_seen(ids).expand(stack.copies, *ids.shape)
        parts = [next_token_losses(stack(part), part) * part.shape[1] for part in rows.split(16, dim=1)]
        return (torch.stack(parts).sum(0) / len(ids) - floor).tolist()

    @torch.no_grad()
    def facts(self, stack: Stack) -> list[float]:
        right = total = 0
        for ids, answers in self.questions:
            best = stack(ids.expand(stack.copies, *ids.shape))[:, :, -1].argmax(-1)  # (copies, questions)
            right, total = right + (best == answers).sum(1), total + len(answers)
        return (right / total).tolist()

    # one stack of runs

    def stack_of(self, method: Method, runs: list[Run]) -> Stack:
        seeds = [run.seed for run in runs]
        if method.lateral:  # a column with weights of its own, drawn by its seed
            fresh = []
            for seed in seeds:
                torch.manual_seed(seed)
                fresh.append(LlamaForCausalLM(self.model.config).to(self.where))
            return Stack(fresh, len(runs), seeds=seeds, lateral=self.model)
        ranks = [method.ranks(run.value) for run in runs] if method.ranks else None
        also, fixed = (BOTH_ENDS if method.ends else ()), (BOTH_ENDS if method.ends is False else ())
        stack = Stack(self.model, len(runs), ranks=ranks, seeds=seeds, also=also, fixed=fixed)
        if method.loss is anchored_factors:
            stack.factor_fisher = self.factor_fisher(stack)
        return stack

    def train(self, method: Method, runs: list[Run], moments: tuple[int, ...], watch: Callable[[Stack], None]) -> Stack:
        """Train a stack of ``runs`` on clinic notes; ``watch`` is called at ``moments``, which are numbers of steps done."""
        stack = self.stack_of(method, runs)
        optimizer = StackedAdam(stack, [run.lr for run in runs])
        value = torch.tensor([float(run.value) for run in runs], device=self.where)
        if 0 in moments:
            watch(stack)
        for done, (ids, old) in enumerate(self.stream(method, runs, moments[-1]), 1):
            logits = stack(ids)
            step = Step(stack, self, value, ids, logits, next_token_losses(logits, ids), old)
            leaves = list(stack.trained.values())
            gradients = torch.autograd.grad(method.loss(step).sum(), leaves)
            if method.project:
                reference = torch.autograd.grad(next_token_losses(stack(old), old).sum(), leaves)
                gradients = projected(gradients, reference)
            optimizer.step(gradients)
            if done in moments:
                watch(stack)
        return stack

    def trajectories(self, method: Method, runs: list[Run]) -> dict[str, dict[Run, Path]]:
        """Of each run the losses on both domains and the facts, at each moment; of some methods the straight way back, too."""
        s = self.sizes
        found: dict[str, dict[Run, Path]] = {}
        for first in range(0, len(runs), s.at_once):
            part = runs[first : first + s.at_once]
            paths = {run: {"new": [], "old": [], "facts": []} for run in part}
            untouched = [self.above_floor(self.frozen, "general") * len(part), [1.0] * len(part)] if method.lateral else None

            def watch(stack: Stack, paths=paths, untouched=untouched) -> None:
                note(paths, self.above_floor(stack, "clinic"), *(untouched or (self.above_floor(stack, "general"), self.facts(stack))))

            stack = self.train(method, part, s.moments, watch)
            found.setdefault(method.name, {}).update(paths)
            if method.name in ("full fine-tuning", "LoRA"):
                found.setdefault(f"{method.name}, scaled back", {}).update(self.way_back(method, part, stack))
        return found

    @torch.no_grad()
    def way_back(self, method: Method, runs: list[Run], stack: Stack) -> dict[Run, Path]:
        """The same measures along the straight way from the start to the end of each run: (1 − t) θ₀ + t θ₁."""
        ends = {key: p.detach().clone() for key, p in stack.trained.items()}
        paths: dict[Run, Path] = {run: {"new": [], "old": [], "facts": []} for run in runs}
        for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            for key, p in stack.trained.items():
                if not method.ranks:
                    p.copy_(torch.lerp(self.start[key].expand_as(p), ends[key], share))
                elif key.endswith("lora_B"):
                    p.copy_(share * ends[key])
            note(paths, self.above_floor(stack, "clinic"), self.above_floor(stack, "general"), self.facts(stack))
        return paths

    # the frontier

    def frontier(self, name: str) -> dict:
        """One method: every setting and rate with seed 0, then the choices of that with the other seeds."""
        method, s = next(m for m in methods() if m.name == name), self.sizes
        base = self.above_floor(self.frozen, "general")[0]
        values, lrs = s.settings or method.values[: s.values], s.only_rates or method.lrs[: s.rates]
        tried = [Run(value, lr, 0) for value in values for lr in lrs]
        found = self.trajectories(method, tried)
        chosen = {choice for paths in found.values() for choice in [*choices(paths).values(), *learned_most(paths).values()]}
        reported = [Run(value, lr, seed) for value, lr in sorted(chosen) for seed in range(1, s.seeds)]
        for kind, paths in self.trajectories(method, reported).items():
            found[kind].update(paths)
        rows: dict[str, list[dict]] = {"levels": [], "settings": []}
        for kind, paths in found.items():
            about = {"method": kind, "setting": method.setting}
            rows["levels"] += [about | row for row in at_levels(paths, base)]
            rows["settings"] += [about | row for row in at_the_end(paths, base)]
        return rows | {"base": {"old": base, "new": self.above_floor(self.frozen, "clinic")[0]}}

    # far from pre-training

    def foreign(self, name: str) -> dict:
        """General text in a language of its own: every word is another one, by a fixed permutation."""
        words = torch.arange(3, len(self.world.vocabulary))
        order = words[torch.randperm(len(words), generator=torch.Generator().manual_seed(0))]
        mapping = torch.cat([torch.arange(3), order]).to(self.where)
        s, (r, also, lrs) = self.sizes, FOREIGN[name]
        first = self.foreign_runs(r, also, [(lr, 0) for lr in lrs[: s.rates]], mapping)
        best = min(first, key=lambda choice: first[choice]["left"][-1])[0]
        found = self.foreign_runs(r, also, [(best, seed) for seed in range(1, s.seeds)], mapping).values()
        row = {"method": name, "lr": best, "trained": next(iter(found))["trained"], "steps": list(s.foreign)}
        return row | {key: [each[key] for each in found] for key in ("left", "old", "facts")}

    def foreign_runs(self, r: int | None, also: tuple[str, ...], runs: list[tuple[float, int]], mapping: Tensor) -> dict:
        """(rate, seed) -> what is left to learn at each moment, and the general domain at the end."""
        s, seeds, left = self.sizes, [seed for _, seed in runs], []
        stack = Stack(self.model, len(runs), ranks=[r] * len(runs) if r else None, seeds=seeds, also=also)
        optimizer = StackedAdam(stack, [lr for lr, _ in runs])
        data = [self.batches("general", 300 + seed, s.foreign[-1]) for seed in seeds]
        for step in range(s.foreign[-1] + 1):
            if step in s.foreign:
                left.append(self.above_floor(stack, "general", lambda ids: mapping[ids]))
            if step == s.foreign[-1]:
                break
            ids = mapping[torch.stack([each[step] for each in data]).to(self.where)]
            loss = next_token_losses(stack(ids), ids).sum()
            optimizer.step(torch.autograd.grad(loss, list(stack.trained.values())))
        old, facts = self.above_floor(stack, "general"), self.facts(stack)
        trained = sum(p[0].numel() for p in stack.trained.values())
        return {
            run: {"left": [moment[i] for moment in left], "old": old[i], "facts": facts[i], "trained": trained}
            for i, run in enumerate(runs)
        }

    # task after task

    def sequence(self, name: str) -> dict:
        """clinic, legal, sql: what is left of each, and of general, after the last."""
        s, tasks = self.sizes, ("clinic", "legal", "sql")
        method = next(m for m in in_sequence() if m.name == name)
        tried = [Run(value, lr, 0) for value in method.values[: s.values] for lr in s.only_rates or method.lrs[: s.rates]]
        first = self.sequence_runs(method, tried, tasks)
        best = min(tried, key=lambda run: sum(first[run][domain] for domain in ("general", *tasks)))
        reported = [Run(best.value, best.lr, seed) for seed in range(1, s.seeds)]
        found = self.sequence_runs(method, reported, tasks).values()
        row = {"method": method.name, "value": best.value, "lr": best.lr}
        return row | {key: [each[key] for each in found] for key in ("general", *tasks, "facts", "when learned")}

    def sequence_runs(self, method: Method, runs: list[Run], tasks: tuple[str, ...]) -> dict[Run, dict]:
        """Of each run the losses on all domains after the last task, and on each task when it was learned."""
        stack = self.stack_of(method, runs)
        stack.earlier, stack.rehearsed, stack.centre, learned = [], [], None, []
        for i, task in enumerate(tasks):
            stack.rehearsed = ["general", *tasks[:i]]
            if method.loss is online:
                self.consolidate(stack, stack.rehearsed[-1])
            self.train_on(method, runs, task, stack, seeds=[1000 + 10 * i + run.seed for run in runs])
            learned.append(self.above_floor(stack, task))
            if method.name.startswith("an adapter for each") and task != tasks[-1]:
                stack.earlier.append(stack.merge_and_restart([50 * (i + 1) + run.seed for run in runs]))
        final = {domain: self.above_floor(stack, domain) for domain in ("general", *tasks)} | {"facts": self.facts(stack)}
        return {
            run: {key: values[i] for key, values in final.items()} | {"when learned": [each[i] for each in learned]}
            for i, run in enumerate(runs)
        }

    def train_on(self, method: Method, runs: list[Run], task: str, stack: Stack, seeds: list[int]) -> None:
        """One task of a sequence; replay draws from all earlier tasks, general included."""
        s = self.sizes
        optimizer = StackedAdam(stack, [run.lr for run in runs])
        value = torch.tensor([float(run.value) for run in runs], device=self.where)
        new = {seed: self.batches(task, seed, s.sequence_steps) for seed in set(seeds)}
        each = [iter(new[seed]) for seed in seeds]
        if method.fraction:
            shares = [method.fraction(run.value) for run in runs]
            each = [
                mix_batches(new[seed], self.past(stack.rehearsed, seed).sample, share) for seed, share in zip(seeds, shares, strict=True)
            ]
        for _ in range(s.sequence_steps):
            ids = torch.stack([next(one) for one in each]).to(self.where)
            logits = stack(ids)
            step = Step(stack, self, value, ids, logits, next_token_losses(logits, ids), None)
            optimizer.step(torch.autograd.grad(method.loss(step).sum(), list(stack.trained.values())))

    def past(self, domains: list[str], seed: int) -> ReplayBuffer:
        buffer = ReplayBuffer(self.sizes.reservoir, seed)
        for domain in domains:
            buffer.add(self.world.sample(domain, self.sizes.reservoir, LENGTH, 800_000 + seed))
        return buffer

    def consolidate(self, stack: Stack, learned: str) -> None:
        """Online EWC: add the Fisher of the task that was just learned, copy by copy, and move the centre."""
        fishers: list[dict[str, Tensor]] = []
        rows = self.world.sample(learned, max(2, self.sizes.fisher_rows // 8), LENGTH, 610_000).to(self.where)
        parts = [(ids[:, :-1], ids[:, 1:]) for ids in rows.split(64)]
        model, _ = models.load("tiny", where=self.where)
        for copy in range(1 if stack.centre is None else stack.copies):
            model.load_state_dict({name: W[min(copy, len(W) - 1)].detach() for name, W in stack.weights.items()})
            fishers.append(fisher_diagonal(model, parts, "sampled", generator=torch.Generator().manual_seed(0)))
        new = {name: torch.stack([each[name] for each in fishers]) for name in stack.trained}
        stack.fisher = new if stack.centre is None else {name: stack.fisher[name] + new[name] for name in new}
        stack.centre = {name: p.detach().clone() for name, p in stack.trained.items()}


def in_sequence() -> list[Method]:
    """Ways to learn three tasks in a row."""

    def r16(value: float) -> int:
        return 16

    return [
        Method("full fine-tuning", "", (0.0,), (1e-3, 3e-3)),
        Method("full fine-tuning + online EWC", "λ", (1.0, 10.0, 100.0), (1e-3, 3e-3), loss=online),
        Method("full fine-tuning + replay 10 %", "", (0.1,), (1e-3, 3e-3), fraction=float),
        Method("one adapter for all", "", (0.0,), (5e-3, 1.2e-2), ranks=r16),
        Method("an adapter for each", "", (0.0,), (5e-3, 1.2e-2), ranks=r16),
        Method("an adapter for each, O-LoRA", "λ", (0.001, 0.01, 0.1, 1.0), (5e-3, 1.2e-2), loss=apart, ranks=r16),
        Method("an adapter for each + replay 10 %", "", (0.1,), (5e-3, 1.2e-2), ranks=r16, fraction=float),
    ]


FOREIGN = {  # method -> rank, what else trains, rates
    "full fine-tuning": (None, (), (3e-4, 1e-3, 3e-3)),
    **{f"LoRA r={r}": (r, (), (2e-3, 5e-3, 1.2e-2)) for r in (1, 4, 16, 64)},
    "LoRA r=16 + embeddings and head": (16, BOTH_ENDS, (2e-3, 5e-3, 1.2e-2)),
}


def online(step: Step) -> Tensor:
    rises = [(step.stack.fisher[name] * (p - step.stack.centre[name]).square()).flatten(1).sum(1) for name, p in step.stack.trained.items()]
    return step.loss + step.value / 2 * torch.stack(rises).sum(0)


def apart(step: Step) -> Tensor:
    """O-LoRA: Σ |A_old · A_newᵀ| over layers and earlier adapters."""
    if not step.stack.earlier:
        return step.loss
    total = 0
    for old in step.stack.earlier:
        for name, A in old.items():
            total = total + (A @ step.stack.trained[f"{name}.lora_A"].transpose(1, 2)).abs().flatten(1).sum(1)
    return step.loss + step.value * total


def projected(gradients: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> list[Tensor]:
    """A-GEM for each copy."""
    along = torch.stack([(g * ref).flatten(1).sum(1) for g, ref in zip(gradients, reference, strict=True)]).sum(0)
    size = torch.stack([ref.flatten(1).square().sum(1) for ref in reference]).sum(0)
    factor = torch.where(along < 0, along / size.clamp(min=1e-30), 0.0)
    return [g - factor.view(-1, *[1] * (g.dim() - 1)) * ref for g, ref in zip(gradients, reference, strict=True)]


def note(paths: dict[Run, Path], new: list[float], old: list[float], facts: list[float]) -> None:
    for path, *values in zip(paths.values(), new, old, facts, strict=True):
        for key, value in zip(("new", "old", "facts"), values, strict=True):
            path[key].append(value)


def choices(paths: dict[Run, Path]) -> dict[float, tuple[float, float]]:
    """Level -> the setting and rate that forgot least there, with seed 0; levels that none reaches are left out."""
    found = {}
    for level in LEVELS:
        first = {(run.value, run.lr): at_equal_learning(p["new"], p["old"], level) for run, p in paths.items() if run.seed == 0}
        if reached := {choice: old for choice, old in first.items() if old is not None}:
            found[level] = min(reached, key=reached.get)
    return found


def learned_most(paths: dict[Run, Path]) -> dict[float, tuple[float, float]]:
    """Setting -> itself and the rate that ended lowest on the new task, with seed 0."""
    ends = {(run.value, run.lr): p["new"][-1] for run, p in paths.items() if run.seed == 0}
    return {value: min((c for c in ends if c[0] == value), key=ends.get) for value in {choice[0] for choice in ends}}


def others(paths: dict[Run, Path], choice: tuple[float, float]) -> list[Path]:
    return [path for run, path in paths.items() if (run.value, run.lr) == choice and run.seed > 0]


def at_levels(paths: dict[Run, Path], base: float) -> Iterator[dict]:
    """What the other seeds forgot at each level, at the choice of seed 0; a level that one of them never reaches is left out."""
    for level, choice in choices(paths).items():
        ways = others(paths, choice)
        old, facts = ([at_equal_learning(p["new"], p[key], level) for p in ways] for key in ("old", "facts"))
        if None not in old:
            about = {"level": level, "value": choice[0], "lr": choice[1]}
            yield about | {"forgotten": [each - base for each in old], "facts": facts}


def at_the_end(paths: dict[Run, Path], base: float) -> Iterator[dict]:
    """Each setting at the rate that learned most: losses at the end, forgetting at each level, and one seed's whole path."""
    for value, choice in sorted(learned_most(paths).items()):
        ways = others(paths, choice)
        at = {str(level): [at_equal_learning(p["new"], p["old"], level) for p in ways] for level in LEVELS}
        forgotten = {level: [v - base for v in values] for level, values in at.items() if None not in values}
        ends = {key: [p[key][-1] for p in ways] for key in ("new", "old", "facts")}
        yield {"value": value, "lr": choice[1], **ends, "forgotten": forgotten, "path": ways[0]}


@functools.cache
def study_of(sizes: Sizes, kind: str) -> Study:
    """One a process."""
    torch.set_float32_matmul_precision("high")  # TF32 where there is one
    return Study(sizes, torch.device(kind))


def work(part: str, name: str, sizes: Sizes, kind: str) -> tuple[str, str, dict, float]:
    """One method of one part, in a process of its own or not."""
    began, study = time.perf_counter(), study_of(sizes, kind)
    return part, name, getattr(study, part)(name), time.perf_counter() - began


PARTS = ("frontier", "foreign", "sequence")


def jobs(only: list[str] | None) -> list[tuple[str, str]]:
    """(part, method), the longest first."""
    found = [("frontier", m.name) for m in methods()] + [("foreign", n) for n in FOREIGN] + [("sequence", m.name) for m in in_sequence()]
    long = ("LoRA", "full fine-tuning + online EWC", "LoRA r=64")
    chosen = [job for job in found if not only or job[0] in only or job[1] in only]
    return sorted(chosen, key=lambda job: job[1] not in long)


def measure(
    sizes: Sizes, where: torch.device, only: list[str] | None = None, workers: int = 1, keep: Callable[[dict], object] = lambda result: None
) -> dict:
    """All parts, or those of ``only``; ``keep`` gets what there is after each. Processes share a GPU that one of them leaves idle."""
    result = {
        "steps": list(sizes.moments),
        "rows": sizes.rows,
        "length": LENGTH,
        "reported_seeds": sizes.seeds - 1,
        "reservoir": sizes.reservoir,
        "fisher_rows": sizes.fisher_rows,
        "frontier": {"levels": [], "settings": []},
        "foreign": [],
        "sequence": [],
    }

    def take(part: str, name: str, found: dict, seconds: float) -> None:
        if part == "frontier":
            for key in ("levels", "settings"):
                result[part][key] += found[key]
            result[part]["base"] = found["base"]
        else:
            result[part].append(found)
        print(f"{part:10}{name:36}{seconds:7.1f} s", flush=True)
        keep(result)

    if workers == 1:
        for job in jobs(only):
            take(*work(*job, sizes, where.type))
        return result
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(work, *job, sizes, where.type) for job in jobs(only)]):
            take(*done.result())
    return result


def shortened(value):
    """Five significant digits: the record is read by people, too."""
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shortened(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(result: dict) -> str:
    def mean(values: list[float]) -> str:
        return f"{statistics.fmean(values):.3f}" if values else ""

    levels = [level for level in (0.5, 0.25, 0.12) if any(row["level"] == level for row in result["frontier"]["levels"])]
    by = {(row["method"], row["level"]): row for row in result["frontier"]["levels"]}
    rows = []
    for method in dict.fromkeys(method for method, _ in by):
        found = [by.get((method, level)) for level in levels]
        if any(found):
            rows.append([method])
            for row in found:
                rows[-1] += [mean(row["forgotten"]), f"{row['value']:g}" * bool(row["setting"])] if row else ["", ""]
    heads = [each for level in levels for each in (f"at {level}", "set")]
    parts = ["nats of the general text lost when the new one is so many nats above the floor,\nand the method's setting"]
    parts[0] += "\n" + columns(("", *heads), rows)
    if result["foreign"]:
        left = [(row["method"], row["trained"], mean([each[-1] for each in row["left"]]), mean(row["old"])) for row in result["foreign"]]
        parts.append(columns(("a foreign text: nats left at the end", "trained", "new", "old"), left))
    if result["sequence"]:
        domains = ("general", "clinic", "legal", "sql")
        left = [(row["method"], *(mean(row[domain]) for domain in domains)) for row in result["sequence"]]
        parts.append(columns(("three domains in a row: nats at the end", *domains), left))
    return "\n\n".join(parts)


def main() -> None:
    given = options(
        "forgetting",
        __doc__,
        gpu=False,
        only={"nargs": "+", "help": f"parts of the study ({', '.join(PARTS)}) or methods"},
        workers={"type": int, "default": 1, "help": "processes; on a GPU 8 keep it busy"},
        seeds={"type": int, "help": "the first chooses, the others are reported (default: 6)"},
        settings={"type": float, "nargs": "+", "default": (), "help": "only these values of a method's setting"},
        rates={"type": float, "nargs": "+", "default": (), "help": "only these learning rates"},
    )
    paths = []

    def keep(result: dict) -> None:
        paths.append(recorded.save("forgetting", shortened(result), given.out, given.device))

    sizes = SMALL if given.smoke else Sizes()
    sizes = replace(sizes, seeds=given.seeds or sizes.seeds, settings=tuple(given.settings), only_rates=tuple(given.rates))
    result = measure(sizes, given.device, given.only, given.workers, keep)
    print(table(result))
    print("saved to", paths[-1])


if __name__ == "__main__":
    main()
