"""LoRA and full fine-tuning of a real language model on Python code: what is learned, what is forgotten, and what the update looks like.

    python -m benchmarks.gemma_lora --model gemma-3-270m            # one GPU, at most 7.5 minutes after loading
    python -m benchmarks.gemma_lora --resume result.json --only attention mlp        # what a result still lacks of some configurations
    python -m benchmarks.gemma_lora --merge one.json other.json                      # results of several resumed parts as one
    python -m benchmarks.gemma_lora --smoke                         # a tiny random model on a CPU: every path, no meaning

Records "gemma_lora" (every run, with its learning curve and its measures) and "gemma_spectra" (singular values of weights and updates).

How it is made fair:

- **One base.** Every run starts from a copy of the same float32 weights; a full fine-tuning trains them, LoRA adds float32 factors.
- **Precision.** Training passes run under bfloat16 autocast with float32 master weights, for both methods: pure bfloat16 weights would lose
  the small steps of full fine-tuning, and a bfloat16 base under LoRA would start from other numbers. Everything measured is measured in
  float32. So memory is compared at equal precision; in practice a frozen base is kept in bfloat16, which saves half of its share.
- **Learning rates.** Each configuration gets its own, from a grid of half decades: the search starts in the middle and walks downhill on
  the validation split with seed 0 until both neighbours of the best are worse. Nothing is chosen on the test split or on what was
  forgotten.
- **Seeds.** Seeds decide the order of the data (the same for every method) and the factors' first values. Configurations that are compared
  have three; the seed of the search is one of them.
- **Forgetting** is measured by prose that the model has not seen, facts and grammar (``course.lab.probes``), against the base.

The base is decoded from four-bit weights where it comes from a .gguf file: part of what any training on text repairs may be that rounding.
"""

import argparse
import copy
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from benchmarks.cli import options, rounded
from course.lab import models, probes, recorded, seed_everything, text
from course.lab.meters import peak_memory, show_bytes
from course.lab.tables import columns, wrapped
from course.lab.training import cross_entropy, train, warmup_cosine
from reference import lowrank
from reference.lora import inject_lora, merge_lora, trainable_parameters

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
FULL = "full fine-tuning"
LORA_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FULL_LRS = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is done; the defaults are the benchmark's, ``QUICK`` is a dry run."""

    length: int = 512
    rows: int = 8  # of a training batch
    steps: int = 100
    every: int = 20  # steps between validations
    curve: int = 5  # steps averaged into one point of the training curve
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    equal_to: int = 4  # other targets get as many parameters as all-linear with this rank
    shown: int = 16  # rank whose samples are kept
    seeds: tuple[int, ...] = (0, 1, 2)
    validation_rows: int = 16
    test_rows: int = 64
    manual_rows: int = 12
    probe_step: int = 1  # every how many questions are asked
    batch_tokens: int = 8192
    sample_tokens: int = 80
    depths: int = 5  # layers whose spectra are kept
    reserve: float = 60.0  # seconds kept for the spectra


QUICK = Settings(32, 2, 4, 2, 2, (1, 4), 4, 4, (0, 1, 2), 2, 2, 2, 40, 512, 8, 4, 0.0)


class OutOfTime(Exception):
    """The next run would end after the deadline."""


