"""Tensors in a file that can hold nothing else: the safetensors format.

    8 bytes   n, the length of the header, little-endian
    n bytes   JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {"text": "text"}}
    the rest  the tensors' bytes, end to end; offsets count from here

A pickle, which older checkpoints are, is a program: reading one runs it. Here there is nothing to run, and all that can be wrong is a
name or a length, so every length is checked.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` to ``path``, sorted by name.

    Raises:
        TypeError: a value is not a tensor, or of a dtype that is not in ``DTYPES``.
    """
    header, chunks, offset = {"__metadata__": metadata} if metadata else {}, [], 0
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor) or tensor.dtype not in NAMES:
            raise TypeError(f"{name} must be a tensor of a dtype among {', '.join(DTYPES)}; got {getattr(tensor, 'dtype', type(tensor))}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        chunks.append(flat.view(torch.uint8).numpy().tobytes())
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + len(chunks[-1])]}
        offset += len(chunks[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins where any dtype may
    Path(path).write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *chunks]))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors in the file ``path``, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not in this format, or cut off; the message says what is wrong.
    """
    path = Path(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError(f"{path} is not a safetensors file, or is cut off: its first 8 bytes promise a header of {length} bytes")
    try:
        header = json.loads(data[8 : 8 + length])
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = sorted((start, stop, name) for name, entry in entries.items() for start, stop in [entry["data_offsets"]])
        expected = {name: math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize for name, entry in entries.items()}
        valid = all(type(size) is int and size >= 0 for entry in entries.values() for size in (*entry["shape"], *entry["data_offsets"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file: its header can't be read ({type(error).__name__}: {error})") from None
    body, end = data[8 + length :], 0
    for start, stop, name in spans:
        if not valid or start != end or stop - start != expected[name]:
            raise ValueError(f"{path} is not a valid safetensors file: {name} does not fill its place in the data")
        end = stop
    if end != len(body):
        raise ValueError(f"{path} is cut off or too long: the header describes {end} bytes of data, the file holds {len(body)}")
    return {name: _tensor(body[slice(*entry["data_offsets"])], entry) for name, entry in entries.items()}


def _tensor(data: bytes, entry: dict) -> Tensor:
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
