"""The base model of a run: loaded, able to hold a conversation, and known by a hash.

A base without a chat template gets one. Where its vocabulary has the marks of a known form (Gemma's, ChatML's), that form's. Else three
marks are added, and their rows of the embedding and of the head are trained beside the adapter: an end of turn that nobody trained is never
said.
"""

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from course.lab import chat, instructions, models
from course.lab.devices import device
from course.units import CourseError
from reference.instruct import IGNORED, encode, special_tokens
from reference.lora import inject_lora
from reference.qlora import quantize_linears

MARKS = instructions.MARKS
TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('this template has no system turn') }}{% endif %}"
    "{{ ' <' + message['role'] + '> ' + message['content'] }}{% if message['role'] == 'assistant' %} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
KNOWN = {"<end_of_turn>": "Gemma", "<|im_end|>": "ChatML"}  # the mark of an end of turn -> the form it belongs to
SAMPLE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "a"})


@dataclass
class Base:
    """A base and what was done to it.

    Attributes:
        name: what loads it again: as given, or the folder of the extended base.
        new: ids of the marks that were added; their rows are trained.
        words: what was done, in sentences.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new: tuple[int, ...]
    words: tuple[str, ...]

    @property
    def in_the_world(self) -> bool:
        """Whether it speaks the small world's language, whose text and facts are at hand."""
        words = instructions.world().vocabulary
        return len(self.tokenizer) >= len(words) and self.tokenizer.convert_ids_to_tokens(list(range(len(words)))) == words


def load(name: str, dtype: str, out: Path | None = None, seed: int = 0) -> Base:
    """The base called ``name``, ready for conversations.

    Args:
        out: where the extended base is written if marks are added; None refuses to add any.

    Raises:
        CourseError: it can't be loaded, or would need marks and may not have them.
    """
    try:
        model, tokenizer = models.load(name, getattr(torch, dtype), device())
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise CourseError(str(error)) from None
    name = str(models.TINY) if name == "tiny" else name
    words: list[str] = []
    new: tuple[int, ...] = tuple(tokenizer.convert_tokens_to_ids(list(MARKS))) if is_extended(tokenizer) else ()
    if not tokenizer.chat_template:
        vocabulary = tokenizer.get_vocab()
        if form := next((form for mark, form in KNOWN.items() if mark in vocabulary), None):
            tokenizer.chat_template = chat.template(form)
            words.append(f"the base had no chat template; its vocabulary has the marks of {form}, whose template it gets")
        elif out is None:
            raise CourseError(f"{name} has no chat template and no marks for one: course capstone makes an extended base of it")
        else:
            new = extend(model, tokenizer, seed)
            name = str(save_base(model, tokenizer, out / "base"))
            words.append(
                f"the base had no chat template: {', '.join(MARKS)} were added, and their rows are trained; the extended base is {name}"
            )
    tokenizer = copy.deepcopy(tokenizer)
    end = end_of_turn(tokenizer)
    if end != tokenizer.eos_token_id:
        token = tokenizer.convert_ids_to_tokens(end)
        words.append(f"a turn ends with {token}, not with {tokenizer.eos_token}: generation stops there now")
        tokenizer.eos_token = token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return Base(name, model, tokenizer, new, tuple(words))


def config(name: str) -> PretrainedConfig:
    """The configuration of the base called ``name``; no weights are read.

    Raises:
        CourseError: it can't be loaded.
    """
    try:
        source, options = models.source(name)
        return AutoConfig.from_pretrained(source, **options)
    except (OSError, ImportError, ValueError) as error:
        raise CourseError(f"the configuration of {name!r} can't be read: {error}") from None


def is_extended(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.chat_template) and all(mark in tokenizer.get_vocab() for mark in MARKS)


def extend(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[int, ...]:
    """Add the marks to both, in place. Their rows start at the mean of all rows, and a little noise tells them apart."""
    words = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark, special=True) for mark in MARKS]})
    tokenizer.eos_token, tokenizer.chat_template = MARKS[-1], TEMPLATE
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
            old = weight[:words].float()
            noise = torch.randn(len(MARKS), old.shape[1], generator=generator).to(old.device)
            weight[words : words + len(MARKS)] = (old.mean(0) + 0.1 * old.std() * noise).to(weight.dtype)
    return tuple(range(words, words + len(MARKS)))


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    from course.capstone.checkpoint import whole_folder

    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends the assistant's turn, as the template writes it: the last special token among its targets.

    Raises:
        CourseError: the template writes none, so that a model could not learn to stop.
    """
    try:
        targets = [label for label in encode(tokenizer, SAMPLE, "last").labels if label != IGNORED]
    except ValueError as error:
        raise CourseError(f"the base's chat template can't be trained on: {error}") from None
    special = set(tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer))))
    ends = [each for each in targets if each in special]
    if not ends:
        raise CourseError("the base's chat template writes no special token at the end of a turn: the model could not learn to stop")
    return ends[-1]


def adapt(base: Base, plan: Any) -> nn.Module:
    """Make the base ready to train by the plan, in place: quantized where asked, with factors, new rows trainable."""
    model = base.model
    if plan.method == "full":
        return model.requires_grad_(True)
    if plan.method == "qlora":
        quantize_linears(model, compute_dtype=getattr(torch, plan.dtype))
    torch.manual_seed(plan.seed)
    targets = plan.targets if plan.targets == "all-linear" else list(plan.targets) if isinstance(plan.targets, tuple) else plan.targets
    try:
        inject_lora(model, plan.r, plan.lora_alpha, targets, plan.lora_dropout, trainable_token_indices=new_rows(model, base.new))
    except (TypeError, ValueError) as error:
        raise CourseError(f"the adapter can't be put in: {error}") from None
    return model


def new_rows(model: nn.Module, new: tuple[int, ...]) -> dict[str, list[int]]:
    """Layer -> rows that train; a head that is tied to the embedding has the same."""
    layers = {id(layer): layer for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    names = {id(module): name for name, module in model.named_modules()}
    first = {layer.weight.data_ptr(): names[key] for key, layer in reversed(list(layers.items()))}
    return {name: list(new) for name in first.values()} if new else {}


# What it is


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all weights: one bit changed, or another dtype, is another base."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all tokens with their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])).encode()).hexdigest()