class InBfloat16(nn.Module):
    """The model's forward under bfloat16 autocast, entered at every call.

    One autocast around the whole training would be wrong: it keeps its 16-bit copies of the weights until it ends, and so would go on using
    those of the first step.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor):
        with torch.autocast(input_ids.device.type, torch.bfloat16):
            return self.model(input_ids=input_ids, use_cache=False)


class Benchmark:
    def __init__(self, model: nn.Module, tokenizer, settings: Settings, minutes: float, resumed: dict | None = None):
        self.base, self.tokenizer, self.settings = model.eval().requires_grad_(False), tokenizer, settings
        self.where = next(model.parameters()).device
        self.deadline, self.longest_run = time.monotonic() + 60 * minutes - settings.reserve, 0.0
        s = settings
        self.train_rows = text.code_corpus(tokenizer, s.length, "train")
        self.validation = text.code_corpus(tokenizer, s.length, "validation", s.validation_rows)
        self.test = text.code_corpus(tokenizer, s.length, "test", s.test_rows)
        self.manual = text.prose_corpus(tokenizer, s.length, "manual", s.manual_rows)
        self.passages = list(text.prose_documents("passages").values())[:: s.probe_step]
        self.facts, self.pairs = probes.cloze_facts()[:: s.probe_step], probes.minimal_pairs()[:: s.probe_step]
        self.runs: list[dict] = list(resumed["runs"]) if resumed else []
        self.samples: dict[tuple[str, float], dict[str, str]] = {}
        for config, key in ((FULL, "full"), (self.lora_shown, "lora")):
            if resumed and config in resumed["chosen_lr"]:
                self.samples[config, resumed["chosen_lr"][config]] = {name: s[key] for name, s in resumed["samples"].items()}
        self.best_full: tuple[float, dict[str, Tensor]] = (float("inf"), {})  # validation loss, weights
        self.step_seconds = self.time_a_step()
        self.base_measures = self.measure(self.base)
        self.base_samples = self.sample(self.base)

    def time_a_step(self) -> float:
        """Seconds of a step with adapters, after steps that nobody counts: the first runs of a process load its kernels."""
        model, s = copy.deepcopy(self.base), self.settings
        inject_lora(model, s.shown, 2 * s.shown)
        steps = [train(InBfloat16(model), lambda step: self.train_rows[: s.rows], 3, 0.0, progress=False).seconds / 3 for _ in range(3)]
        return min(steps)

    def fit_steps(self) -> None:
        """Shorten all runs alike, if need be, so that all of them end before the deadline; the recorded settings say how many steps."""

        def seconds(work: Callable[[], object]) -> float:
            started = time.monotonic()
            work()
            return time.monotonic() - started

        s = self.settings
        validation = seconds(lambda: self.loss(self.base, self.validation))
        besides = seconds(lambda: self.measure(self.base)) + (s.steps // s.every + 1) * validation + 0.5  # and copying the base
        runs = len(self.configurations()) * (3.5 + len(s.seeds) - 1) + 2 * (len(s.seeds) - 1)
        fitting = int(((self.deadline - time.monotonic()) / runs - besides) / self.step_seconds)
        steps = max(2 * s.every, min(s.steps, fitting // s.every * s.every))
        self.settings = dataclasses.replace(s, steps=steps)
        minutes = runs * (steps * self.step_seconds + besides) / 60
        print(f"{1e3 * self.step_seconds:.0f} ms a step; about {runs:.0f} runs of {steps} steps in {minutes:.1f} minutes", flush=True)

    # What is measured

    def loss(self, model: nn.Module, rows: Tensor) -> float:
        return cross_entropy(model, rows, rows_at_once=8)  # few rows: with 262,144 words the logits of eight take 4 GB

    def measure(self, model: nn.Module) -> dict:
        """Everything that is compared, in float32; ``lost`` and ``gained`` count questions against the base."""
        tokens = self.settings.batch_tokens
        cloze = probes.cloze_accuracy(model, self.tokenizer, self.facts, batch_tokens=tokens)
        pairs = probes.minimal_pair_accuracy(model, self.tokenizer, self.pairs, batch_tokens=tokens)
        prose = probes.perplexity(model, self.tokenizer, self.passages, batch_tokens=tokens)
        measures = {"code": self.loss(model, self.test), "manual": self.loss(model, self.manual), "passages": prose.nats_per_token}
        if model is self.base:
            self.base_cloze, self.base_pairs = cloze, pairs
        for name, result, before in (("cloze", cloze, self.base_cloze), ("pairs", pairs, self.base_pairs)):
            lost, gained = result.changes(before)
            measures |= {name: result.accuracy, f"{name}_nats": result.nats, f"{name}_lost": lost, f"{name}_gained": gained}
        return rounded(measures)

    @torch.no_grad()
    def sample(self, model: nn.Module) -> dict[str, str]:
        """Greedy continuations of the prompts, all in one batch; hence padded on the left."""
        side, self.tokenizer.padding_side = self.tokenizer.padding_side, "left"
        bos = self.tokenizer.bos_token or ""
        try:
            given = self.tokenizer([bos + p for p in text.PROMPTS.values()], add_special_tokens=False, padding=True, return_tensors="pt")
        finally:
            self.tokenizer.padding_side = side
        ids, mask = given.input_ids.to(self.where), given.attention_mask.to(self.where)
        pad = self.tokenizer.pad_token_id
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=self.settings.sample_tokens, do_sample=False, pad_token_id=pad
        )
        continuations = self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return dict(zip(text.PROMPTS, continuations, strict=True))

    # One run

    def run(self, config: str, lr: float, seed: int, adapt: Callable[[nn.Module], None] | None, details: dict) -> dict:
        """Train a copy of the base and measure it; ``adapt`` injects adapters, None trains everything. The run is kept and returned."""
        if known := next((r for r in self.runs if (r["config"], r["lr"], r["seed"]) == (config, lr, seed)), None):
            return known
        if time.monotonic() + 1.2 * self.longest_run > self.deadline:
            raise OutOfTime
        started, s = time.monotonic(), self.settings
        seed_everything(seed)
        order = torch.randperm(len(self.train_rows), generator=torch.Generator().manual_seed(seed))

        def batch(step: int) -> Tensor:
            chosen = torch.arange(step * s.rows, (step + 1) * s.rows) % len(order)
            return self.train_rows[order[chosen]]

        gc.collect()
        run = {"config": config, "lr": lr, "seed": seed, **details} | ({"shared": True} if self.shared else {})
        with peak_memory(self.where) as peak:
            model = copy.deepcopy(self.base).requires_grad_(True)
            if adapt:
                adapt(model)
            run["parameters"] = trainable_parameters(model)[0]
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=self.where.type == "cuda")
            try:
                history = train(
                    InBfloat16(model),
                    batch,
                    s.steps,
                    lr,
                    optimizer=optimizer,
                    evaluate=lambda: self.loss(model, self.validation),
                    every=s.every,
                    schedule=warmup_cosine(),
                    progress=sys.stderr.isatty(),
                )
            except FloatingPointError as error:
                self.runs.append(run | {"diverged": str(error)})
                print(f"{config:<24} lr {lr:<7g} seed {seed}  diverged", flush=True)
                return self.runs[-1]
            finally:
                optimizer = trained = None  # the model stays for the measures, its gradients and moments need not
                model.zero_grad(set_to_none=True)
        run |= {"seconds": round(history.seconds, 2), "peak_bytes": peak.bytes, "curve": averaged(history.losses, s.curve)}
        run["validation"] = [[step, round(value, 5)] for step, value in history.evaluations]
        model = (merge_lora(model) if adapt else model).eval()
        run["measures"] = self.measure(model)
        if seed == s.seeds[0] and config in (FULL, f"all-linear r={s.shown}"):
            self.samples[config, lr] = self.sample(model)
        if config == FULL and run["validation"][-1][1] < self.best_full[0] and seed == s.seeds[0]:
            self.best_full = (run["validation"][-1][1], model.state_dict())
        self.runs.append(run)
        self.longest_run = max(self.longest_run, time.monotonic() - started)
        m = run["measures"]
        print(
            f"{config:<24} lr {lr:<7g} seed {seed}  {1e3 * history.seconds / s.steps:4.0f} ms/step  {show_bytes(peak.bytes):>8}  "
            f"validation {run['validation'][-1][1]:.4f}  code {m['code']:.4f}  passages {m['passages']:.4f}  "
            f"cloze {m['cloze']:.3f}  pairs {m['pairs']:.3f}",
            flush=True,
        )
        return run

    # The plan

    def configurations(self) -> dict[str, tuple[Callable | None, dict]]:
        """Name -> (how to adapt, what to record). LoRA's scale α/r is 2 everywhere: each configuration has its own learning rate anyway."""

        def lora(targets, r: int) -> tuple[Callable, dict]:
            return lambda model: inject_lora(model, r, 2 * r, targets), {"method": "lora", "targets": targets, "r": r}

        def per_rank(targets: tuple[str, ...]) -> int:
            """Parameters that one rank costs in these layers of the whole model."""
            layers = [m for name, m in self.base.named_modules() if isinstance(m, nn.Linear) and name.endswith(targets)]
            return sum(layer.in_features + layer.out_features for layer in layers)

        budget = self.settings.equal_to * per_rank(ATTENTION + MLP)
        found: dict[str, tuple[Callable | None, dict]] = {FULL: (None, {"method": "full"})}
        for r in sorted(self.settings.ranks, key=lambda r: r != self.settings.shown):  # the shown one first, should time run out
            found[f"all-linear r={r}"] = lora("all-linear", r)
        for name, targets in (("q,v", ("q_proj", "v_proj")), ("attention", ATTENTION), ("mlp", MLP)):
            r = round(budget / per_rank(targets))
            found[f"{name} r={r}"] = lora(list(targets), r)
        return {name: how for name, how in found.items() if not self.only or name.startswith(self.only)}

    def execute(self) -> dict[str, float]:
        """All runs, the most telling first; returns the learning rate chosen for each configuration."""
        plan, chosen = self.configurations(), {}
        first, *others = self.settings.seeds
        try:
            for config, (adapt, details) in plan.items():
                grid = FULL_LRS if config == FULL else LORA_LRS

                def validation(lr: float, config=config, adapt=adapt, details=details) -> float:
                    run = self.run(config, lr, first, adapt, details)
                    return float("inf") if "diverged" in run else run["validation"][-1][1]

                chosen[config] = downhill(grid, validation)
            for seed in others:
                for config, (adapt, details) in plan.items():
                    self.run(config, chosen[config], seed, adapt, details)
            at = FULL_LRS.index(chosen[FULL]) if FULL in chosen else 0
            for lr in (
                () if FULL not in chosen else FULL_LRS[max(0, at - 1) : at] + FULL_LRS[at + 1 : at + 2]
            ):  # how far the choice of the rate decides the comparison
                for seed in others:
                    self.run(FULL, lr, seed, *plan[FULL])
        except OutOfTime:
            print("out of time: what was measured is recorded, with stopped_early", flush=True)
            self.stopped_early = True
        return chosen

    stopped_early = False
    shared = False  # whether other processes use the GPU at the same time, so that seconds say little
    only: tuple[str, ...] = ()  # beginnings of the names of the configurations to run; all if empty

    def result(self, name: str, chosen: dict[str, float]) -> dict:
        s = self.settings
        lora = self.lora_shown if self.lora_shown in chosen else None
        return {
            "model": name,
            "model_parameters": trainable_parameters(self.base)[1],
            "text": text.origin(),
            "settings": dataclasses.asdict(s) | {"train_rows_available": len(self.train_rows)},
            "setup": "AdamW (weight decay 0), warm-up and cosine, clipping at 1; float32 weights, bfloat16 autocast; lora_alpha = 2r; "
            "learning rate by validation loss of seed 0 on a grid of half decades",
            "units": {"losses": "nats per token", "cloze_nats, pairs_nats": "nats per question", "peak_bytes": "bytes above the base copy"},
            "stopped_early": self.stopped_early,
            "base": self.base_measures
            | {
                "cloze_interval": rounded(self.base_cloze.interval),
                "pairs_interval": rounded(self.base_pairs.interval),
                "cloze_by_category": self.base_cloze.by_category,
                "pairs_by_category": self.base_pairs.by_category,
                "cloze_without_prompt": round(self.bare, 4),
                "questions": {"cloze": len(self.facts), "pairs": len(self.pairs)},
            },
            "chosen_lr": chosen,
            "summary": summary(self.runs, chosen, self.base_measures, s.steps),
            "samples": {
                name: {
                    "prompt": prompt,
                    "base": self.base_samples[name],
                    "lora": self.samples[lora, chosen[lora]][name] if lora else None,
                    "full": self.samples[FULL, chosen[FULL]][name] if FULL in chosen else None,
                }
                for name, prompt in text.PROMPTS.items()
            },
            "runs": self.runs,
        }

    @property
    def bare(self) -> float:
        facts, tokens = self.facts, self.settings.batch_tokens
        return probes.cloze_accuracy(self.base, self.tokenizer, facts, with_prompt=False, batch_tokens=tokens).accuracy

    @property
    def lora_shown(self) -> str:
        return f"all-linear r={self.settings.shown}"

    # Spectra

    @torch.no_grad()
    def spectra(self) -> dict:
        """Singular values of weights and of the full fine-tuning's updates, and the loss when every update is cut to a low rank."""
        before, after = self.base.state_dict(), self.best_full[1]
        names = [name for name, m in self.base.named_modules() if isinstance(m, nn.Linear) and name.endswith(ATTENTION + MLP)]
        blocks = list(dict.fromkeys(name.split("_proj")[0].rsplit(".", 2)[0] for name in names))
        depths = min(self.settings.depths, len(blocks))
        shown = {blocks[round(i * (len(blocks) - 1) / max(depths - 1, 1))] for i in range(depths)}
        weights, updates, positions = {}, {}, {}
        for name in names:
            if name.split("_proj")[0].rsplit(".", 2)[0] in shown:
                weight = before[f"{name}.weight"]
                weights[name], updates[name] = spectrum(weight), spectrum(after[f"{name}.weight"] - weight)
                positions[str(min(weight.shape))] = evenly(min(weight.shape))
        model = copy.deepcopy(self.base)
        model.load_state_dict(after)
        full = {"loss": self.loss(model, self.test), "passages": self.prose(model)}
        bases = {name: principal(after[f"{name}.weight"] - before[f"{name}.weight"]) for name in names}
        largest, retained = max(min(before[f"{name}.weight"].shape) for name in names), []
        for rank in [0, *(2**i for i in range(20) if 2**i < largest), largest]:
            for name in names:
                weight, update = before[f"{name}.weight"], after[f"{name}.weight"] - before[f"{name}.weight"]
                model.get_submodule(name).weight.copy_(weight + truncated(update, bases[name], rank))
            retained.append({"rank": rank, **rounded({"loss": self.loss(model, self.test), "passages": self.prose(model)})})
        return {
            "about": "full fine-tuning at the chosen learning rate, first seed; truncated are the updates of all linear layers of the "
            "blocks, while embeddings and norms keep theirs",
            "positions": positions,
            "weights": weights,
            "updates": updates,
            "retained": retained,
            "loss_before": self.base_measures["code"],
            "loss_after_full": round(full["loss"], 5),
            "passages_before": self.base_measures["passages"],
            "passages_after_full": round(full["passages"], 5),
        }

    def prose(self, model: nn.Module) -> float:
        return probes.perplexity(model, self.tokenizer, self.passages, batch_tokens=self.settings.batch_tokens).nats_per_token


