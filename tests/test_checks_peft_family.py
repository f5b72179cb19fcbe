"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused. And the judges' arithmetic is the reference's."""

import copy
import importlib
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course.checking import NotYet, mistaken
from course.checks import peft_family as check
from course.checks.peft_family.dora import dora
from course.checks.peft_family.encoder import p_tuning_numbers
from course.checks.peft_family.fusion import fuse
from course.checks.peft_family.merge import merge_ia3
from course.checks.peft_family.prefix import attend, rotate
from reference.bottleneck import Bottleneck
from reference.fusion import Fusion
from reference.ia3 import IA3Layer
from reference.lora.dora import DoRALinear
from reference.soft_prompts import PromptEncoder

choosing = importlib.import_module("course.checks.peft_family.choose")  # the package hands on the check under that name


def refused(judge, answer):
    for seed in range(3):
        with pytest.raises(NotYet):
            judge._judge(answer, seed)


def accepted(judge, answer):
    for seed in range(3):
        judge._judge(answer, seed)


# ---- the judges' arithmetic


def test_dora_is_the_references():
    torch.manual_seed(0)
    layer, x = DoRALinear(nn.Linear(7, 5), 2, 3), torch.randn(4, 7)
    layer.lora_B.data.normal_()
    layer.lora_magnitude_vector.data.uniform_(0.5, 2)
    factors = layer.lora_A, layer.lora_B, layer.scaling, layer.lora_magnitude_vector
    torch.testing.assert_close(dora(x, layer.base.weight, layer.base.bias, *factors), layer(x))


@pytest.mark.parametrize("feedforward", [False, True])
def test_the_merge_is_the_references(feedforward):
    layer = IA3Layer(nn.Linear(6, 4), feedforward)
    layer.ia3_l.data.uniform_(0.5, 2)
    mine = merge_ia3(layer.base.weight, layer.base.bias, layer.ia3_l.flatten(), feedforward)
    W, b = layer.merged_weight()
    torch.testing.assert_close(mine[0], W)
    torch.testing.assert_close(mine[1], layer.base.bias if b is None else b)


def test_fusion_is_the_references():
    torch.manual_seed(0)
    fusion, h = Fusion([Bottleneck(6, 2) for _ in range(3)]), torch.randn(5, 6)
    for adapter in fusion.adapters:
        adapter.up.weight.data.normal_()
    u = torch.stack([adapter(h) for adapter in fusion.adapters], -2)
    weights = fusion.query.weight, fusion.key.weight, fusion.value.weight
    torch.testing.assert_close(fuse(h, u, *weights), fusion(h))


@pytest.mark.parametrize("network", ["mlp", "lstm"])
def test_the_numbers_are_those_of_the_module(network):
    encoder = PromptEncoder(9, 11, 4, network)
    assert p_tuning_numbers(9, 11, 4, network) == (sum(p.numel() for p in encoder.parameters()), encoder().numel())


def test_attention_without_a_prefix_is_plain_attention():
    q, k, v = torch.randn(3, 5, 4)
    positions = torch.arange(5)
    plain = F.scaled_dot_product_attention(rotate(q, positions), rotate(k, positions), v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, torch.zeros(0, 4), torch.zeros(0, 4)), plain)


# ---- right answers in other dress


def dora_by_columns_of_the_transpose(x, weight, bias, A, B, s, m):
    V = weight.T + s * A.T @ B.T
    return F.linear(x, (V * (m / V.detach().pow(2).sum(0).sqrt())).T, bias)


def merge_by_einsum(weight, bias, scale, feedforward):
    merged = torch.einsum("oi,i->oi" if feedforward else "oi,o->oi", weight, scale)
    return [merged, bias if feedforward or bias is None else torch.mul(bias, scale)]


def attend_by_torch(q, k, v, prefix_k, prefix_v):
    P = len(prefix_k)
    positions = torch.arange(len(q)) + P
    mask = torch.ones(len(q), P + len(q), dtype=torch.bool).tril(P)
    keys = torch.cat([prefix_k, rotate(k, positions)])
    return F.scaled_dot_product_attention(rotate(q, positions), keys, torch.cat([prefix_v, v]), mask)


def fuse_by_matmul(h, u, Q, K, V):
    scores = (u @ K.T) @ (h @ Q.T)[..., None]  # (tokens, n, 1)
    return (scores.softmax(1) * (u @ V.T)).sum(1)


@pytest.mark.parametrize(
    "judge, answer",
    [
        (check.dora, dora_by_columns_of_the_transpose),
        (check.merge, merge_by_einsum),
        (check.prefix, attend_by_torch),
        (check.fusion, fuse_by_matmul),
        (check.encoder, lambda *given: [np.int64(n) for n in p_tuning_numbers(*given)]),
    ],
)
def test_right_answers_in_other_dress(judge, answer):
    accepted(judge, answer)


# ---- wrong ones


def dora_with_dead_magnitudes(x, weight, bias, A, B, s, m):
    return dora(x, weight, bias, A, B, s, m.detach())


def dora_of_a_detached_sum(x, weight, bias, A, B, s, m):
    V = weight + s * B @ A
    return x @ (m[:, None] * V / (V.norm(dim=1, keepdim=True) + 0.01).detach()).T + bias


