"""What the tests of unit 10 share: three kinds of models, and the same course of training for a method here and in peft."""

import copy
import warnings

import peft
import torch
import torch.nn.functional as F
from lora_helpers import SIZES, assert_same, tiny_bert, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, 6:] = 0


def tiny_gpt2():
    sizes = dict(n_embd=16, n_layer=2, n_head=4, n_positions=40, initializer_range=0.3)
    off = dict(attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, **sizes, **off))


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}
LINEARS = {  # layers of each kind, by the ends of their names
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "bert": ["query", "value", "dense"],
}
SMALL = SIZES["hidden_size"]


def peft_model(base, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(base), config).eval()


def trained(model):
    """Plain name -> parameter, of all that train; peft's without what it puts around a name."""

    def plain(name):
        name = name.removeprefix("base_model.model.").replace(".default", "")
        return name.removesuffix(".weight") if "lora_" in name or "oft_" in name else name

    return {plain(name): p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def fill(ours, theirs, spread=0.5):
    """The same numbers, away from where they started, for both."""
    mine, other = trained(ours), trained(theirs)
    assert set(mine) == set(other)
    for name, parameter in mine.items():
        assert parameter.shape == other[name].shape, name
        parameter.add_(spread * torch.randn_like(parameter))
        other[name].copy_(parameter)


def logits(model, **more):
    return model(input_ids=IDS, attention_mask=MASK, **more).logits


def assert_parity(ours, theirs, ulps=16, steps=10):
    """Logits, gradients, and what ten steps of AdamW lead to; ``ulps`` of float32's largest entry."""
    pairs = [(trained(ours)[name], other) for name, other in trained(theirs).items()]
    out, expected = logits(ours), logits(theirs)
    assert_same(out, expected, ulps=ulps)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    for mine, other in pairs:
        assert_same(mine.grad, other.grad, ulps=8 * ulps)
    frozen = [p for p in ours.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)
    # eps above its default: Adam divides by the gradient's size, so a last-place difference of a vanishing gradient becomes a whole step
    optimizers = [torch.optim.AdamW(group, lr=1e-2, eps=1e-3) for group in zip(*pairs, strict=True)]
    target = torch.randn_like(out)
    for _ in range(steps):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(logits(model), target).backward()
            optimizer.step()
    for mine, other in pairs:
        assert_same(mine.detach(), other.detach(), ulps=500 * ulps)


def snapshot(model):
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return values, [p.requires_grad for p in model.parameters()], [type(part) for part in model.modules()]


def assert_unchanged(model, before):
    values, *rest = snapshot(model)
    assert rest == list(before[1:]) and list(values) == list(before[0])
    assert all(torch.equal(values[name], tensor) for name, tensor in before[0].items())