def summary(all_runs: list[dict], chosen: dict[str, float], base: dict, steps: int) -> list[dict]:
    """Mean, lowest and highest over seeds of every measure: each configuration at its chosen rate, and at others with several.

    ``learned`` is the base's loss on test code less the run's, ``forgotten`` the run's loss on the passages less the base's. Times are of
    the runs that had the GPU for themselves.
    """
    rows = []
    finished = [run for run in all_runs if "measures" in run]
    for config, lr in dict.fromkeys((run["config"], run["lr"]) for run in finished):
        runs = [run for run in finished if (run["config"], run["lr"]) == (config, lr)]
        if config not in chosen or (len(runs) == 1 and lr != chosen[config]):
            continue
        values = {name: [run["measures"][name] for run in runs] for name in runs[0]["measures"]}
        values["learned"] = [base["code"] - v for v in values["code"]]
        values["forgotten"] = [v - base["passages"] for v in values["passages"]]
        values["ms_per_step"] = [1e3 * run["seconds"] / steps for run in runs if not run.get("shared")]
        values["peak_bytes"] = [run["peak_bytes"] for run in runs]
        spread = {name: rounded([statistics.fmean(v), min(v), max(v)]) if v else None for name, v in values.items()}
        about = {"config": config, "lr": lr, "chosen": lr == chosen[config], "seeds": len(runs), "parameters": runs[0]["parameters"]}
        rows.append(about | spread)
    return rows


