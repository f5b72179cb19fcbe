"""The production checklist as code: does this adapter fit this base, this tokenizer, this server, and is it what was evaluated?

Each check answers one question whose "no" has taken a deployment down, and says what to do. A check that needs what earlier ones found
broken is skipped and says so. ``course capstone`` writes a record beside the adapter (``course_adapter.json``): the base's hash, how
conversations were rendered, and losses of a few rows. For an adapter without it, those checks are "unknown", not "passed".
"""

import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer

from course.capstone import base as bases
from course.capstone import evaluate, export
from course.capstone.checkpoint import sha256
from course.lab import models
from course.lab.meters import show_bytes
from course.units import CourseError
from reference.adapter_format import load_adapter
from reference.instruct import Example, render_ids
from reference.lora import lora_layers, merge_lora
from reference.qlora import merge_into_dequantized

PASSED, FAILED, UNKNOWN, SKIPPED = "passed", "failed", "unknown", "skipped"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank can be
SAME_LOSS, SAME_MERGE = 1e-3, 1e-2  # nats, relative: dtypes and devices round otherwise; a wrong base is further


@dataclass(frozen=True)
class Server:
    """What will run the adapter.

    Attributes:
        max_rank: the largest rank that it was started for.
        adapters: how many are resident, and of a batch's rows how many there are; the mix is one row each.
        rows: of a batch, for the latency.
        loads_rows: whether it takes embeddings' rows and whole modules beside factors.
    """

    max_rank: int = 64
    adapters: int = 8
    rows: int = 8
    loads_rows: bool = True


@dataclass(frozen=True)
class Finding:
    name: str
    state: str
    found: str
    remedy: str = ""


@dataclass
class Audit:
    """All findings of one adapter."""

    adapter: str
    base: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def failed(self) -> list[Finding]:
        return [each for each in self.findings if each.state == FAILED]

    def as_dict(self) -> dict:
        states = {state: sum(each.state == state for each in self.findings) for state in (PASSED, FAILED, UNKNOWN, SKIPPED)}
        return {"adapter": self.adapter, "base": self.base, "counts": states, "findings": [vars(each) for each in self.findings]}


class Broken(Exception):
    """What a check found, and what to do."""

    def __init__(self, found: str, remedy: str):
        super().__init__(found)
        self.found, self.remedy = found, remedy


class NotKnown(Exception):
    """The adapter does not say enough for this check."""


@dataclass
class Subject:
    """What the checks look at; parts appear as checks before have read them."""

    folder: Path
    base_name: str
    server: Server
    tolerance: float
    config: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    tokenizer: Any = None
    base: nn.Module | None = None
    base_tokenizer: Any = None
    model: nn.Module | None = None

    @property
    def method(self) -> str:
        return self.recorded("base")["method"] if self.record else "lora"

    def recorded(self, key: str) -> Any:
        if self.record is None or key not in self.record:
            raise NotKnown(f"{export.RECORD} does not tell: export with course capstone, or keep such a record")
        return self.record[key]


def audit(folder: Path, base: str, server: Server | None = None, tolerance: float = 0.02) -> Audit:
    """Every check over the adapter in ``folder``.

    Args:
        base: what it will be served on: a name that ``course.lab.models.load`` takes.
        tolerance: share of perplexity that merging may cost.

    Raises:
        CourseError: there is no such folder.
    """
    if not folder.is_dir():
        raise CourseError(f"no folder {folder}: name an adapter's, with {CONFIG} in it")
    subject, done = Subject(folder, base, server or Server(), tolerance), Audit(str(folder), base)
    states: dict[str, str] = {}
    for name, (needs, check) in CHECKS.items():
        if missing := [need for need in needs if states[need] in (FAILED, SKIPPED)]:
            finding = Finding(name, SKIPPED, f"needs: {', '.join(missing)}")
        else:
            finding = _asked(name, check, subject)
        states[name] = finding.state
        done.findings.append(finding)
    return done


def _asked(name: str, check: Callable[[Subject], str], subject: Subject) -> Finding:
    try:
        return Finding(name, PASSED, check(subject))
    except Broken as broken:
        return Finding(name, FAILED, broken.found, broken.remedy)
    except NotKnown as error:
        return Finding(name, UNKNOWN, str(error))


# Files


