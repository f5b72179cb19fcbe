"""A Llama whose training step wastes no memory and waits for no launch.

Begin at :mod:`reference.llama.model`.
"""

from reference.llama.model import Llama

__all__ = ["Llama"]
