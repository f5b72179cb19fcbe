"""A quantized layer's tensors under bitsandbytes' own names, so that either side reads what the other wrote.

Beside ``weight``, the packed codes, a layer's ``state_dict`` holds

    weight.absmax             float32 (blocks,); with double quantization uint8 codes of the same shape
    weight.quant_map          float32 (16,): the levels
    weight.nested_absmax      float32 (blocks of scales,)        } with double quantization
    weight.nested_quant_map   float32 (256,)                     }
    weight.quant_state.bitsandbytes__nf4     uint8: the bytes of a JSON object, which says the rest (shape, block size, dtype, offset)

A file of tensors has no place for numbers and words, so those are written as text and the text as bytes.
"""

import json
import math

import torch
from torch import Tensor

from reference.double_quant import dynamic_codebook
from reference.nf4 import NF4_CODEBOOK
from reference.qlora.product import SCALES_BLOCK, Layout, Packed

STATE = "quant_state.bitsandbytes__nf4"


def belongs(name: str) -> bool:
    """Whether ``name``, which follows "weight.", is one of the entries above."""
    return name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map") or name.startswith("quant_state.")


def write_state(packed: Packed, layout: Layout) -> dict[str, Tensor]:
    """The entries that stand beside ``weight``, by what follows "weight." in their names."""
    words = {
        "quant_type": "nf4",
        "blocksize": layout.block_size,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "shape": list(layout.shape),
    }
    entries = {"absmax": packed.absmax, "quant_map": NF4_CODEBOOK.to(packed.absmax.device, copy=True)}
    if packed.nested_absmax is not None:
        words |= {"nested_blocksize": SCALES_BLOCK, "nested_dtype": "float32", "nested_offset": packed.offset.item()}
        entries |= {"nested_absmax": packed.nested_absmax, "nested_quant_map": dynamic_codebook().to(packed.absmax.device)}
    return entries | {STATE: torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)}


def read_state(weight: Tensor | None, entries: dict[str, Tensor], layout: Layout, double_quant: bool) -> tuple[Packed, torch.dtype]:
    """Check a layer's entries and give its tensors, and the dtype that its weight had.

    Args:
        weight: the entry "weight".
        entries: those beside it, named as :func:`write_state` names them.
        layout, double_quant: of the layer that is to hold them; ``layout.dtype`` may be another one.

    Raises:
        ValueError: an entry is missing, damaged or of another layer; the message says which and what would fit.
    """
    words = _words(entries)
    for key, name, wanted in (("shape", "shape", list(layout.shape)), ("blocksize", "block_size", layout.block_size)):
        if words.get(key) != wanted:
            raise ValueError(f"{name} is {words.get(key)} there and {wanted} in this layer")
    dtype = getattr(torch, str(words.get("dtype")), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{STATE} names no dtype of a weight: {words.get('dtype')!r}")
    nested = "nested_absmax" in entries
    if nested != double_quant:
        raise ValueError(f"its scales are {'' if nested else 'not '}quantized: load it into a layer with double_quant={nested}")
    if weight is not None and weight.dtype != torch.uint8 and weight.is_contiguous():
        weight = weight.view(torch.uint8).view(-1, 1)  # bitsandbytes may keep the same bytes under another dtype (quant_storage)
    tensors = {"weight": (weight, torch.uint8, layout.packed_shape)}
    tensors["absmax"] = (entries.get("absmax"), torch.uint8 if nested else torch.float32, (layout.blocks,))
    offset = None
    if nested:
        if words.get("nested_blocksize") != SCALES_BLOCK or words.get("nested_dtype") != "float32":
            raise ValueError(f"its scales must be quantized from float32 in blocks of {SCALES_BLOCK}: {json.dumps(words)}")
        tensors["nested_absmax"] = (entries["nested_absmax"], torch.float32, (-(layout.blocks // -SCALES_BLOCK),))
        offset = words.get("nested_offset")
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise ValueError(f"nested_offset must be a finite number, got {offset!r}")
        offset = torch.tensor(offset, device=entries["nested_absmax"].device)
    for name, (tensor, kind, shape) in tensors.items():
        _check(name, tensor, kind, shape)
    _check_map("quant_map", entries, NF4_CODEBOOK)
    if nested:
        _check_map("nested_quant_map", entries, dynamic_codebook())
    return Packed(weight, entries["absmax"], entries.get("nested_absmax"), offset), dtype


def _words(entries: dict[str, Tensor]) -> dict:
    """The JSON object among the entries."""
    if STATE not in entries:
        other = [name.removeprefix("quant_state.bitsandbytes__") for name in entries if name.startswith("quant_state.")]
        if other:
            raise ValueError(f"quant_type is {other[0]} there; this layer holds nf4")
        raise ValueError(f"weight.{STATE} is missing: this is no quantized weight. Load it into nn.Linear, then NF4Linear.from_linear")
    try:
        words = json.loads(bytes(entries[STATE].cpu().tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{STATE} can't be read: {error}") from None
    if not isinstance(words, dict) or words.get("quant_type") != "nf4":
        raise ValueError(f"quant_type is {words.get('quant_type') if isinstance(words, dict) else None} there; this layer holds nf4")
    return words


def _check(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is None:
        raise ValueError(f"{'weight' if name == 'weight' else f'weight.{name}'} is missing")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {dtype} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    if dtype == torch.float32 and not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinity")


def _check_map(name: str, entries: dict[str, Tensor], levels: Tensor) -> None:
    _check(name, entries.get(name), torch.float32, tuple(levels.shape))
    if (entries[name].cpu() - levels).abs().max() > 1e-6:
        raise ValueError(f"{name} holds other levels than this layer computes with")
