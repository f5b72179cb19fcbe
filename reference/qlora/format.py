"""A quantized layer's tensors under bitsandbytes' own names: each side reads the other's files.

Beside ``weight``, the packed codes, a layer's ``state_dict`` holds

    weight.absmax             float32 (blocks,); under double quantization uint8 codes, as many
    weight.quant_map          float32 (16,): the levels
    weight.nested_absmax      float32 (blocks of scales,)        } with double quantization
    weight.nested_quant_map   float32 (256,)                     }
    weight.quant_state.bitsandbytes__nf4
                              uint8: the bytes of a JSON object, which says the rest (shape, block
                              size, dtype, offset)

A file of tensors has no place for numbers and words, so those are written as text and the text as
bytes.
"""

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from reference.double_quant import dynamic_codebook
from reference.nf4 import NF4_CODEBOOK, NF4Tensor
from reference.qlora.product import PARTS, SCALES_BLOCK, join, parts

STATE = "quant_state.bitsandbytes__nf4"
NAMES = "absmax", "quant_map", "nested_absmax", "nested_quant_map"


def split(state: Mapping[str, Tensor], start: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The entries above, named by what follows ``start`` ("layer.weight."); and all others."""
    entries, others = {}, {}
    for key, value in state.items():
        name = key.removeprefix(start)
        ours = key.startswith(start) and (name in NAMES or name.startswith("quant_state."))
        (entries if ours else others)[name if ours else key] = value
    return entries, others


def write_state(q: NF4Tensor) -> dict[str, Tensor]:
    """The entries that stand beside ``weight``, by what follows "weight." in their names."""
    words = {
        "quant_type": "nf4",
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    _, absmax, nested, offset = parts(q)
    entries = {"absmax": absmax, "quant_map": NF4_CODEBOOK.to(absmax.device, copy=True)}
    if nested is not None:
        words |= {"nested_blocksize": SCALES_BLOCK, "nested_dtype": "float32"}
        words |= {"nested_offset": offset.item()}
        levels = dynamic_codebook().to(absmax.device)
        entries |= {"nested_absmax": nested, "nested_quant_map": levels}
    return entries | {STATE: torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)}


def read_state(weight: Tensor | None, entries: dict[str, Tensor], held: NF4Tensor) -> NF4Tensor:
    """Check a layer's entries and give the weight that they stand for.

    Args:
        weight: the entry "weight".
        entries: those beside it, named as :func:`write_state` names them.
        held: what the layer holds now, with tensors of the same shapes; its dtype may be another.

    Raises:
        ValueError: an entry is missing, damaged or of another layer; the message says which and
            what would fit.
    """
    words = _words(entries)
    sizes = {"shape": list(held.shape), "block_size": held.block_size}
    for name, here in sizes.items():
        if (there := words.get(name.replace("_", ""))) != here:
            raise ValueError(f"{name} is {there} there and {here} in this layer")
    dtype = getattr(torch, str(words.get("dtype")), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{STATE} names no dtype of a weight: {words.get('dtype')!r}")
    expected = dict(zip(PARTS, parts(held), strict=True))
    nested = "nested_absmax" in entries
    if nested != (expected["nested_absmax"] is not None):
        load = f"load it into a layer with double_quant={nested}"
        raise ValueError(f"its scales are {'' if nested else 'not '}quantized: {load}")
    if weight is not None and weight.dtype != torch.uint8 and weight.is_contiguous():
        # bitsandbytes may keep the same bytes under another dtype (quant_storage).
        weight = weight.view(torch.uint8).view(-1, 1)
    found = {"weight": weight, "absmax": entries.get("absmax")}
    offset = _offset(words) if nested else None
    if nested:
        found["nested_absmax"] = entries["nested_absmax"]
        offset = torch.tensor(offset, device=entries["nested_absmax"].device)
    for name, tensor in found.items():
        _check(name, tensor, expected[name].dtype, expected[name].shape)
    _check_map("quant_map", entries, NF4_CODEBOOK)
    if nested:
        _check_map("nested_quant_map", entries, dynamic_codebook())
    tensors = weight, entries["absmax"], entries.get("nested_absmax"), offset
    return join(*tensors, held.shape, dtype, held.block_size)


def check_bias(there: Tensor | None, here: Tensor | None, strict: bool) -> None:
    """Raise unless the stored bias is one for a layer with the bias ``here``."""
    if (there is None) != (here is None) and strict:
        theirs, ours = ("no", "a") if there is None else ("a", "none")
        raise ValueError(f"it has {theirs} bias, and this layer has {ours}")
    if there is not None and here is not None and there.shape != here.shape:
        raise ValueError(f"bias must have shape {tuple(here.shape)}, got {tuple(there.shape)}")


def _offset(words: dict) -> float:
    if words.get("nested_blocksize") != SCALES_BLOCK or words.get("nested_dtype") != "float32":
        wanted = f"quantized from float32 in blocks of {SCALES_BLOCK}"
        raise ValueError(f"its scales must be {wanted}: {json.dumps(words)}")
    offset = words.get("nested_offset")
    if not isinstance(offset, float) or not math.isfinite(offset):
        raise ValueError(f"nested_offset must be a finite number, got {offset!r}")
    return offset


def _words(entries: dict[str, Tensor]) -> dict:
    """The JSON object among the entries."""
    if STATE not in entries:
        prefix = "quant_state.bitsandbytes__"
        other = [name.removeprefix(prefix) for name in entries if name.startswith("quant_state.")]
        if other:
            raise ValueError(f"quant_type is {other[0]} there; this layer holds nf4")
        remedy = "Load it into nn.Linear, then NF4Linear.from_linear"
        raise ValueError(f"weight.{STATE} is missing: this is no quantized weight. {remedy}")
    try:
        words = json.loads(bytes(entries[STATE].cpu().tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{STATE} can't be read: {error}") from None
    kind = words.get("quant_type") if isinstance(words, dict) else None
    if kind != "nf4":
        raise ValueError(f"quant_type is {kind} there; this layer holds nf4")
    return words


def _check(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: torch.Size) -> None:
    if tensor is None:
        raise ValueError(f"{'weight' if name == 'weight' else f'weight.{name}'} is missing")
    if tensor.dtype != dtype or tensor.shape != shape:
        got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise ValueError(f"{name} must be {dtype} of shape {tuple(shape)}, got {got}")
    if dtype == torch.float32 and not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinity")


def _check_map(name: str, entries: dict[str, Tensor], levels: Tensor) -> None:
    _check(name, entries.get(name), torch.float32, levels.shape)
    if (entries[name].cpu() - levels).abs().max() > 1e-6:
        raise ValueError(f"{name} holds other levels than this layer computes with")
