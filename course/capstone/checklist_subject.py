"""What the checks of an audit look at, and how they say what they found."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from course.capstone import export

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Server:
    """What will run the adapter.

    Attributes:
        max_rank: the largest rank that it was started for.
        adapters: how many are resident at once, for the memory.
        rows: of a batch, for the latency.
        loads_rows: whether it takes embeddings' rows and whole modules beside factors.
    """

    max_rank: int = 64
    adapters: int = 8
    rows: int = 8
    loads_rows: bool = True


class Broken(Exception):
    """What a check found, and what to do."""

    def __init__(self, found: str, remedy: str):
        super().__init__(found)
        self.found, self.remedy = found, remedy


class NotKnown(Exception):
    """The adapter does not say enough for this check."""


@dataclass
class Subject:
    """What the checks look at; parts appear as checks before have read them."""

    folder: Path
    base_name: str
    server: Server
    tolerance: float
    config: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    tokenizer: Any = None
    base: nn.Module | None = None
    base_tokenizer: Any = None
    model: nn.Module | None = None

    @property
    def method(self) -> str:
        return self.recorded("base")["method"] if self.record else "lora"

    def recorded(self, key: str) -> Any:
        if self.record is None or key not in self.record:
            raise NotKnown(f"{export.RECORD} does not tell: export with course capstone, or keep such a record")
        return self.record[key]
