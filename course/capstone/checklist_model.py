"""Checks of the loaded adapter: what it answers, what the server takes, what it costs, and its merge."""

import re
import statistics
import time

import torch
from torch import nn

from course.capstone import evaluate, export
from course.capstone.checklist_subject import WEIGHTS, Broken, NotKnown, Subject
from course.lab.meters import show_bytes
from reference.adapter_format import load_adapter
from reference.instruct import Example
from reference.lora import lora_layers, merge_lora
from reference.qlora import merge_into_dequantized

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank can be
SAME_LOSS, SAME_MERGE = 1e-3, 1e-2  # nats, relative: dtypes and devices round otherwise; a wrong base is further


def _rows(subject: Subject) -> list[Example]:
    rows = [Example(tuple(each["ids"]), tuple(each["labels"])) for each in subject.recorded("rows")]
    if not rows:
        raise NotKnown("the record holds no row to ask again: export with course capstone")
    return rows


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
    told = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) if card.is_file() else None
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
