"""What a real model forgets when it learns a narrow domain: Gemma 3 270M on clinic notes, by five methods.

    python -m benchmarks.gemma_forgetting --model gemma-3-270m      # one GPU, three minutes with loading
    python -m benchmarks.gemma_forgetting --smoke                   # a tiny random model on a CPU: every path, no meaning

The domain is the small world's clinic notes, written out: eight diseases, each with its drug, dose and rhythm, in one form of sentence.
Their exact probabilities are known, so that what is left to learn is stated in nats per *word* above the floor. What was forgotten is
asked in English: passages that the model has not seen (nats per token), facts and grammatical pairs (``course.lab.probes``).

- **Nobody has Gemma's pre-training data**, so "old" rows, for replay and for the Fisher, are the model's own: sampled from <bos>, token by
  token. Of such rows the labels are drawn from the model, so that the empirical Fisher is an unbiased estimate of the exact one.
- **Equal learning.** Losses are followed along the run; methods are compared where they have learned as much (``course.lab.forgetting``):
  at the lowest level that all of them reach.
- **Nothing is chosen.** Every plan is run with every seed and all of it is recorded; the rates are a factor of three apart.
- Precision as in ``benchmarks.gemma_lora``: float32 weights, bfloat16 autocast in training, measures in float32.
"""

import copy
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.cli import message, options, rounded
from benchmarks.gemma_lora import InBfloat16, asked_for
from course.lab import probes, recorded, seed_everything, text
from course.lab.tables import columns, wrapped
from course.lab.training import next_token_loss, warmup_cosine
from course.lab.world import World
from reference.ewc import EWC, fisher_diagonal
from reference.lora import inject_lora, lora_layers, trainable_parameters
from reference.rehearsal import ReplayBuffer, mix_batches


@dataclasses.dataclass(frozen=True)
class Settings:
    length: int = 128  # tokens of a row
    rows: int = 8
    moments: tuple[int, ...] = (0, 4, 9, 17, 32)  # steps done when losses are read
    notes: int = 6  # in a document
    documents: int = 700  # of training
    held_out: int = 12
    own_rows: int = 96  # sampled from the model
    seeds: tuple[int, ...] = (0, 1, 2)
    probe_step: int = 2  # every how many questions are asked
    batch_tokens: int = 8192


