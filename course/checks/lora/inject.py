"""LoRA put into a model: find, freeze, wrap."""

import torch
from torch import Tensor, nn

from course.checking import Check, Seen, but, raised
from course.checks.lora.shared import MATCHED_TOO_MUCH, after_dot, is_target, last_word, nothing, trainable
from reference.lora import LoRALinear, inject_lora


def refuse() -> None:
    raise ValueError("no linear layer is called so")


def freeze_all(model: nn.Module) -> None:
    model.requires_grad_(False)


def as_found(names: list[str], targets) -> list[str]:
    return names


def by_target(names: list[str], targets) -> list[str]:
    """A name as often as there are targets that name it."""
    return names if targets == "all-linear" else [name for target in targets for name in names if is_target(name, [target])]


def inject(
    model, targets, r, lora_alpha, *, walk=nn.Module.named_modules, match=is_target, is_head=lambda name: is_target(name, ["lm_head"]),
    before=nothing, refuse=refuse, freeze=freeze_all, wrapped=as_found, place=setattr, after=nothing, returned=as_found,
) -> list[str]:  # fmt: skip
    """The worked answer: find, freeze, wrap."""
    linears = [name for name, module in walk(model) if isinstance(module, nn.Linear)]
    names = [name for name in linears if (not is_head(name) if targets == "all-linear" else match(name, targets))]
    before(model)
    if not names:
        refuse()
    freeze(model)
    for name in wrapped(names, targets):
        parent, _, last = name.rpartition(".")
        place(model.get_submodule(parent), last, LoRALinear(model.get_submodule(name), r, lora_alpha))
    after(model)
    return returned(names, targets)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attn, self.cross = nn.LayerNorm(width), nn.Module(), nn.Module()
        for attention in (self.attn, self.cross):
            for name in ("q_proj", "xq_proj", "v_proj", "v_proj_gate"):
                attention.add_module(name, nn.Linear(width, width))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        mixed = [a.v_proj(x) * torch.tanh(a.q_proj(x) + a.xq_proj(x)) * a.v_proj_gate(x) for a in (self.attn, self.cross)]
        return x + sum(mixed) + self.mlp(x)


class ToyModel(nn.Module):
    """What a decoder looks like to somebody who walks over its modules: an embedding, blocks, a head."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.xlm_head, self.lm_head_gate = nn.Linear(width, width), nn.Linear(width, width)  # not the head, whatever they are called
        self.lm_head = nn.Linear(width, 9, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.xlm_head(x) * torch.tanh(self.lm_head_gate(x)))


class Inside(nn.Module):
    """A model within another, as vision-language models have it: full names are longer, the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = ToyModel()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(ids)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (2, 5), generator=g)
    r, lora_alpha = (int(torch.randint(*ends, (), generator=g)) for ends in ((2, 5), (5, 9)))
    lists = (["q_proj", "v_proj"], ["attn.q_proj"], ["layers.1.cross.v_proj"], ["lm_head"], ["q_proj", "attn.q_proj"])
    cases = [(targets, ToyModel, f"targets {targets}") for targets in (*lists, "all-linear")]
    for targets, kind, case in (*cases, ("all-linear", Inside, "targets all-linear, the model inside another, as its decoder")):
        torch.manual_seed(seed)  # the same model, however much randomness the answer took before
        model = kind()
        before = model(ids).detach()
        try:
            names = answer(model, targets, r, lora_alpha)
        except ValueError:
            yield case, "refused with a ValueError"
            continue
        yield case, "accepted"
        yield from [(f"{case}: {label}", value) for label, value in after_injecting(model, ids, before, names)]
    for targets in (["no_such_layer"], ["attn"]):  # the second is a block, not a linear layer
        model = ToyModel()
        before = trainable(model)
        yield f"targets {targets}", raised(answer, model, targets, r, lora_alpha)
        yield f"what trains after the error of targets {targets}", "as before" if trainable(model) == before else "changed"


def after_injecting(model: nn.Module, ids: Tensor, before: Tensor, names) -> Seen:
    holders = [name for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "lora_B")]
    yield "layers that are wrapped", ", ".join(sorted(holders))
    yield "what trains", trainable(model)
    yield "the model is in", " and ".join(sorted({"training mode" if module.training else "eval mode" for module in model.modules()}))
    yield "the model's output before training", model(ids).detach() - before
    yield "names returned", sorted(names) if isinstance(names, (list, tuple, set)) else names
    factors = {name: p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}
    down = [p for name, p in factors.items() if name.endswith("A")]
    yield "ranks", sorted({len(p) for p in down})
    yield "lora_A is random", all(p.any().item() for p in down)
    with torch.no_grad():
        for p in factors.values():
            p.fill_(0.1)
        yield "the update of the output when all factors are 0.1", model(ids) - before


check = Check(
    task="injecting LoRA into a model by name: only the targets wrapped, only the adapters training",
    observe=observe,
    reference=inject,
    second=lambda model, targets, r, lora_alpha: inject_lora(model, r, lora_alpha, target_modules=targets),
    misconceptions={
        **MATCHED_TOO_MUCH,
        "only the last word of a name was compared: 'attn.q_proj' and full names are targets too": but(match=last_word),
        "only full names match: 'q_proj' stands for every layer whose name ends in '.q_proj'": but(match=lambda name, names: name in names),
        "full names do not match: a target may be one, such as 'layers.1.cross.v_proj', with no dot before it": but(match=after_dot),
        "'all-linear' wrapped the output head: it means every linear except lm_head": but(is_head=lambda name: False),
        "'all-linear' left out every layer with 'lm_head' anywhere in its name: it leaves out lm_head alone": but(
            is_head=lambda name: "lm_head" in name
        ),
        "'all-linear' left out every layer whose name ends with 'lm_head', such as xlm_head: it leaves out lm_head alone": but(
            is_head=lambda name: name.endswith("lm_head")
        ),
        "'all-linear' knew the head only by its full name: inside another model it is called 'decoder.lm_head'; compare the last word": but(
            is_head=lambda name: name == "lm_head"
        ),
        "the model was put into eval mode: injecting changes layers, and leaves the mode as it is": but(after=lambda model: model.eval()),
        "a layer that two targets name is wrapped twice: ask of each layer whether any target names it": but(wrapped=by_target),
        "a layer that two targets name is returned twice: it is one layer": but(returned=by_target),
        "lm_head is skipped even when it is named: only 'all-linear' leaves it out": but(
            match=lambda name, targets: name != "lm_head" and is_target(name, targets)
        ),
        "only the wrapped layers were frozen: all other parameters still train; freeze the whole model first": but(freeze=nothing),
        "everything was frozen after wrapping, the adapters too: nothing trains; freeze first, then wrap": but(after=freeze_all),
        "layers were wrapped but never put into the model: setattr(parent, last word of the name, wrapped layer)": but(place=nothing),
        "only the model's direct children were looked at: walk with named_modules()": but(walk=nn.Module.named_children, refuse=nothing),
        "a target that matches nothing was accepted: raise a ValueError, else somebody trains nothing and never hears of it": but(
            refuse=nothing
        ),
        "the model was frozen before the error: look for the targets first, change the model after": but(before=freeze_all),
        "nothing was returned: return the names of the layers that were wrapped": but(returned=nothing),
        "only last words were returned: return full names, such as 'layers.0.attn.q_proj'": but(
            returned=lambda names, targets: [name.split(".")[-1] for name in names]
        ),
    },
)
