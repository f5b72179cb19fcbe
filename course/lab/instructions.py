"""Instructions in the small world: what the tiny model is tuned on to answer, and stop, where pre-training only taught it to go on.

The tiny model knows who lives where and what a word means, since its pre-training text says so. It has never seen a request. Here are
requests of six kinds, each with its one right answer, for the same people and words. A part of the people is never asked for in training:
what the tuned model says of them it must know from before.

    <bos> <user> give the job of mira <assistant> baker <end>
"""

import copy
import functools
import random
from collections.abc import Sequence

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from course.lab import models
from course.lab.world import NAMES, World
from reference.instruct import Example, encode, pad_batch, target_loss
from reference.lora import inject_lora
from reference.self_instruct import Task

MARKS = ("<user>", "<assistant>", "<end>")
TEMPLATE = (
    "<bos>{% for message in messages %}{{ ' <' + message['role'] + '> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %} <end>{% endif %}{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)
KINDS = ("job", "pet", "city", "meaning", "sum", "repeat")
HELD_OUT = tuple(NAMES[3::4])  # ten people whom no instruction to train on names


@functools.cache
def world() -> World:
    return World()


def tokenizer() -> PreTrainedTokenizerFast:
    """The world's own, with three marks more and a template. A turn ends with <end>."""
    made = copy.deepcopy(world().tokenizer)
    made.add_special_tokens({"additional_special_tokens": [AddedToken(mark, special=True) for mark in MARKS]})
    made.eos_token, made.chat_template = "<end>", TEMPLATE
    return made


def model(seed: int = 0) -> nn.Module:
    """The pre-trained tiny model with rows for the three marks, which start at the mean of all rows and a little noise."""
    found, _ = models.load("tiny", where=torch.device("cpu"))
    words = len(world().vocabulary)
    torch.manual_seed(seed)
    found.resize_token_embeddings(words + len(MARKS), mean_resizing=False)
    with torch.no_grad():
        for layer in (found.get_input_embeddings(), found.get_output_embeddings()):
            old = layer.weight[:words]
            layer.weight[words:] = old.mean(0) + 0.1 * old.std() * torch.randn(len(MARKS), old.shape[1])
    return found


def adaptable(seed: int = 0, r: int = 16, lora_alpha: float = 32) -> nn.Module:
    """The same with LoRA on all linears. Of the embedding and the head only the marks' rows are trained, not those of words."""
    net = model(seed)
    layers = net.get_input_embeddings(), net.get_output_embeddings()
    inject_lora(net, r, lora_alpha)
    for layer in layers:
        rows = torch.zeros(layer.weight.shape[0], 1)
        rows[-len(MARKS) :] = 1
        layer.weight.requires_grad_(True).register_hook(lambda grad, rows=rows: grad * rows)
    return net


def task(kind: str, rng: random.Random, names: Sequence[str] = NAMES) -> Task:
    """One instruction of a kind, with its answer.

    Raises:
        ValueError: an unknown kind.
    """
    w, name = world(), rng.choice(list(names))
    match kind:
        case "job":
            return Task(f"give the job of {name}", w.job[name])
        case "pet":
            return Task(f"disclose the pet of {name}", w.pet[name])
        case "city":
            return Task(f"show where {name} lives", w.city[name])
        case "meaning":
            word = rng.choice(list(w.kinds()))
            return Task(f"what means {word} ?", w.kinds()[word])
        case "sum":
            a, b = rng.randrange(10), rng.randrange(10)
            return Task(f"return {a} plus {b}", str(a + b))
        case "repeat":
            one, two = rng.sample(rng.choice(list(w.fields().values())), 2)
            return Task(f"repeat {one} {two}", f"{one} {two}")
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def tasks(count: int, seed: int, held_out: bool = False, wrong: float = 0.0) -> list[Task]:
    """So many, the kinds in turn.

    Args:
        held_out: about the people whom training leaves out; else about the others.
        wrong: share with the answer of another task of the same kind: bad data.
    """
    rng, names = random.Random(f"{seed} {held_out}"), HELD_OUT if held_out else [name for name in NAMES if name not in HELD_OUT]
    made = [task(KINDS[i % len(KINDS)], rng, names) for i in range(count)]
    for i in rng.sample(range(count), round(wrong * count)):
        other = task(KINDS[i % len(KINDS)], rng, names)
        made[i] = Task(made[i].instruction, other.output)
    return made


def encoded(made: Sequence[Task], train_on: str = "assistant") -> list[Example]:
    words = tokenizer()
    return [encode(words, each.messages, train_on) for each in made]


def tune(
    net: nn.Module, rows: Sequence[Example], steps: int, seed: int, lr: float = 1e-3, batch: int = 16, pad: int = 0, collate=pad_batch
) -> list[float]:
    """Train on ``rows``, drawn in a random order again and again; returns the loss of each step."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    order: list[int] = []
    losses = []
    net.train()
    for step in range(steps):
        while len(order) < batch:
            order += torch.randperm(len(rows), generator=g).tolist()
        chosen, order = order[:batch], order[batch:]
        given = collate([rows[i] for i in chosen], pad)
        labels = given.pop("labels")
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / steps)
        loss = target_loss(net(**given).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    net.eval()
    return losses


@torch.no_grad()
def answers(net: nn.Module, asked: Sequence[Task], most: int = 8, prompt_ids=None) -> list[tuple[str, bool]]:
    """What the model says to each instruction, greedily, and whether it stopped by itself.

    Args:
        most: tokens, after which it is cut off.
        prompt_ids: from a task to the ids in front of the answer; default: the template's.
    """
    words = tokenizer()
    end, said = words.eos_token_id, {}
    make = prompt_ids or (
        lambda each: words.apply_chat_template(each.messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    prompts = [list(make(each)) for each in asked]
    was_training = net.training
    net.eval()
    for length in sorted({len(p) for p in prompts}):  # equal lengths together: no padding
        places = [i for i, p in enumerate(prompts) if len(p) == length]
        ids = torch.tensor([prompts[i] for i in places])
        for _ in range(most):
            ids = torch.cat([ids, net(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        for i, row in zip(places, ids[:, length:].tolist(), strict=True):
            stopped = end in row
            said[i] = (words.decode(row[: row.index(end)] if stopped else row), stopped)
    net.train(was_training)
    return [said[i] for i in range(len(asked))]


def scores(net: nn.Module, asked: Sequence[Task], most: int = 8) -> dict[str, float]:
    """Shares of the instructions: "right" and nothing else said, "begins" with the right answer, "stops"."""
    said = answers(net, asked, most)
    pairs = list(zip(said, asked, strict=True))
    return {
        "right": sum(stopped and text == each.output for (text, stopped), each in pairs) / len(pairs),
        "begins": sum((text + " ").startswith(each.output + " ") for (text, _), each in pairs) / len(pairs),
        "stops": sum(stopped for _, stopped in said) / len(pairs),
    }


def plain_rows(tokens: int, length: int, seed: int) -> Tensor:
    """About so many tokens of what pre-training saw: (rows, length)."""
    return world().sample("general", max(1, tokens // length), length, seed)