def merged(results: list[dict]) -> dict:
    """Results of the same settings as one: every run once, everything else anew from the runs."""
    first = results[0]
    if any(other[same] != first[same] for other in results for same in ("model", "settings", "text")):
        raise ValueError("only results of the same model, settings and text can be merged")
    runs = {(run["config"], run["lr"], run["seed"]): run for result in results for run in result["runs"]}
    chosen = {config: lr for result in results for config, lr in result["chosen_lr"].items()}
    samples = {
        name: {key: next((r["samples"][name][key] for r in results if r["samples"][name][key] is not None), None) for key in sample}
        for name, sample in first["samples"].items()
    }
    return first | {
        "runs": list(runs.values()),
        "samples": samples,
        "chosen_lr": chosen,
        "summary": summary(list(runs.values()), chosen, first["base"], first["settings"]["steps"]),
        "stopped_early": any((config, lr, seed) not in runs for config, lr in chosen.items() for seed in first["settings"]["seeds"]),
    }


def downhill(grid: tuple[float, ...], loss: Callable[[float], float]) -> float:
    """The value of ``grid`` with the lowest loss, found from the middle: walk until both neighbours of the best are measured and worse."""
    found = {len(grid) // 2: loss(grid[len(grid) // 2])}
    while True:
        best = min(found, key=found.get)
        untried = [i for i in (best - 1, best + 1) if 0 <= i < len(grid) and i not in found]
        if not untried:
            return grid[best]
        for i in untried:
            found[i] = loss(grid[i])
            if found[i] < found[best]:
                break  # downhill is this way; the other neighbour of the old best can only matter if this one is not better


def principal(update: Tensor) -> Tensor:
    """Orthonormal principal directions of the smaller side of ``update``, largest first, as columns.

    From the eigenvectors of its Gram matrix in float64: what truncated_svd would give, in one decomposition for all ranks.
    """
    d = update.double()
    gram = d @ d.T if d.shape[0] <= d.shape[1] else d.T @ d
    return torch.linalg.eigh(gram).eigenvectors.flip(-1).to(update.dtype)


def truncated(update: Tensor, directions: Tensor, rank: int) -> Tensor:
    """The best approximation of ``update`` of that rank (Eckart and Young), given its principal directions."""
    u = directions[:, :rank]
    return u @ (u.T @ update) if update.shape[0] <= update.shape[1] else (update @ u) @ u.T


def evenly(count: int, at_most: int = 64) -> list[int]:
    """At most so many positions, evenly spaced from the first to the last."""
    return [round(i * (count - 1) / (min(at_most, count) - 1)) for i in range(min(at_most, count))] if count > 1 else [0]


def spectrum(matrix: Tensor) -> dict:
    s = torch.linalg.svdvals(matrix.float()).cpu()
    return {
        "shape": list(matrix.shape),
        "singular_values": rounded(s[evenly(len(s))].tolist()),
        "effective_rank": round(lowrank.effective_rank(s), 2),
        "stable_rank": round(lowrank.stable_rank(s), 2),
        "rank_for_90_percent_energy": lowrank.rank_for_energy(s, 0.9),
        "energy": {str(r): round(lowrank.energy_captured(s, r), 5) for r in (1, 4, 16, 64) if r <= len(s)},
    }


def averaged(values: list[float], width: int) -> list[float]:
    return [round(statistics.fmean(values[i : i + width]), 4) for i in range(0, len(values), width)]


def stand_in() -> tuple[nn.Module, object]:
    """A tiny random model of the same architecture (tied embeddings, sliding windows) and a tokenizer of bytes, for dry runs."""
    seed_everything(0)
    tokenizer = text.byte_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=16,
        sliding_window_pattern=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return Gemma3ForCausalLM(config), tokenizer


def table(result: dict) -> str:
    """Learned against forgotten, or the spectra of the update."""
    return table_of_spectra(result) if "retained" in result else table_of_runs(result["summary"])


def table_of_runs(summary: list[dict]) -> str:
    """Mean and half the span over seeds, one line a configuration."""

    def cell(row: dict, name: str, digits: int) -> str:
        mean, low, high = row[name]
        return f"{mean:.{digits}f}±{(high - low) / 2:.{digits}f}"

    names = [f"{row['config']}, lr {row['lr']:g}" for row in summary]
    first, second = [], []
    for name, row in zip(names, summary, strict=True):
        first.append([name, row["parameters"], row["seeds"], cell(row, "learned", 4), cell(row, "forgotten", 4)])
        cost = f"{row['ms_per_step'][0]:.0f}" if row["ms_per_step"] else None, show_bytes(row["peak_bytes"][0])
        second.append([name, cell(row, "cloze", 3), cell(row, "pairs", 3), *cost])
    parts = [columns(("nats per token", "parameters", "seeds", "learned", "forgotten"), first)]
    return "\n\n".join([*parts, columns(("", "cloze", "pairs", "ms/step", "peak"), second)])


def table_of_spectra(result: dict) -> str:
    """Of each kind of matrix, means over layers; and what a truncated update keeps."""
    rows = []
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in result["weights"]):
        cells = []
        for part in ("weights", "updates"):
            found = [each for name, each in result[part].items() if name.endswith(f".{kind}")]
            energy = statistics.fmean(each["energy"]["16"] for each in found)
            cells += [statistics.fmean(each["effective_rank"] for each in found), f"{energy:.1%}"]
        rows.append((kind, *cells))
    kept = [(f"rank {row['rank']}", row["loss"], row["passages"]) for row in result["retained"]]
    kept = [("before", result["loss_before"], result["passages_before"]), *kept]
    kept.append(("the whole update", result["loss_after_full"], result["passages_after_full"]))
    about = "effective rank, and the share of the energy in 16 directions: of the weights, of the update"
    parts = [wrapped(about) + "\n" + columns(("", "weight", "in 16", "update", "in 16"), rows, ".0f")]
    return "\n\n".join([*parts, columns(("update cut to", "loss", "passages"), kept, ".4f"), wrapped(result["about"])])