QUICK = Settings(24, 2, (0, 1), 1, 12, 2, 3, (0,), 160, 512)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to learn: ``lam`` of EWC, ``fraction`` of replay, ``r`` of LoRA."""

    method: str
    lr: float
    lam: float = 0.0
    fraction: float = 0.0
    r: int = 0


def plans() -> list[Plan]:
    return [
        Plan("full fine-tuning", 1e-4),
        Plan("LoRA r=16", 1e-3, r=16),
        Plan("replay 10 %", 1e-4, fraction=0.1),
        Plan("EWC", 1e-4, lam=100.0),
        Plan("full fine-tuning", 3e-5),
        Plan("LoRA r=16", 3e-4, r=16),
        Plan("LoRA r=16 + replay 10 %", 1e-3, fraction=0.1, r=16),
    ]


class Benchmark:
    def __init__(self, model: nn.Module, tokenizer, settings: Settings, deadline: float):
        self.base, self.tokenizer, self.settings = model.eval().requires_grad_(False), tokenizer, settings
        self.where, self.world = next(model.parameters()).device, World()
        self.deadline, self.longest = deadline, 0.0
        s = settings
        self.train_rows = text.pack(tokenizer, dict(enumerate(self.notes(s.documents, 1)[0])), s.length)
        self.held_out, self.floor, self.words = self.notes(s.held_out, 10**6)
        self.passages = list(text.prose_documents("passages").values())[:: max(1, s.probe_step // 10)]
        self.facts, self.pairs = probes.cloze_facts()[:: s.probe_step], probes.minimal_pairs()[:: s.probe_step]
        self.own = self.sampled()
        self.fisher: dict[str, Tensor] | None = None
        self.runs: list[dict] = []

    def notes(self, documents: int, seed: int) -> tuple[list[str], float, int]:
        """Documents of whole notes, the nats that the source itself puts into them, and their words."""
        written, nats, words = [], 0.0, 0
        for i in range(documents):
            ids = self.world.sample("clinic", 1, 20 * self.settings.notes + 40, seed + i)[0]
            told, logs = self.world.text(ids).split(), self.world.log_probs("clinic", ids[None])[0]
            ends = [j for j, word in enumerate(told) if word == "."][: self.settings.notes]
            whole = ends[-1] + 1
            written.append(as_english(told[:whole]))
            nats, words = nats - logs[:whole].sum().item(), words + whole
        return written, nats, words

    @torch.no_grad()
    def sampled(self) -> Tensor:
        """Rows of the base's own text, (own_rows, length), each from <bos>."""
        s = self.settings
        torch.manual_seed(0)
        first = torch.full((s.own_rows, 1), self.tokenizer.bos_token_id, device=self.where)
        out = self.base.generate(
            input_ids=first,
            attention_mask=torch.ones_like(first),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            min_new_tokens=s.length - 1,
            max_new_tokens=s.length - 1,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return out.cpu()

    def take_fisher(self) -> dict:
        """Of the base, from its own rows, one at a time: per predicted token."""
        began = time.monotonic()
        model = self.base.requires_grad_(True)
        rows = [(row[None, :-1].to(self.where), row[None, 1:].to(self.where)) for row in self.own]
        self.fisher = fisher_diagonal(model, rows, "empirical")
        self.base.requires_grad_(False)
        total = sum(F.sum().item() for F in self.fisher.values())
        return {"seconds": time.monotonic() - began, "rows": len(rows), "sum": total}

    # measures

    def losses(self, model: nn.Module) -> tuple[float, float]:
        """Clinic notes in nats per word above the floor; English passages in nats per token."""
        tokens = self.settings.batch_tokens
        window = {"window": 512, "stride": 256, "batch_tokens": tokens}
        clinic = probes.perplexity(model, self.tokenizer, self.held_out, **window)
        prose = probes.perplexity(model, self.tokenizer, self.passages, **window)
        return (clinic.nats - self.floor) / self.words, prose.nats_per_token

    def probe(self, model: nn.Module) -> dict:
        tokens = self.settings.batch_tokens
        facts = probes.cloze_accuracy(model, self.tokenizer, self.facts, batch_tokens=tokens)
        pairs = probes.minimal_pair_accuracy(model, self.tokenizer, self.pairs, batch_tokens=tokens)
        return {"facts": facts.accuracy, "facts_nats": facts.nats, "pairs": pairs.accuracy, "pairs_nats": pairs.nats}

    # runs

    def batches(self, seed: int, fraction: float) -> Iterator[Tensor]:
        s = self.settings
        order = torch.randperm(len(self.train_rows), generator=torch.Generator().manual_seed(seed))
        steps = range(s.moments[-1])
        new = (self.train_rows[order[torch.arange(i * s.rows, (i + 1) * s.rows) % len(order)]] for i in steps)
        buffer = ReplayBuffer(s.own_rows, seed)
        buffer.add(self.own)
        return mix_batches(new, buffer.sample, fraction)

    def run(self, plan: Plan, seed: int) -> bool:
        """Train a copy of the base: losses at the moments, and the probes at the end. False where time has run out."""
        if time.time() + 1.1 * self.longest > self.deadline:
            return False
        began, s = time.monotonic(), self.settings
        seed_everything(seed)
        gc.collect()
        model = copy.deepcopy(self.base).requires_grad_(True)
        if plan.r:
            inject_lora(model, plan.r, 2 * plan.r)
        ewc = EWC(model, self.fisher, plan.lam) if plan.lam else None
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=plan.lr, weight_decay=0.0, fused=self.where.type == "cuda")
        wrapped, schedule, path = InBfloat16(model), warmup_cosine(), []
        for step, batch in enumerate(self.batches(seed, plan.fraction)):
            if step in s.moments:
                path.append(self.losses(model.eval()))
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * max(schedule(step / s.moments[-1]), 0.1)
            loss = next_token_loss(wrapped, batch.to(self.where))
            loss = loss + ewc.penalty() if ewc else loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        optimizer = None
        model.zero_grad(set_to_none=True)
        path.append(self.losses(model.eval()))
        run = dataclasses.asdict(plan) | {"seed": seed, "parameters": trainable_parameters(model)[0]}
        run |= {"new": [new for new, _ in path], "old": [old for _, old in path]}
        run |= self.probe(model)
        if plan.r and not plan.fraction and seed == s.seeds[0]:
            run["scaled"] = self.scaled_back(model)
        self.runs.append(run)
        self.longest = max(self.longest, time.monotonic() - began)
        what = f"{plan.method:24} lr {plan.lr:<7g} λ {plan.lam:<6g} seed {seed}"
        ends = f"new {run['new'][-1]:7.4f}  old {run['old'][-1]:.4f}  facts {run['facts']:.3f}  pairs {run['pairs']:.3f}"
        print(f"{what}  {ends}  {time.monotonic() - began:.1f} s", flush=True)
        return True

    @torch.no_grad()
    def scaled_back(self, model: nn.Module) -> dict:
        """The same losses with the adapter's scale times a share; at 0 the base must be back, bit for bit."""
        layers = [layer for _, layer in lora_layers(model)]
        full, found = [layer.scaling for layer in layers], {"share": [], "new": [], "old": []}
        ids = self.train_rows[:2].to(self.where)
        for share in (0.0, 0.25, 0.5, 0.75):
            for layer, scale in zip(layers, full, strict=True):
                layer.scaling = share * scale
            new, old = self.losses(model)
            found["share"].append(share)
            found["new"].append(new)
            found["old"].append(old)
            if share == 0:
                found["base_is_back"] = torch.equal(model(input_ids=ids).logits, self.base(input_ids=ids).logits)
        for layer, scale in zip(layers, full, strict=True):
            layer.scaling = scale
        return found

    def execute(self, keep: Callable[[dict], object]) -> None:
        """Every plan with every seed, seed by seed; ``keep`` gets what there is after each run."""
        for seed in self.settings.seeds:
            for plan in plans():
                if plan.lam and self.fisher is None:
                    continue
                if not self.run(plan, seed):
                    return
                # Where all have been: the end of the run that learned least.
                keep({"level": 1.01 * max(run["new"][-1] for run in self.runs), "runs": self.runs})


