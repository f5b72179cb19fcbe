"""A hundred tenants' adapters on one card: begin at :mod:`reference.multi_lora.serving.engine`."""

from reference.multi_lora.serving.cache import KVCache, generate, next_logits, token_bytes
from reference.multi_lora.serving.engine import Engine
from reference.multi_lora.serving.pool import AdapterPool, Held, PoolFull
from reference.multi_lora.serving.scheduler import Request, Scheduler

__all__ = [
    "AdapterPool",
    "Engine",
    "Held",
    "KVCache",
    "PoolFull",
    "Request",
    "Scheduler",
    "generate",
    "next_logits",
    "token_bytes",
]
