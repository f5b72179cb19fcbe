"""LoRA adapters in PEFT's files: begin at :mod:`reference.adapter_format.files`."""

from reference.adapter_format.config import READ, SILENT
from reference.adapter_format.files import load_adapter, save_adapter

__all__ = ["READ", "SILENT", "load_adapter", "save_adapter"]