def as_english(words: list[str]) -> str:
    """Sentences with capitals, and marks set as in print: "Patient ada reports fever for 3 days: likely flu; give …"."""
    told = " ".join(words)
    for mark in (".", ";", ":"):
        told = told.replace(f" {mark}", mark)
    return ". ".join(sentence[:1].upper() + sentence[1:] for sentence in told.split(". "))


def table(result: dict) -> str:
    base, rows = result["base"], []
    rows.append(("before", "", base["new"], base["old"], *(f"{base[key]:.1%}" for key in ("facts", "pairs")), ""))
    for method, lr in dict.fromkeys((run["method"], run["lr"]) for run in result["runs"] if "new" in run):
        runs = [run for run in result["runs"] if (run["method"], run["lr"]) == (method, lr) and "new" in run]
        ends = (statistics.fmean(run[key][-1] for run in runs) for key in ("new", "old"))
        known = (f"{statistics.fmean(run[key] for run in runs):.1%}" for key in ("facts", "pairs"))
        rows.append((method, f"{lr:g}", *ends, *known, len(runs)))
    about = "means of the seeds, after training: nats per word above the floor on clinic notes (new), "
    about += "nats per token on other passages (old), and the shares of facts and of grammar that are known"
    return "\n".join([wrapped(f"{result['model']}: {about}"), columns(("", "rate", "new", "old", "facts", "pairs", "seeds"), rows, ".3f")])


def main() -> None:
    given = options(
        "gemma_forgetting",
        __doc__,
        gpu=False,
        model={"help": "what course.lab.models.load takes: gemma-3-270m, a .gguf file, a folder (default with --smoke: tiny, random)"},
        minutes={"type": float, "default": 4.0, "help": "from when the model is loaded; no run starts that would end later"},
    )
    settings = QUICK if given.smoke else Settings()
    began = time.monotonic()
    name, model, tokenizer = asked_for(given)
    benchmark = Benchmark(model, tokenizer, settings, time.time() + 60 * given.minutes)
    result = {"model": name, "settings": dataclasses.asdict(settings), "floor_nats_per_word": benchmark.floor / benchmark.words}
    new, old = benchmark.losses(benchmark.base)
    result["base"] = {"new": new, "old": old} | benchmark.probe(benchmark.base)
    result["questions"] = {"facts": len(benchmark.facts), "pairs": len(benchmark.pairs)}
    result["example"] = benchmark.held_out[0][:200]
    print(
        f"base: clinic {new:.3f} nats per word above the floor, passages {old:.4f}; ready after {time.monotonic() - began:.0f} s",
        flush=True,
    )
    try:
        result["fisher"] = benchmark.take_fisher()
        print(f"Fisher of {result['fisher']['rows']} rows in {result['fisher']['seconds']:.1f} s", flush=True)
    except (RuntimeError, ValueError) as error:  # the other methods do without
        result["fisher"] = {"failed": message(error)}
        print(result["fisher"], flush=True)
    paths = []
    benchmark.execute(lambda found: paths.append(recorded.save("gemma_forgetting", rounded(result | found), given.out, given.device)))
    print(table(recorded.read(paths[-1])["result"]))
    print("saved to", paths[-1])


if __name__ == "__main__":
    main()
