"""A copy in a stack does what the model does alone: logits, gradients, steps of training, adapters, columns that listen."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from course.lab import models, seed_everything
from course.lab.stacked import Stack, StackedAdam, next_token_losses
from course.lab.training import next_token_loss, train
from course.lab.world import World
from reference.lora import inject_lora, lora_layers
from reference.progressive import ProgressiveNetwork


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny", where=torch.device("cpu"))[0]


def batches(copies, steps, rows=3, length=12):
    world = World()
    return [torch.stack([world.sample("clinic", rows, length, 100 * c + s) for c in range(copies)]) for s in range(steps)]


def trained_stack(stack, steps, lr):
    optimizer = StackedAdam(stack, lr)
    for ids in steps:
        losses = next_token_losses(stack(ids), ids)
        optimizer.step(torch.autograd.grad(losses.sum(), list(stack.trained.values())))
    return losses


def same_step(one, other):
    """To a hundredth: Adam makes steps of gradients that are nothing but rounding."""
    assert (one - other).norm() < 1e-2 * other.norm()


def test_logits_and_losses_are_the_models_own(tiny):
    (ids,) = batches(3, 1)
    logits = Stack(tiny, 3)(ids)
    for one, row in zip(logits, ids, strict=True):
        torch.testing.assert_close(one, tiny(row).logits, rtol=1e-4, atol=1e-4)
    losses = next_token_losses(logits, ids)
    assert losses.tolist() == pytest.approx([next_token_loss(tiny, row).item() for row in ids], rel=1e-4)


def test_copies_train_as_they_would_alone(tiny):
    """Each with its own data and rate; nothing leaks from one to another."""
    steps, lr = batches(2, 4), [1e-3, 4e-3]
    stack = Stack(tiny, 2)
    trained_stack(stack, steps, lr)
    for c in range(2):
        alone = copy.deepcopy(tiny)
        train(alone, lambda s, c=c: steps[s][c], 4, lr[c], progress=False)
        for name, p in alone.named_parameters():
            start = tiny.get_parameter(name)
            same_step(stack.trained[name][c] - start, p - start)


def test_adapters_train_as_they_would_alone(tiny):
    """Rank 2 and rank 5 in one stack: the rows of the smaller that are not its own stay zero."""
    steps, lr = batches(2, 4), [5e-3, 1e-2]
    stack = Stack(tiny, 2, ranks=[2, 5], seeds=[0, 1])
    starts = {name: p.detach().clone() for name, p in stack.trained.items()}
    trained_stack(stack, steps, lr)
    for c, r in enumerate((2, 5)):
        alone = copy.deepcopy(tiny)
        inject_lora(alone, r, 2 * r)
        for name, layer in lora_layers(alone):
            layer.lora_A.data = starts[f"{name}.lora_A"][c, :r].clone()
        train(alone, lambda s, c=c: steps[s][c], 4, lr[c], progress=False)
        for name, layer in lora_layers(alone):
            same_step(stack.delta(name)[c], layer.delta_weight())
        assert not stack.trained["model.layers.0.mlp.up_proj.lora_B"][0, :, 2:].any()


def test_merging_changes_no_output_and_starts_anew(tiny):
    stack = Stack(tiny, 2, ranks=[3, 3], seeds=[0, 1])
    steps = batches(2, 3)
    trained_stack(stack, steps, [1e-2, 1e-2])
    before = stack(steps[0])
    old = stack.merge_and_restart([7, 8])
    torch.testing.assert_close(stack(steps[0]), before, rtol=1e-4, atol=1e-4)
    assert set(old) == set(stack.linears()) and not stack.delta(stack.linears()[0]).any()


class Block(nn.Module):
    """A decoder layer that finds its positions itself."""

    def __init__(self, model, i):
        super().__init__()
        self.layer, self.rotary = model.model.layers[i], model.model.rotary_emb

    def forward(self, h):
        return self.layer(h, position_embeddings=self.rotary(h, torch.arange(h.shape[1])[None]))


def test_a_column_that_listens_is_a_progressive_network(tiny):
    seed_everything(0)
    fresh = LlamaForCausalLM(tiny.config).eval()
    stack = Stack(fresh, 1, seeds=[3], lateral=tiny)

    def blocks(m):
        inner = [Block(m, i) for i in range(4)]
        return [nn.Sequential(m.model.embed_tokens, inner[0]), *inner[1:], nn.Sequential(m.model.norm, m.lm_head)]

    net = ProgressiveNetwork(blocks(tiny), activation=lambda h: h)
    net.add_column(blocks(fresh), lambda i: nn.Linear(128, 128, bias=False) if i < 4 else nn.Linear(128, 349, bias=False))
    with torch.no_grad():
        for i in range(1, 4):
            net.laterals[1][i][0].weight.copy_(stack.trained[f"lateral.{i}"][0])
        net.laterals[1][4][0].weight.zero_()
    (ids,) = batches(1, 1)
    torch.testing.assert_close(stack(ids)[0], net(ids[0]), rtol=1e-4, atol=1e-4)
    for p in tiny.parameters():
        p.requires_grad_(True)