def merge_files(paths: list[Path]) -> None:
    """Put the recorded results ``paths`` into the first of them."""
    entries = [json.loads(path.read_text()) for path in paths]
    entries[0]["result"] = merged([entry["result"] for entry in entries])
    paths[0].write_text(json.dumps(entries[0], indent=1, allow_nan=False) + "\n")
    print(table(entries[0]["result"]["summary"]))


def asked_for(given: argparse.Namespace) -> tuple[str, nn.Module, object]:
    """Name, model and tokenizer that the options ask for; with --smoke and no --model a tiny, random stand-in."""
    started = time.monotonic()
    if given.smoke and given.model is None:
        name, (model, tokenizer) = "tiny, random", stand_in()
        model = model.to(given.device)
    else:
        name = given.model or "gemma-3-270m"
        model, tokenizer = models.load(name)
        name = Path(name).stem
    print(f"loaded {name} in {time.monotonic() - started:.0f} s", flush=True)
    return name, model, tokenizer


def main() -> None:
    given = options(
        "gemma_lora",
        __doc__,
        gpu=False,
        model={"help": "what course.lab.models.load takes: gemma-3-270m, a .gguf file, a folder (default with --smoke: tiny, random)"},
        steps={"type": int, "help": "training steps of a run (default: 100, or as many as there is time for)"},
        minutes={"type": float, "default": 7.5, "help": "time for everything after loading; no run starts that would end later"},
        resume={"type": Path, "help": "a recorded result: its settings are used, its runs kept, and what is missing is run"},
        only={"nargs": "+", "default": (), "help": "run only configurations whose names begin so, such as full or attention"},
        shared={"action": "store_true", "help": "say in the result that other processes use the GPU, so times mean little"},
        merge={"type": Path, "nargs": "+", "help": "put recorded results together, run nothing"},
    )
    if given.merge:
        merge_files(given.merge)
        return
    resumed = json.loads(given.resume.read_text())["result"] if given.resume else None
    settings = QUICK if given.smoke else Settings()
    if resumed:
        settings = Settings(**{name: value for name, value in resumed["settings"].items() if name != "train_rows_available"})
    if given.steps:
        settings = dataclasses.replace(settings, steps=given.steps)
    name, model, tokenizer = asked_for(given)

    started = time.monotonic()
    benchmark = Benchmark(model, tokenizer, settings, given.minutes, resumed)
    benchmark.only, benchmark.shared = tuple(given.only), given.shared
    print("base", benchmark.base_measures, flush=True)
    if given.steps is None and resumed is None:
        benchmark.fit_steps()
    chosen = benchmark.execute()
    path = recorded.save("gemma_lora", benchmark.result(name, chosen), given.out)
    print(f"{path}: {show_bytes(path.stat().st_size)}")
    if benchmark.best_full[1]:  # a resumed search has the numbers of its runs, not their weights
        path = recorded.save("gemma_spectra", {"model": name, **benchmark.spectra()}, given.out)
        print(f"{path}: {show_bytes(path.stat().st_size)}")
    print(table_of_runs(summary(benchmark.runs, chosen, benchmark.base_measures, benchmark.settings.steps)))
    print(f"{len(benchmark.runs)} runs in {(time.monotonic() - started) / 60:.1f} minutes after loading")


if __name__ == "__main__":
    main()
