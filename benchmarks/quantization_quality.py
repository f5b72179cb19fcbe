"""What each number format costs a model, and whether LoRA on top wins it back.

    python -m benchmarks.quantization_quality                                        # the tiny model, CPU, about four minutes
    python -m benchmarks.quantization_quality --model gemma-3-270m                   # Gemma 3 270M, a GPU; what fits into --minutes
    python -m benchmarks.quantization_quality --model gemma-3-270m --resume FILE     # what a result still lacks
    python -m benchmarks.quantization_quality --smoke [--model stand-in]             # a dry run on the CPU: every path, no meaning

Records "quantization_quality_tiny" and "quantization_quality_gemma". Only linear layers inside the decoder are quantized, in blocks of 64;
embeddings, norms and the output head keep 16 bits. Quantization is simulated (course.lab.quantized): dense weights that hold the numbers a
packed layer computes with.

Quantizing is deterministic, so there is no seed to vary: the interval of a format's loss is over the *texts* (paired differences,
course.lab.evaluation). Training has seeds (the order of the data, LoRA's first factors), three of them, the same for every base.

*Won back.* LoRA (r = 16, all linears, α/r = 2) is trained on the quantized base and on the 16-bit base, on the same data. Part of what it
gains would have been gained without quantization too, so the two adapted models are compared with each other:

    gap before = loss(quantized) − loss(16-bit)        gap after = loss(LoRA on quantized) − loss(LoRA on 16-bit)

One learning rate serves all bases: the one that was best on the 16-bit base (benchmarks/gemma_lora.py), which favours it, if anything.

Gemma's weights come from a file that holds them in four to eight bits already, decoded here to bf16. Its "16-bit" model is therefore not
the one that Google trained, and what a format costs is the cost of quantizing *again*: weights that lie on one grid are rounded to another.
Which formats the file uses is recorded. The order of the formats is evidence; the size of the losses belongs to this file.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from benchmarks import gemma_lora
from benchmarks.cli import message, options, rounded
from benchmarks.gemma_lora import Benchmark, OutOfTime
from course.lab import models, probes, recorded, seed_everything, training
from course.lab.evaluation import FORMATS, compare_answers, compare_losses, facts_right, recommend, sequence_divergence, sequence_losses
from course.lab.quantized import KINDS, bits_per_weight, quantized_copy
from course.lab.tables import columns, wrapped
from course.lab.world import DOMAINS, World
from reference.lora import inject_lora

BASE = "16-bit"
RANK = 16
SEEDS = (0, 1, 2)

# The tiny model: nats above the floor, which is exact


@dataclasses.dataclass(frozen=True)
class TinySettings:
    kinds: tuple[str, ...] = KINDS
    blocks: tuple[int, ...] = (32, 64, 256, 1024, 4096)
    rows: int = 256
    length: int = 48
    trained: tuple[str, ...] = (BASE, "NF4", "NF2", "INT2")
    domains: tuple[str, ...] = ("general", "clinic")  # known to the base, and new to it
    steps: int = 100
    rate: float = 3e-3
    seeds: tuple[int, ...] = SEEDS


SMOKE = TinySettings(("NF4", "INT2"), (64,), 8, 16, (BASE, "INT2"), ("general",), 2, 3e-3, (0, 1))


def as_interval(interval) -> dict:
    return {name: float(f"{getattr(interval, name):.4g}") for name in ("estimate", "low", "high")} | {"count": interval.count}


def measure_tiny(s: TinySettings) -> dict:
    """Everything about the tiny model, on the CPU."""
    world, model = World(), models.load("tiny", where=torch.device("cpu"))[0]
    texts = {domain: world.sample(domain, s.rows, s.length, seed=1_000_003) for domain in DOMAINS}
    floor = {domain: -world.log_probs(domain, ids).mean().item() for domain, ids in texts.items()}
    before = {domain: sequence_losses(model, ids) for domain, ids in texts.items()}
    facts = facts_right(model, world)

    def quality(candidate: nn.Module, domains=DOMAINS) -> dict:
        row = {"above_floor": {}, "lost_nats": {}}
        for domain in domains:
            losses = sequence_losses(candidate, texts[domain])
            row["above_floor"][domain] = losses.mean().item() - floor[domain]
            row["lost_nats"][domain] = as_interval(compare_losses(before[domain], losses))
        right = facts_right(candidate, world)
        row |= {"facts": right.double().mean().item(), "facts_lost": as_interval(compare_answers(facts, right))}
        return row | {"divergence": sequence_divergence(candidate, model, texts["general"]).mean().item()}

    table = [{"kind": BASE, "bits": 16.0, "block": None, **quality(copy.deepcopy(model).bfloat16().float())}]
    table += [{"kind": kind, "bits": bits_per_weight(kind), "block": 64, **quality(quantized_copy(model, kind))} for kind in s.kinds]
    blocks = [
        {"kind": kind, "bits": bits_per_weight(kind, block), "block": block, **quality(quantized_copy(model, kind, block), ("general",))}
        for kind in ("NF4", "FP4", "INT4")
        for block in s.blocks
    ]
    return {
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "settings": dataclasses.asdict(s),
        "facts_asked": len(facts),
        "table": rounded(table),
        "blocks": rounded(blocks),
        "won_back": rounded(won_back_tiny(world, model, s)),
    }


def won_back_tiny(world: World, model: nn.Module, s: TinySettings) -> list[dict]:
    """One row for each domain and base: nats above the floor before and after LoRA, every seed."""
    rows = []
    for domain in s.domains:
        for kind in s.trained:
            base = copy.deepcopy(model) if kind == BASE else quantized_copy(model, kind)
            row = {"domain": domain, "kind": kind, "before": training.above_floor(base, world, domain, s.rows), "after": []}
            for seed in s.seeds:
                seed_everything(seed)
                adapted = copy.deepcopy(base)
                inject_lora(adapted, RANK, 2 * RANK)
                training.train(
                    adapted,
                    lambda step, domain=domain, seed=seed: world.sample(domain, 8, 32, seed=10_000 * (seed + 1) + step),
                    s.steps,
                    s.rate,
                    schedule=training.warmup_cosine(),
                    progress=False,
                )
                row["after"].append(training.above_floor(adapted, world, domain, s.rows))
            rows.append(row)
            print(f"LoRA on {kind:7}{domain:9}{row['before']:.4f} → {' '.join(f'{x:.4f}' for x in row['after'])}", flush=True)
    return rows


def tiny_table(result: dict) -> str:
    rows = []
    for row in result["table"]:
        lost = row["lost_nats"]["general"]
        span = f"{lost['estimate']:+.5f} ({lost['low']:+.5f} to {lost['high']:+.5f})"
        others = f"{row['divergence']:.1e}", f"{row['facts']:.1%}"
        rows.append([row["kind"], row["bits"], f"{row['above_floor']['general']:.4f}", span, *others])
    back = [(f"{row['kind']}, {row['domain']}", row["before"], statistics.fmean(row["after"])) for row in result["won_back"]]
    parts = [columns(("", "bits", "above floor", "lost, nats per token", "diverges", "facts"), rows), ""]
    return "\n".join([*parts, columns(("nats above the floor", "before LoRA", "after"), back, ".4f")])


# A real model: perplexity, facts, grammar


@dataclasses.dataclass(frozen=True)
class Settings(gemma_lora.Settings):
    """As in gemma_lora, where not said otherwise."""

    steps: int = 60
    reserve: float = 0.0
    kinds: tuple[str, ...] = ("NF4", "NF4+DQ", "INT8", "FP4", "INT4")
    trained: tuple[str, ...] = (BASE, "NF4", "INT4", "FP4")
    rate: float = 1e-3  # the best of all-linear r=16 on the 16-bit base


STAND_IN = Settings(32, 2, 3, 2, 2, seeds=(0, 1), validation_rows=2, test_rows=8, manual_rows=8, probe_step=16, batch_tokens=512)


class Quality(Benchmark):
    """The benchmark of real fine-tuning with other bases: the same texts, questions, training and deadline."""

    def __init__(self, model: nn.Module, tokenizer, settings: Settings, minutes: float, resumed: dict | None, save) -> None:
        self.known: dict[str, dict] = dict(resumed["formats"]) if resumed else {}
        self.save, self.original = save, model  # self.base is what the next run starts from
        super().__init__(model, tokenizer, settings, minutes, resumed={"runs": resumed["runs"], "chosen_lr": {}} if resumed else None)
        self.known.setdefault(BASE, self.base_measures)

    def sample(self, model: nn.Module) -> dict[str, str]:
        return {}  # nobody reads samples here

    def measure(self, model: nn.Module) -> dict:
        """Losses of every sequence and whether each question was answered rightly: what intervals are made of."""
        tokens = self.settings.batch_tokens
        texts = gemma_lora.text.prose_documents("passages").values()  # all of them: each is one of the sample
        documents = [probes.perplexity(model, self.tokenizer, text, batch_tokens=tokens) for text in texts]
        cloze = probes.cloze_accuracy(model, self.tokenizer, self.facts, batch_tokens=tokens)
        pairs = probes.minimal_pair_accuracy(model, self.tokenizer, self.pairs, batch_tokens=tokens)
        found = {
            name: sequence_losses(model, rows, rows_at_once=8).tolist() for name, rows in (("code", self.test), ("manual", self.manual))
        }
        found["passages"] = [document.nats_per_token for document in documents]
        self.document_tokens = [document.tokens for document in documents]
        answers = {name: [int(x) for x in result.correct] for name, result in (("cloze", cloze), ("pairs", pairs))}
        means = {name: self.mean(name, losses) for name, losses in found.items()}
        means |= {name: statistics.fmean(right) for name, right in answers.items()} | {"cloze_nats": cloze.nats, "pairs_nats": pairs.nats}
        return rounded(means) | {"items": {name: [round(x, 5) for x in losses] for name, losses in found.items()} | answers}

    def mean(self, name: str, losses: list[float]) -> float:
        weights = self.document_tokens if name == "passages" else [1] * len(losses)
        return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)

    def quantized(self, kind: str) -> nn.Module:
        """The base as a layer of that kind would compute with it: decoded to bf16, held in float32 for exact arithmetic."""
        return copy.deepcopy(self.original) if kind == BASE else quantized_copy(self.original, kind, compute_dtype=torch.bfloat16)

    def execute(self) -> None:
        """The table, then the runs, the first seed of every base before the second of any; saves after each."""
        for kind in self.settings.kinds:
            if kind not in self.known:
                self.known[kind] = self.measure(self.quantized(kind))
                print(f"{kind:8}", {k: v for k, v in self.known[kind].items() if k != "items"}, flush=True)
                self.save(self)
        try:
            for seed in self.settings.seeds:
                for kind in self.settings.trained:
                    self.base = self.quantized(kind)
                    self.run(f"LoRA on {kind}", self.settings.rate, seed, lambda m: inject_lora(m, RANK, 2 * RANK), {"kind": kind})
                    self.save(self)
        except OutOfTime:
            self.stopped_early = True
            print("out of time: what was measured is recorded; --resume goes on", flush=True)
        finally:
            self.base = self.original

    def run(self, config: str, lr: float, seed: int, adapt, details: dict) -> dict:
        try:
            return super().run(config, lr, seed, adapt, details)
        except (RuntimeError, ValueError) as error:  # out of memory, NaN in a measure: the other runs go on
            failed = {"config": config, "lr": lr, "seed": seed, **details, "error": message(error)}
            self.runs.append(failed)
            print(failed, flush=True)
            return failed

    def lost(self, kind: str) -> dict[str, dict]:
        """Measure -> what ``kind`` loses against the base, with its interval; losses in nats per token, answers as a share."""
        one, two, found = self.known[BASE]["items"], self.known[kind]["items"], {}
        for name in ("code", "manual", "passages"):
            weights = self.document_tokens if name == "passages" else None
            found[name] = as_interval(compare_losses(one[name], two[name], weights))
        return found | {name: as_interval(compare_answers(one[name], two[name])) for name in ("cloze", "pairs")}

    def verdict(self) -> dict | None:
        """The 2 % rule for this model: perplexity of code and passages, facts, grammar, at 95 % together."""
        if not all(kind in self.known for kind in FORMATS.values()):
            return None
        found, each = {}, 1 - 0.05 / 4
        for label, kind in FORMATS.items():
            one, two = self.known[BASE]["items"], self.known[kind]["items"]
            found[label] = {"code": compare_losses(one["code"], two["code"], confidence=each).rise}
            found[label]["passages"] = compare_losses(one["passages"], two["passages"], self.document_tokens, each).rise
            found[label] |= {name: compare_answers(one[name], two[name], each) for name in ("cloze", "pairs")}
        verdict = recommend(found)
        measures = {label: {name: as_interval(i) for name, i in row.items()} for label, row in found.items()}
        return {"choice": verdict.choice, "safe": verdict.safe, "text": str(verdict), "lost": measures}

    def won_back(self) -> list[dict]:
        """Gaps to LoRA on the 16-bit base, seed by seed."""
        finished = {(run["kind"], run["seed"]): run["measures"] for run in self.runs if "measures" in run}
        rows = []
        for kind in self.settings.trained:
            seeds = [seed for seed in self.settings.seeds if (kind, seed) in finished and (BASE, seed) in finished]
            if not seeds:
                continue
            row = {"kind": kind, "seeds": seeds}
            for name in ("code", "passages", "manual", "cloze", "pairs"):
                row[name] = {
                    "before": self.known[kind][name],
                    "after": [finished[kind, seed][name] for seed in seeds],
                    "gap_before": self.known[kind][name] - self.known[BASE][name],
                    "gap_after": [finished[kind, seed][name] - finished[BASE, seed][name] for seed in seeds],
                }
            rows.append(rounded(row))
        return rows

    def quality_result(self, name: str, stored: dict | None) -> dict:
        return {
            "model": name,
            "stored_as": stored,
            "text": gemma_lora.text.origin(),
            "settings": dataclasses.asdict(self.settings),
            "counts": {"code": len(self.test), "manual": len(self.manual), "passages": len(self.document_tokens)}
            | {"cloze": len(self.facts), "pairs": len(self.pairs)},
            "units": "nats per token; cloze and pairs as shares of the questions",
            "stopped_early": self.stopped_early,
            "bits": {kind: 16.0 if kind == BASE else bits_per_weight(kind) for kind in self.known},
            "formats": self.known,
            "lost": {kind: self.lost(kind) for kind in self.known if kind != BASE},
            "two_percent_rule": self.verdict(),
            "won_back": self.won_back(),
            "runs": self.runs,
        }


def gemma_table(result: dict) -> str:
    losses, rows, spans = ("code", "passages", "manual"), [], []
    for kind, row in result["formats"].items():
        rows.append([kind, f"{result['bits'][kind]:.2f}", *(row[name] for name in losses), f"{row['cloze']:.1%}", f"{row['pairs']:.1%}"])
        if lost := result["lost"].get(kind):
            cells = (lost[name] for name in losses[:2])
            spans.append([kind, *(f"{cell['estimate']:+.4f} ({cell['low']:+.4f} to {cell['high']:+.4f})" for cell in cells)])
    back = []
    for row in result["won_back"]:
        cells = [row[name] for name in losses[:2]]
        gaps = (gap for cell in cells for gap in (cell["gap_before"], statistics.fmean(cell["gap_after"])))
        back.append([row["kind"], *(f"{gap:+.4f}" for gap in gaps)])
    parts = [columns(("nats per token", "bits", *losses, "facts", "grammar"), rows, ".4f")]
    parts.append(columns(("lost to 16 bits", *losses[:2]), spans))
    parts.append(columns(("LoRA on it: gap to 16 bits", "code before", "after", "passages before", "after"), back))
    verdict = result["two_percent_rule"]
    said = verdict["text"].splitlines() if verdict else ["the 2 % rule: formats are missing"]
    return "\n\n".join([*parts, "\n".join(wrapped(" ".join(line.split())) for line in said)])


def stored_formats(path: Path) -> dict[str, int] | None:
    """How a .gguf file holds the weights of the decoder's linears: format -> how many matrices."""
    try:
        from gguf import GGUFReader

        tensors = [t for t in GGUFReader(path).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
        return dict(Counter(tensor.tensor_type.name for tensor in tensors))
    except Exception as error:  # provenance, not a measurement
        print(f"formats of {path.name} are not known: {error}", flush=True)
        return None


def load_gemma(name: str) -> tuple[nn.Module, object, dict | None]:
    """Model in bf16, tokenizer, formats of the file. A decoded .gguf file is kept beside it: decoding takes more than a minute."""
    path = models.packaged_gemma() if name == "gemma-3-270m" else Path(name)
    decoded = path.parent / f"{path.stem}-decoded"
    if path.suffix == ".gguf" and (decoded / "config.json").is_file():
        return *models.load(decoded, torch.bfloat16), stored_formats(path)
    model, tokenizer = models.load(name, torch.bfloat16)
    if path.suffix != ".gguf":
        return model, tokenizer, None
    try:
        model.save_pretrained(decoded), tokenizer.save_pretrained(decoded)
    except OSError as error:
        print(f"not kept: {error}", flush=True)
    return model, tokenizer, stored_formats(path)


def run_gemma(given: argparse.Namespace) -> None:
    began = time.monotonic()
    resumed = json.loads(given.resume.read_text())["result"] if given.resume else None
    settings = STAND_IN if given.smoke else Settings()
    if resumed:
        settings = Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in resumed["settings"].items()})
    if given.smoke:
        (model, tokenizer), stored = gemma_lora.stand_in(), None
    else:
        model, tokenizer, stored = load_gemma(given.model)
    model = model.to(given.device, torch.bfloat16).float()
    name = "stand-in, random" if given.smoke else Path(given.model).stem
    print(f"loaded {name} in {time.monotonic() - began:.0f} s", flush=True)

    def save(benchmark: Quality) -> Path:
        return recorded.save("quantization_quality_gemma", benchmark.quality_result(name, stored), given.out, given.device)

    benchmark = Quality(model, tokenizer, settings, given.minutes, resumed, save)
    benchmark.execute()
    path = save(benchmark)
    print(table(benchmark.quality_result(name, stored)))
    missing = len(settings.trained) * len(settings.seeds) - sum("measures" in run for run in benchmark.runs)
    print(f"{path.name}; {missing} runs are missing; {time.monotonic() - began:.0f} s in all")


def table(result: dict) -> str:
    """Of either part."""
    return gemma_table(result) if "formats" in result else tiny_table(result)


def main() -> None:
    given = options(
        "quantization_quality",
        __doc__,
        gpu=False,
        model={"help": "gemma-3-270m, a .gguf file or a folder; without it, the tiny model"},
        minutes={"type": float, "default": 2.4, "help": "time after loading; no run starts that would end later"},
        resume={"type": Path, "help": "a recorded result: its settings and runs are kept, and what is missing is run"},
    )
    if given.model:
        run_gemma(given)
        return
    result = measure_tiny(SMOKE if given.smoke else TinySettings())
    path = recorded.save("quantization_quality_tiny", result, given.out, torch.device("cpu"))
    print(table(result))
    print("saved to", path)


if __name__ == "__main__":
    main()