def merge_without_a_weight(weight, bias, scale, feedforward):
    return None, bias


def merge_that_invents_a_bias(weight, bias, scale, feedforward):
    W, b = merge_ia3(weight, bias, scale, feedforward)
    return W, torch.zeros(len(weight)) if b is None else b


def attend_to_detours(q, k, v, prefix_k, prefix_v):
    return attend(q, k, v, prefix_k.flip(0), prefix_v)


def fuse_hard(h, u, Q, K, V):
    return fuse(h, u, 100 * Q, K, V)


@pytest.mark.parametrize(
    "judge, answer",
    [
        (check.dora, dora_with_dead_magnitudes),
        (check.dora, dora_of_a_detached_sum),
        (check.dora, lambda x, weight, bias, A, B, s, m: F.linear(x, weight, bias)),
        (check.dora, lambda x, weight, bias, A, B, s, m: dora(x, weight, bias, A, B, 1.75, m)),
        (
            check.merge,
            lambda weight, bias, l, ff: (merge_ia3(weight, bias, l, ff)[0] * (bias is not None), merge_ia3(weight, bias, l, ff)[1]),
        ),
        (check.merge, merge_without_a_weight),
        (check.merge, merge_that_invents_a_bias),
        (check.prefix, attend_to_detours),
        (check.prefix, lambda q, k, v, prefix_k, prefix_v: attend(q, k, v, prefix_k[:0], prefix_v[:0])),
        (check.encoder, lambda P, d, h, network: (p_tuning_numbers(P, d, h, "mlp")[0], P * d)),
        (check.encoder, lambda P, d, h, network: (float(p_tuning_numbers(P, d, h, network)[0]), P * d)),
        (check.fusion, fuse_hard),
        (check.fusion, lambda h, u, Q, K, V: u.mean(1)),
        (check.choose, lambda scenario: "LoRA, of course"),
        (check.choose, lambda scenario: None),
    ],
)
def test_wrong_answers_are_refused(judge, answer):
    refused(judge, answer)


@pytest.mark.parametrize(
    "judge, answer, words",
    [
        (check.dora, lambda x, weight, bias, A, B, s, m: dora(x, weight, 0 * bias, A, B, s, m), "the bias is missing"),
        (check.fusion, lambda h, u, Q, K, V: fuse(h, u, Q.T, K.T, V.T), "Q, K and V were multiplied from the other side"),
        (check.prefix, mistaken(attend, place_query=lambda q, positions: q), "the queries are not rotated"),
        (check.prefix, mistaken(attend, hide=lambda scores, sees: scores * sees), "hidden scores became 0"),
        (check.dora, dora_with_dead_magnitudes, "expected 'A, B, magnitude', got 'A, B'"),
        (check.dora, torch.no_grad()(dora), "expected 'A, B, magnitude', got 'nothing'"),
        (check.dora, mistaken(dora, norm=lambda V: V.norm(dim=1)), "the norms multiply columns"),
        (check.merge, lambda W, b, l, ff: (W * l if ff else W * l[:, None], b if b is None else b * l), "the bias is scaled where inputs"),
        (check.merge, lambda W, b, l, ff: (W * l, b if b is None or ff else b * l), "outputs are rows of W, and you scaled its columns"),
        (check.merge, lambda W, b, l, ff: (W * l[:, None], b if b is None or ff else b * l), "inputs are columns of W"),
        (
            check.merge,
            lambda W, b, l, ff: (W * l[:, None] if ff else W * l, b if b is None or ff else b * l),
            "rows and columns are exchanged",
        ),
        (check.choose, lambda scenario: "VeRA" if scenario == "tenants" else choosing.choose(scenario), "VeRA, but its file is larger"),
    ],
)
def test_a_mistake_is_named(judge, answer, words):
    with pytest.raises(NotYet, match=words):
        judge(answer)


# ---- the choice


def test_every_scenario_excludes_and_decides():
    """Its needs leave something out, and the scores leave something more out."""
    for name, scenario in choosing.SCENARIOS.items():
        fit = choosing.ranked(name)
        right = [method for method in choosing.table() if choosing.verdict(name, method) == choosing.FITS]
        assert 0 < len(fit) < len(choosing.table()), name
        assert right and set(right) < set(fit), name
        assert scenario.score in next(iter(choosing.table().values()))


def test_no_single_method_is_right_everywhere():
    for method in choosing.table():
        assert any(choosing.verdict(name, method) != choosing.FITS for name in choosing.SCENARIOS)


def test_a_tie_within_the_seeds_is_accepted(monkeypatch):
    rows = copy.deepcopy(choosing.table())
    best = choosing.ranked("hospital")[0]
    twin = copy.deepcopy(rows[best]) | {"method": "twin", "clinic": rows[best]["clinic"] + 1e-3}
    monkeypatch.setattr(choosing, "table", lambda: rows | {"twin": twin})
    assert choosing.verdict("hospital", "twin") == choosing.FITS
    twin["seeds"] = twin["seeds"] | {"clinic": [value + 5 for value in twin["seeds"]["clinic"]]}
    assert "is better in every seed" in choosing.verdict("hospital", "twin")
    assert math.isfinite(twin["clinic"])
