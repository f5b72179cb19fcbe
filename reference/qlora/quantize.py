"""QLoRA: LoRA on a base whose weights are frozen in four bits.

    y = x · Ŵᵀ + b + s · B·A·x        Ŵ: NF4, frozen        A, B: 32 bits, trained

Ŵ is dequantized for the moment of each product. Gradients flow *through* it to the adapters below,
never *to* it (:mod:`reference.qlora.product`). The base then takes about 4.13 bits a weight instead
of 16, and what is trained, and so Adam's state, is as small as in LoRA. Dettmers et al. 2023,
"QLoRA: Efficient Finetuning of Quantized LLMs". There is no QLoRA layer: it is the LoRA layer over
another base.

    quantize_linears(model)                   # nn.Linear → NF4Linear, one at a time
    inject_lora(model, r=16, lora_alpha=32)   # from reference.lora, as over any base
    ...                                       # train
    merge_into_dequantized(model)             # or another way to a plain model, see merge

This module quantizes models; the layer is in :mod:`reference.qlora.layer`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from reference.blockwise import DTYPES
from reference.lora import lora_layers, replace_layers
from reference.lora.replace import carry_hooks, check_replaceable
from reference.qlora.dense import left_dense
from reference.qlora.layer import NF4Linear

Weights = Callable[[str], Tensor]
Device = torch.device | str | None


def quantize_linears(
    model: nn.Module,
    skip: str | Iterable[str] = ("lm_head",),
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    device: Device = None,
    weights: Weights | None = None,
) -> list[str]:
    """Put an :class:`NF4Linear` in the place of every ``nn.Linear`` of ``model``, one at a time.

    Each layer's 16-bit weight is let go before the next one is touched. A model that was built on
    the meta device, where tensors have shapes and no values, takes its values from ``weights``,
    also one at a time: a 7B model then never exists in 16 bits, anywhere.

    Embeddings, norms and the skipped layers keep their dtype and place. A layer under several names
    is quantized once, for all of them; a weight that it shares with another layer is shared no
    longer. Its hooks around forward and backward go over to the new layer. Left alone are layers
    that are quantized already; subclasses of ``nn.Linear``, whose forward may be their own; layers
    whose weight is computed, or read by the code around them (T5 asks for ``wo.weight.dtype``); and
    what is no ``nn.Linear``. That may be most of a model: a mixture's experts are often one tensor
    of three axes. ``print(dense_report(model))`` tells what stays dense, and how much it is.

    Args:
        skip: layers to leave alone: a full name or whole parts of one ("lm_head", "vision_tower",
            "self_attn.q_proj").
        block_size, double_quant, compute_dtype: see :class:`NF4Linear`.
        device: where each layer is quantized and stays; default: where it is.
        weights: gives the value of a parameter on the meta device by its full name
            ("model.layers.0.mlp.up_proj.weight"); its dtype may be another than the model's. Asked
            for every such parameter and stored buffer, for shared ones under the first name.

    Returns:
        The names of the quantized layers in the order of ``model.named_modules()``, a shared layer
        under its first.

    Raises:
        ValueError: nothing to quantize; a weight with NaN or infinity (by name); a layer inside an
            adapter, with a state-dict hook, or with a forward put on it from outside; a tensor on
            the meta device without ``weights``; an argument out of range. All that is at hand is
            checked before anything is changed. What ``weights`` gives is checked when it comes:
            layers before it are then quantized, the rest is untouched, and a second call goes on
            there.
        TypeError: a weight is not float32, float16 or bfloat16.
    """
    skip = [skip] if isinstance(skip, str) else list(skip)
    dense = left_dense(model)
    linears = (
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module not in dense
    )
    names = [name for name in linears if not any(f".{part}." in f".{name}." for part in skip)]
    _check(model, names, weights)
    options = (block_size, double_quant, compute_dtype)
    NF4Linear(2, 2, False, *options)  # raises if one of them is out of range
    for done, name in enumerate(names):
        try:
            _quantize(model, name, options, device, weights)
        except ValueError as error:
            count = f"{done} of {len(names)} layers are quantized, the rest is as it was"
            raise ValueError(f"{error}; {count}: a second call goes on") from None
    if weights is not None:
        _fill(model, weights, device)
    return names


def _quantize(
    model: nn.Module, name: str, options: tuple, device: Device, weights: Weights | None
) -> None:
    """One layer; when this returns, nothing here refers to its 16-bit weight any more."""
    linear = model.get_submodule(name)
    weight = _value(f"{name}.weight", linear.weight, weights, device)
    bias = _value(f"{name}.bias", linear.bias, weights, device)
    _check_weight(f"{name}.weight", weight)
    if bias is not None and bias is not linear.bias:
        bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    layer = NF4Linear.from_weight(weight, bias, *options).train(linear.training)
    carry_hooks(linear, layer)
    replace_layers(model, {linear: layer})


def _value(name: str, tensor: Tensor | None, weights: Weights, device: Device) -> Tensor | None:
    """``tensor``, or where it has no values, what ``weights`` gives; on ``device``."""
    if tensor is None:
        return None
    value = tensor
    if tensor.is_meta:
        value = weights(name)
        if not isinstance(value, Tensor) or value.shape != tensor.shape or value.is_meta:
            got = type(value).__name__
            if isinstance(value, Tensor):
                got = f"{value.device} tensor of shape {tuple(value.shape)}"
            wanted = f"a tensor of shape {tuple(tensor.shape)}"
            raise ValueError(f"weights({name!r}) must give {wanted}, got a {got}")
        value = value.detach()
    here = device is None or value.device == torch.device(device)
    return value if here else value.detach().to(device)


def _fill(model: nn.Module, weights: Weights, device: Device) -> None:
    """Values for what else is on the meta device: embeddings, norms, skipped layers."""
    filled: dict[int, tuple[Tensor, Tensor]] = {}  # id -> old, so that its id stays taken, and new
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key, old in table.items():
                if old is None or not old.is_meta:
                    continue
                if id(old) not in filled:
                    new = _value(f"{prefix}.{key}".lstrip("."), old, weights, device)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    filled[id(old)] = old, new
                table[key] = filled[id(old)][1]


def _check(model: nn.Module, names: list[str], weights: Weights | None) -> None:
    """Raise whatever can be known before anything is changed."""
    if "" in names:
        remedy = "and can't be replaced in place: use NF4Linear.from_linear(model)"
        raise ValueError(f"model is itself the layer to quantize {remedy}")
    if not names:
        done = sum(isinstance(module, NF4Linear) for module in model.modules())
        beside = f"beside what skip leaves out and {done} layers that are quantized already"
        raise ValueError(f"model holds no nn.Linear to quantize, {beside}")
    inside = {id(part): name for name, layer in lora_layers(model) for part in layer.modules()}
    for name in names:
        linear = model.get_submodule(name)
        if id(linear) in inside or {"lora_A", "lora_B"} & set(name.split(".")):
            reason = "quantize first, then inject; an adapter fits the base it was trained on"
            raise ValueError(f"{inside.get(id(linear), name)} is adapted already: {reason}")
        check_replaceable(name, linear)
        if not linear.weight.is_meta:
            _check_weight(f"{name}.weight", linear.weight)
        for key, tensor in linear._parameters.items():
            if weights is None and tensor is not None and tensor.is_meta:
                remedy = "pass weights, a function from names to tensors"
                raise ValueError(f"{name}.{key} is on the meta device, without values: {remedy}")
    if weights is not None:
        _check_buffers(model)


def _check_buffers(model: nn.Module) -> None:
    for prefix, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            if (buffer := module._buffers[key]) is not None and buffer.is_meta:
                name = f"{prefix}.{key}".lstrip(".")
                problem = "is computed, not stored, and lies on the meta device"
                raise ValueError(f"{name} {problem}: make its module on a real device first")


def _check_weight(name: str, weight: Tensor) -> None:
    if weight.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"{name} is empty, shape {tuple(weight.shape)}: name its layer in skip")
    if not all(torch.isfinite(end) for end in weight.detach().aminmax()):  # NaN spreads to both
        raise ValueError(f"{name} holds NaN or infinity: repair it before it is quantized")
