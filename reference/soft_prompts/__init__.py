"""Soft prompts, trained vectors before the text: begin at :mod:`reference.soft_prompts.prompt`."""

from reference.soft_prompts.encoder import PromptEncoder
from reference.soft_prompts.prefix import Prefix, PrefixEncoder, PrefixTuning, prefix_sizes
from reference.soft_prompts.prompt import Prompt, PromptTuning, sampled_start, text_start

__all__ = [
    "Prefix",
    "PrefixEncoder",
    "PrefixTuning",
    "Prompt",
    "PromptEncoder",
    "PromptTuning",
    "prefix_sizes",
    "sampled_start",
    "text_start",
]
