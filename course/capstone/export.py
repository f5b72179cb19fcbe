"""Out: the adapter in peft's files, the merged model in transformers', and a GGUF. Each is loaded again and asked the same questions.

An export that was never loaded is a hope. Three numbers say how it went: the largest difference of a logit, the share of answers that
changed, and the loss on the held-out rows, paired, against the model that was trained.
"""

import dataclasses
import gc
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from course.capstone import evaluate
from course.capstone.base import Base
from course.capstone.checkpoint import sha256, whole_folder
from course.capstone.data import Rows
from course.lab import models
from course.lab.evaluation import Interval, compare_losses
from course.units import CourseError
from reference.adapter_format import load_adapter, save_adapter
from reference.multi_lora import MultiLoRA, read_factors
from reference.qlora import quantize_linears

CARD, RECORD = "README.md", "course_adapter.json"
PROMPTS = 8  # whose logits are compared


@dataclass
class Trained:
    """What every export is compared with: the model as it was trained, before anything was merged."""

    logits: list[Tensor]
    losses: Tensor
    targets: Tensor
    said: list[tuple[str, bool]]


@dataclass
class Export:
    """One export, loaded again.

    Attributes:
        kind: "adapter", "adapter in peft", "served", "merged", "gguf".
        logits: largest difference of a logit, on a few held-out rows.
        changed: share of answers that are others.
        lost: nats per target that it loses against the trained model, paired.
        words: why it is not there, or what has to be known about it.
    """

    kind: str
    path: str = ""
    bytes: int = 0
    logits: float | None = None
    changed: float | None = None
    lost: Interval | None = None
    words: str = ""

    def within(self, tolerance: float) -> bool:
        """Whether at most this share of perplexity is lost, by the interval's upper end; an export that is not there is not judged."""
        return self.lost is None or self.lost.rise.high <= tolerance

    def as_dict(self) -> dict:
        interval = self.lost and {"estimate": self.lost.estimate, "low": self.lost.low, "high": self.lost.high}
        return {**{key: getattr(self, key) for key in ("kind", "path", "bytes", "logits", "changed", "words")}, "lost": interval}


@torch.no_grad()
def some_logits(model: nn.Module, rows: Rows) -> list[Tensor]:
    """Of a few held-out rows, one at a time, (length, vocabulary) each."""
    where = next(model.parameters()).device
    return [
        model(input_ids=torch.tensor([each.example.ids], device=where), use_cache=False).logits[0].float().cpu()
        for each in rows.asked[:PROMPTS]
    ]


def trained(model: nn.Module, base: Base, rows: Rows, new_tokens: int, measured: evaluate.Measured | None = None) -> Trained:
    """Of a model that was measured already, only the logits are asked for."""
    if measured is not None:
        return Trained(some_logits(model, rows), measured.losses, measured.targets, measured.said)
    losses, targets = evaluate.row_losses(model, [each.example for each in rows.asked], base.tokenizer.pad_token_id)
    return Trained(some_logits(model, rows), losses, targets, evaluate.answers(model, base.tokenizer, rows.asked, new_tokens))


def compare(kind: str, path: Path, model: nn.Module, base: Base, rows: Rows, new_tokens: int, wanted: Trained) -> Export:
    now = trained(model.eval(), base, rows, new_tokens)
    far = max((one - other).abs().max().item() for one, other in zip(now.logits, wanted.logits, strict=True))
    changed = sum(one != other for one, other in zip(now.said, wanted.said, strict=True)) / len(now.said)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    return Export(kind, str(path), size, far, changed, compare_losses(wanted.losses, now.losses, now.targets))


# The adapter


def write_adapter(model: nn.Module, base: Base, folder: Path, record: dict, card: str) -> Path:
    """The adapter with its tokenizer, its card, and the record that ``course audit`` reads; all of it or nothing."""
    with whole_folder(folder) as partial:
        save_adapter(model, partial, base.name)
        base.tokenizer.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
        files = {file.name: sha256(file) for file in sorted(partial.iterdir()) if file.suffix in (".safetensors", ".json")}
        (partial / RECORD).write_text(json.dumps(record | {"files": files}, indent=1) + "\n")
        (partial / CARD).write_text(card)
    return folder


