"""Adapters in PEFT's files: begin at :mod:`reference.adapter_format.files`, LoRA's."""

from reference.adapter_format.config import SILENT
from reference.adapter_format.family import READ, load_adapter, load_prompt, save_adapter

__all__ = ["READ", "SILENT", "load_adapter", "load_prompt", "save_adapter"]
