"""All that is read and written of PEFT's types, by the type that the config names.

    LORA             reference.adapter_format.files; with DoRA or ranks by layer, .variants
    IA3, VERA, LOHA, LOKR, OFT                      .layers
    PROMPT_TUNING, P_TUNING, PREFIX_TUNING          .prompts

Any other type, and any option that changes the result and is not done here, is refused by name.
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from reference.adapter_format import files, layers, prompts, variants
from reference.adapter_format.config import CONFIG, READ, load_config, write
from reference.adapter_format.keys import inner
from reference.lora import lora_layers
from reference.lora.targets import plain_name
from reference.soft_prompts import PrefixTuning, PromptTuning

READ = READ | set(variants.OWN)  # entries of LoRA's config that are read
Prompted = PromptTuning | PrefixTuning


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    base_model_name_or_path: str | Path | None = None,
    task_type: str = "CAUSAL_LM",
) -> None:
    """Write the adapter of ``model`` into ``directory``, which is created.

    Args:
        model: one with LoRA (DoRA) layers, IA³, VeRA, LoHa, LoKr or OFT; or a
            :class:`PromptTuning` or :class:`PrefixTuning`.
        base_model_name_or_path: what it was trained on.
        task_type: of a soft prompt; by it peft chooses how the model is called.

    Raises:
        ValueError: as :func:`reference.adapter_format.files.save_adapter`. Nothing is written then.
    """
    if isinstance(model, Prompted):
        tensors, config = prompts.contents(model, task_type)
    else:
        model = inner(model)
        low_rank = {plain_name(name): layer for name, layer in lora_layers(model)}
        others = layers.layers_of(model)
        if low_rank and others:
            raise ValueError("model holds LoRA and another type: a file of peft's holds one type")
        if others:
            tensors, config = layers.contents(model, others)
        elif variants.differs(low_rank):
            tensors, config = variants.contents(model, low_rank)
        else:
            return files.save_adapter(model, directory, base_model_name_or_path)
    config["base_model_name_or_path"] = base_model_name_or_path
    files.write_files(directory, tensors, write(config))


def load_adapter(model: nn.Module, directory: str | Path) -> list[str]:
    """Read the adapter in ``directory`` into ``model``; returns the names of its layers.

    Soft prompts stand around a model, not in it: :func:`load_prompt`.

    Raises:
        FileNotFoundError, ValueError: as :func:`reference.adapter_format.files.load_adapter`.
            ``model`` is unchanged then.
    """
    directory, model = Path(directory), inner(model)
    config = load_config(directory)
    kind = config.get("peft_type")
    if kind in prompts.TYPES:
        words = "which stands around the model: call load_prompt(model, directory)"
        raise ValueError(f"{directory / CONFIG}: peft_type is {kind!r}, {words}")
    if kind in layers.TYPES:
        return layers.load_layers(model, directory, config)
    if kind == "LORA" and variants.is_variant(config):
        return variants.load_variant(model, directory, config)
    if kind != "LORA":
        known = ", ".join(("LORA", *layers.TYPES, *prompts.TYPES))
        words = "peft_type must be 'LORA' or another that is read here"
        raise ValueError(f"{directory / CONFIG}: {words} ({known}), got {kind!r}")
    return files.load_adapter(model, directory)


def load_prompt(
    model: nn.Module, directory: str | Path, make_cache: Callable | None = None
) -> Prompted:
    """``model``, frozen, with the soft prompt or prefix in ``directory``.

    Args:
        make_cache: for a prefix, see :class:`reference.soft_prompts.PrefixTuning`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is of another type or shape, not finite, or asks for what is not done here.
    """
    directory = Path(directory)
    config = load_config(directory)
    if config.get("peft_type") not in prompts.TYPES:
        words = f"peft_type must be one of {', '.join(prompts.TYPES)}"
        raise ValueError(f"{directory / CONFIG}: {words}, got {config.get('peft_type')!r}")
    return prompts.load_prompt(inner(model), directory, config, make_cache)