def load_base(name: str, method: str, dtype: str) -> nn.Module:
    """A fresh base as the adapter saw it: quantized if it was."""
    model, _ = models.load(name, getattr(torch, dtype))
    if method == "qlora":
        quantize_linears(model, compute_dtype=getattr(torch, dtype))
    return model


def check_adapter(folder: Path, base: Base, plan, rows: Rows, wanted: Trained) -> Export:
    model = load_base(base.name, plan.method, plan.dtype)
    load_adapter(model, folder)
    return compare("adapter", folder, model, base, rows, plan.new_tokens, wanted)


def check_in_peft(folder: Path, base: Base, plan, rows: Rows, wanted: Trained) -> Export:
    if importlib.util.find_spec("peft") is None:
        return Export("adapter in peft", str(folder), words="peft is not installed")
    if plan.method == "qlora":
        return Export("adapter in peft", str(folder), words="over NF4 peft needs bitsandbytes: load the base in 4 bits there")
    model = load_base(base.name, plan.method, plan.dtype)
    with warnings.catch_warnings():  # it tries every quantization library on the way, and says which are missing
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, folder).eval()
        finally:
            logging.disable(logging.NOTSET)
    return compare("adapter in peft", folder, model, base, rows, plan.new_tokens, wanted)


def check_served(folder: Path, base: Base, plan, rows: Rows, wanted: Trained) -> Export:
    """As one of many over a base, which is how unit 11 serves it: factors beside linear layers, and nothing else."""
    if base.new:
        return Export(
            "served", str(folder), words="it trained rows of the embedding too, which all adapters share: serve it merged, or alone"
        )
    model, factors = load_base(base.name, plan.method, plan.dtype), read_factors(folder)
    server = MultiLoRA(model, list(factors))
    where = next(model.parameters()).device
    server.add("this", {name: each.to(where) for name, each in factors.items()})
    server.select("this")
    return compare("served", folder, model, base, rows, plan.new_tokens, wanted)


# The whole model


def write_merged(model: nn.Module, base: Base, folder: Path, card: str) -> Path:
    with whole_folder(folder) as partial:
        model.config.eos_token_id = model.generation_config.eos_token_id = base.tokenizer.eos_token_id
        model.save_pretrained(partial)
        base.tokenizer.save_pretrained(partial)
        (partial / CARD).write_text(card)
    return folder


def check_merged(folder: Path, base: Base, plan, rows: Rows, wanted: Trained) -> Export:
    model, tokenizer = models.load(folder, getattr(torch, plan.dtype))
    again = dataclasses.replace(base, tokenizer=tokenizer)
    return compare("merged", folder, model, again, rows, plan.new_tokens, wanted)


def gguf(model: nn.Module, base: Base, folder: Path, plan, rows: Rows, wanted: Trained) -> Export:
    """Write and check a GGUF; where the family is unknown, say so."""
    from course.capstone import gguf_file

    try:
        with whole_folder(folder) as partial:
            note = gguf_file.write(model, base, partial / "model.gguf")
            base.tokenizer.save_pretrained(partial)
    except gguf_file.CannotWrite as error:
        return Export("gguf", words=str(error))
    path = folder / "model.gguf"
    again = gguf_file.read(path, getattr(torch, plan.dtype)).to(next(model.parameters()).device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dataclasses.replace(
        compare("gguf", path, again, dataclasses.replace(base, tokenizer=tokenizer), rows, plan.new_tokens, wanted), words=note
    )


def attempt(kind: str, make: Callable[[], Export]) -> Export:
    """What ``make`` gives; a full disk or an export that can't be loaded is said in its place, and the others go on."""
    try:
        return make()
    except CourseError as error:
        return Export(kind, words=str(error))
    finally:
        gc.collect()
