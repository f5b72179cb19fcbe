"""What several exercises of unit 06 need."""

from collections.abc import Mapping
from typing import Any

BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a quantized weight: code, 8-bit scale, scale of the scales


def entries(found: object, *names: str) -> Any:
    """Of a dictionary the entries that were asked for; anything else as it is, so that the learner hears what it is."""
    return {name: found[name] for name in names if name in found} if isinstance(found, Mapping) else found