def files(subject: Subject) -> str:
    folder = subject.folder
    if not (folder / CONFIG).is_file():
        raise Broken(f"there is no {CONFIG}", "copy the whole folder, or export again")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        words = "the weights are a pickle, which runs code when it is read" if pickled else f"there is no {WEIGHTS}"
        raise Broken(words, "save the adapter as safetensors")
    try:
        subject.config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise Broken(f"{CONFIG} is not JSON: {error}", "export again") from None
    try:
        with safe_open(folder / WEIGHTS, "pt") as opened:
            subject.shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118  not a dictionary
    except Exception as error:  # safetensors' own errors, of the file's header or size
        raise Broken(f"{WEIGHTS} is cut off or no safetensors file ({error})", "copy it again, or export again") from None
    if (record := folder / export.RECORD).is_file():
        subject.record = json.loads(record.read_text())
    return f"{CONFIG}, {WEIGHTS}: {len(subject.shapes)} tensors, {show_bytes((folder / WEIGHTS).stat().st_size)}"


def unchanged(subject: Subject) -> str:
    written = subject.recorded("files")
    changed = [name for name, digest in written.items() if not (subject.folder / name).is_file() or sha256(subject.folder / name) != digest]
    if changed:
        raise Broken(f"{', '.join(changed)}: not as exported", "evaluate what you ship: export again, or copy again")
    return f"{len(written)} files are as they were exported"


def finite(subject: Subject) -> str:
    with safe_open(subject.folder / WEIGHTS, "pt") as opened:
        broken = [key for key in subject.shapes if not torch.isfinite(opened.get_tensor(key).float()).all()]
    if broken:
        raise Broken(f"{len(broken)} tensors hold NaN or infinity, the first {broken[0]}", "go back to an earlier checkpoint")
    return "all values are finite"


# What was trained


def trained(subject: Subject) -> str:
    with safe_open(subject.folder / WEIGHTS, "pt") as opened:
        second = [key for key in subject.shapes if "lora_B" in key or "lora_embedding_B" in key]
        zero = [key for key in second if not opened.get_tensor(key).any()]
    if not second:
        raise Broken("there is no B in the file", "this is no LoRA adapter")
    if zero:
        words = "all B are zero" if len(zero) == len(second) else f"{len(zero)} of {len(second)} B are zero, the first {zero[0]}"
        raise Broken(f"{words}: the adapter does nothing there", "it was saved before training, or those layers got no gradient")
    return f"{len(second)} layers, no B is zero"


def rank(subject: Subject) -> str:
    r, alpha = subject.config.get("r"), subject.config.get("lora_alpha")
    ranks = {shape[0] for key, shape in subject.shapes.items() if re.search(r"lora_A\.", key)}
    patterned = subject.config.get("rank_pattern") or {}
    if not isinstance(r, int) or not isinstance(alpha, (int, float)) or not alpha > 0:
        raise Broken(f"the config has r = {r!r} and lora_alpha = {alpha!r}", "both are positive numbers of the training run")
    if ranks - {r} - set(patterned.values()):
        raise Broken(
            f"the config says r = {r}, the factors have rank {', '.join(map(str, sorted(ranks)))}", "put the config of the run back"
        )
    if subject.record and (told := subject.recorded("adapter")) and (told["r"], told["lora_alpha"]) != (r, alpha):
        given = f"trained with r = {told['r']}, alpha = {told['lora_alpha']:g}, the config says r = {r}, alpha = {alpha:g}"
        raise Broken(f"{given}: every update is scaled wrongly", "put the config of the run back")
    root = subject.config.get("use_rslora")
    return f"r = {r}, alpha = {alpha:g}: scale {alpha / (r**0.5 if root else r):.3g}"


def targets(subject: Subject) -> str:
    wanted = subject.config.get("target_modules")
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in subject.shapes if ".lora_A." in key}

    def chosen(name: str) -> bool:
        if isinstance(wanted, str):
            return wanted == "all-linear" or bool(re.fullmatch(wanted, name))
        return any(name == each or name.endswith(f".{each}") for each in wanted or ())

    if outside := sorted(name for name in names if not chosen(name)):
        raise Broken(
            f"{len(outside)} layers have factors and are no targets, such as {outside[0]}: they would not be loaded", "mend target_modules"
        )
    if isinstance(wanted, list) and (idle := [each for each in wanted if not any(n == each or n.endswith(f".{each}") for n in names)]):
        raise Broken(f"{', '.join(idle[:3])} are targets without factors: they would start at random or fail", "mend target_modules")
    return f"{len(names)} layers, each a target"


# The base


