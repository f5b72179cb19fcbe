"""How many numbers LoRA trains."""

import re

import torch

from course.checking import Check, but
from course.checks.lora.shared import MATCHED_TOO_MUCH, after_dot, is_target, last_word


def lora_parameters(shapes, r, targets, *, match=is_target, chosen=list, each=lambda out, inn, r: r * (out + inn)) -> int:
    """The worked answer: r·(in + out) for every layer that a target names."""
    names = [name for name in shapes if match(name, targets)]
    return sum(each(*shapes[name], r) for name in chosen(names))


def by_expression(shapes: dict[str, tuple[int, int]], r: int, targets: list[str]) -> int:
    """Names matched by a regular expression."""
    named = re.compile(rf"(.+\.)?({'|'.join(map(re.escape, targets))})")
    return r * sum(sum(shape) for name, shape in shapes.items() if named.fullmatch(name))


def any_word(name: str, targets: list[str]) -> bool:
    return is_target(name, targets) or any(target in name.split(".") for target in targets)


def last_words_alone(name: str, targets: list[str]) -> bool:
    return last_word(name, [target.split(".")[-1] for target in targets])


def observe(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    hidden, layers = 32 * draw(3, 9), draw(2, 5)
    kv, wide = hidden // 4, hidden * 3 + draw(1, 30)
    one = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "self_attn.xq_proj": (2 * hidden, kv), "self_attn.q_proj_gate": (kv, kv),
        "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide), "adapter.up_proj": (kv, wide),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in one.items()} | {"lm_head": (977, hidden)}
    two_names_of_one_layer = ["q_proj", "self_attn.q_proj"]
    one_name = (["down_proj"], ["mlp.up_proj"], ["model.layers.1.self_attn.k_proj"], ["self_attn"])
    cases = (["q_proj", "v_proj"], ["lm_head", "o_proj"], two_names_of_one_layer, *one_name)
    ranks = [draw(2, 40) for _ in cases]
    return {f"r = {r}, targets {targets}": answer(shapes, r, targets) for r, targets in zip(ranks, cases, strict=True)}


check = Check(
    task="counting LoRA's parameters, in any shapes and for any targets",
    observe=observe,
    reference=lora_parameters,
    second=by_expression,
    misconceptions={
        "r·in·out is not low rank at all: A has r·in numbers and B has out·r, so r·(in + out)": but(each=lambda out, inn, r: r * inn * out),
        "only A was counted: B has out·r numbers too": but(each=lambda out, inn, r: r * inn),
        "only B was counted: A has r·in numbers too": but(each=lambda out, inn, r: r * out),
        "2·r·in takes every matrix for a square one: k_proj and v_proj are narrower under grouped queries, MLPs wider; use r·(in + "
        "out)": but(each=lambda out, inn, r: 2 * r * inn),
        "2·r·out takes every matrix for a square one: use r·(in + out)": but(each=lambda out, inn, r: 2 * r * out),
        "the rank is missing: each of A and B is r times as large": but(each=lambda out, inn, r: inn + out),
        "biases were counted: LoRA adds two factors and no bias": but(each=lambda out, inn, r: r * (inn + out) + out),
        "the frozen weights were counted: only A and B train": but(each=lambda out, inn, r: inn * out),
        "frozen and trained were added: only A and B train": but(each=lambda out, inn, r: inn * out + r * (inn + out)),
        **MATCHED_TOO_MUCH,
        "only the last word of a name was compared: a target may hold dots, such as 'mlp.up_proj', or be a full name": but(match=last_word),
        "a full name has no dot before it: the target 'lm_head' names the layer lm_head": but(match=after_dot),
        "a target was looked for among all words of a name: 'self_attn' is a block, not a linear layer; compare with the end of the "
        "name": but(match=any_word),
        "only the last words were compared: the targets 'mlp.up_proj' and 'adapter.up_proj' differ": but(match=last_words_alone),
        "only one layer was counted: a target matches in every layer of the model": but(chosen=lambda names: names[:1]),
        "the targets were ignored: count the layers whose names match": but(match=lambda name, targets: True),
    },
)