def base_fits(subject: Subject) -> str:
    dtype = subject.record["base"]["dtype"] if subject.record else "float32"
    try:
        subject.base, subject.base_tokenizer = models.load(subject.base_name, getattr(torch, dtype))
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise Broken(f"the base can't be loaded: {error}", "name the base that it was trained on") from None
    modules = dict(subject.base.named_modules())
    for key, shape in subject.shapes.items():
        name = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if ".lora_" not in key:
            continue
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise Broken(f"the base has no layer {name}", "the adapter is of another model")
        place = 1 if ".lora_A" in key else 0
        if shape[place] != weight.shape[place]:
            got = f"{name} is {tuple(weight.shape)} in the base, and the adapter's factor {shape}"
            raise Broken(f"{got}", "the adapter is of another model, or of another size of it")
    return f"every layer is there and of the right size ({subject.base.config.model_type})"


def base_hash(subject: Subject) -> str:
    wanted = subject.recorded("base")["sha256"]
    if (found := bases.weights_hash(subject.base)) != wanted:
        words = f"the base's weights have SHA-256 {found[:12]}…, it was trained on {wanted[:12]}…"
        raise Broken(f"{words}: same sizes, other weights", "serve the revision that it was trained on, or train again")
    return f"SHA-256 {wanted[:12]}…, as trained on"


# Words in, words out


def tokenizer(subject: Subject) -> str:
    try:
        subject.tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    except Exception as error:  # of many kinds, by what is missing
        raise Broken(f"the adapter has no tokenizer that can be read ({type(error).__name__})", "save it beside the adapter") from None
    own, others = subject.tokenizer.get_vocab(), subject.base_tokenizer.get_vocab()
    rows = subject.base.get_input_embeddings().weight.shape[0]
    if len(own) > rows or max(own.values()) >= rows:
        raise Broken(f"the tokenizer has {len(own)} tokens, the base {rows} rows", "save the extended base, or the tokenizer of this base")
    if moved := [token for token, number in others.items() if own.get(token) != number]:
        raise Broken(
            f"{len(moved)} tokens have another id than in the base's tokenizer, such as {moved[0]!r}", "put the run's tokenizer back"
        )
    if subject.record and bases.vocabulary_hash(subject.tokenizer) != subject.recorded("tokenizer")["sha256"]:
        raise Broken("the vocabulary is not the one of the training run", "put the run's tokenizer back")
    return f"{len(own)} tokens, ids as in the base"


def template(subject: Subject) -> str:
    if not subject.tokenizer.chat_template:
        raise Broken("the tokenizer has no chat template: the server will use one of its own", "save the template of the run with it")
    wanted = subject.recorded("rendered")
    for each in wanted:
        ids = render_ids(subject.tokenizer, each["messages"], True)
        if ids != each["ids"]:
            place = next(
                (i for i, pair in enumerate(zip(ids, each["ids"], strict=False)) if pair[0] != pair[1]), min(len(ids), len(each["ids"]))
            )
            got = subject.tokenizer.convert_ids_to_tokens(ids[place : place + 1]) or ["nothing"]
            words = f"a conversation of the run renders otherwise now: token {place + 1} is {got[0]!r}"
            raise Broken(f"{words}, and the prompt has {len(ids)} tokens for {len(each['ids'])}", "put the template of the run back")
    return f"{len(wanted)} conversations render to the same tokens"


def end(subject: Subject) -> str:
    wanted = bases.end_of_turn(subject.tokenizer)
    if subject.tokenizer.eos_token_id != wanted:
        words = f"the template ends a turn with id {wanted}, the tokenizer's end of text is {subject.tokenizer.eos_token_id}"
        raise Broken(f"{words}: generation would not stop", "set eos_token to the end of turn")
    file = subject.folder / "generation_config.json"
    if file.is_file():
        stops = json.loads(file.read_text()).get("eos_token_id")
        if wanted not in (stops if isinstance(stops, list) else [stops]):
            raise Broken(f"generation_config.json stops at {stops}, a turn ends with {wanted}", "set eos_token_id to the end of turn")
    return f"a turn ends with id {wanted}, and generation stops there"


# The numbers


def _rows(subject: Subject) -> list[Example]:
    return [Example(tuple(each["ids"]), tuple(each["labels"])) for each in subject.recorded("rows")]


def reload(subject: Subject) -> str:
    if subject.method == "qlora":
        subject.model = export.load_base(subject.base_name, "qlora", subject.record["base"]["dtype"])
    else:
        subject.model = subject.base
    try:
        load_adapter(subject.model, subject.folder)
    except (ValueError, TypeError) as error:
        raise Broken(f"it does not load: {error}", "export again") from None
    subject.model.eval()
    losses, _ = evaluate.row_losses(subject.model, _rows(subject), subject.tokenizer.pad_token_id or 0)
    wanted = torch.tensor([each["loss"] for each in subject.recorded("rows")], dtype=torch.float64)
    far = (losses - wanted).abs().max().item()
    if far > SAME_LOSS:
        raise Broken(
            f"losses of the run's rows are off by up to {far:.3f} nats", "this is not what was evaluated: base, config or weights differ"
        )
    return f"losses of {len(wanted)} rows within {far:.1e} nats of the run's"


def served(subject: Subject) -> str:
    r, server = subject.config["r"], subject.server
    if r > server.max_rank:
        allowed = next((each for each in SERVED_RANKS if each >= r), None)
        raise Broken(f"rank {r}, and the server takes {server.max_rank} at most", f"start it with {allowed}, or train a smaller rank")
    beside = [key for key in ("modules_to_save", "trainable_token_indices") if subject.config.get(key)]
    if beside and not server.loads_rows:
        raise Broken(f"{', '.join(beside)}: the server loads factors only", "serve the merged model, or an extended base without new rows")
    if subject.config.get("bias", "none") != "none" or subject.config.get("use_dora"):
        raise Broken("trained biases or DoRA: few servers load them", "serve the merged model")
    return f"rank {r} of at most {server.max_rank}" + f"; {', '.join(beside)} beside the factors" * bool(beside)


def licence(subject: Subject) -> str:
    card = subject.folder / "README.md"
    told = re.search(r"^license:\s*(\S+)", card.read_text(), re.MULTILINE) if card.is_file() else None
    stated = (subject.record or {}).get("licence") or (told[1] if told and told[1] != "unknown" else "")
    if not stated:
        raise Broken("no licence is named, neither in the card nor in the record", "name it: an adapter inherits its base's terms")
    return stated


@torch.no_grad()
def cost(subject: Subject) -> str:
    """Memory and latency at the stated mix: what one forward of a batch takes with the adapter beside the weights, and with it merged."""
    server, row = subject.server, list(_rows(subject)[0].ids)
    ids = torch.tensor([row] * server.rows, device=next(subject.model.parameters()).device)
    beside = _milliseconds(subject.model, ids)
    plain = export.load_base(subject.base_name, subject.method, subject.record["base"]["dtype"]).eval()
    alone = _milliseconds(plain, ids)
    size = (subject.folder / WEIGHTS).stat().st_size
    return (
        f"{server.adapters} adapters take {show_bytes(server.adapters * size)} beside the base; "
        f"a batch of {server.rows} × {len(row)} tokens takes {beside:.1f} ms with the adapter and {alone:.1f} ms without, here"
    )


def _milliseconds(model: nn.Module, ids: torch.Tensor, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        model(input_ids=ids, use_cache=False).logits[0, 0, 0].item()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def merged(subject: Subject) -> str:
    """Merge by the right way and ask the run's rows again; the last check, since it changes the model."""
    examples, pad = _rows(subject), subject.tokenizer.pad_token_id or 0
    wanted, counts = evaluate.row_losses(subject.model, examples, pad)
    layers = dict(lora_layers(subject.model))
    try:
        merge_into_dequantized(subject.model) if subject.method == "qlora" else merge_lora(subject.model)
    except (ValueError, TypeError) as error:
        raise Broken(f"it can't be merged: {error}", "serve it unmerged, or train again") from None
    now, _ = evaluate.row_losses(subject.model, examples, pad)
    lost = ((now - wanted) * counts).sum().item() / counts.sum().item()
    if abs(lost) > subject.tolerance:
        raise Broken(
            f"merging changes the loss by {lost:+.3f} nats per target", "merge into the weights that it was trained on, in a wider dtype"
        )
    told = (subject.record or {}).get("merge")
    if told and told["error"] > SAME_MERGE:
        raise Broken(f"the run's own merge was off by {told['error']:.1e} of the trained weights", "merge again, in a wider dtype")
    return f"{len(layers)} layers; the loss of the run's rows moves by {lost:+.1e} nats"


CHECKS: Mapping[str, tuple[tuple[str, ...], Callable[[Subject], str]]] = {
    "files": ((), files),
    "unchanged since export": (("files",), unchanged),
    "finite values": (("files",), finite),
    "trained": (("files",), trained),
    "rank and alpha": (("files",), rank),
    "targets": (("files",), targets),
    "base fits": (("files",), base_fits),
    "base's weights": (("base fits",), base_hash),
    "tokenizer": (("base fits",), tokenizer),
    "template": (("tokenizer",), template),
    "end of turn": (("tokenizer", "template"), end),
    "server's limits": (("files",), served),
    "licence": (("files",), licence),
    "reloaded answers": (("finite values", "rank and alpha", "targets", "base fits", "tokenizer"), reload),
    "memory and latency": (("reloaded answers",), cost),
    "merge": (("reloaded answers",), merged),
}
