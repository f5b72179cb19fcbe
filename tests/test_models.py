"""course.lab.models: a model comes as it was saved, or not at all."""

import logging as python_logging

import pytest
import torch
from lora_helpers import SIZES, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from course.lab import models

CPU = torch.device("cpu")
IDS = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def quiet():
    before = logging.get_verbosity()
    logging.set_verbosity(python_logging.CRITICAL)
    yield
    logging.set_verbosity(before)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def bert():
    return BertLMHeadModel(BertConfig(**SIZES, max_position_embeddings=32, is_decoder=True))


FAMILIES = [tiny_llama, lambda: tiny_llama(tie_word_embeddings=True), gpt2, bert]


def saved(folder, make):
    model = make().eval()
    model.save_pretrained(folder)
    models.load("tiny", where=CPU)[1].save_pretrained(folder)  # any tokenizer
    return model, folder / "model.safetensors"


@pytest.mark.parametrize("make", FAMILIES)
def test_what_was_saved_comes_back(tmp_path, make):
    """Nothing is taken to be missing: neither a tied head, nor what is computed."""
    model, _ = saved(tmp_path, make)
    assert torch.equal(models.load(tmp_path, where=CPU)[0](IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("which", [0, 1, -1])
def test_every_lacking_tensor_is_named(tmp_path, make, which):
    _, file = saved(tmp_path, make)
    tensors = load_file(file)
    gone = list(tensors)[which]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks tensors of the model: .*again") as error:
        models.load(tmp_path, where=CPU)
    assert gone in str(error.value)


def test_of_many_lacking_tensors_five_are_named(tmp_path):
    _, file = saved(tmp_path, tiny_llama)
    save_file({"other": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight, model\.embed_tokens\.weight, .* and \d+ more"):
        models.load(tmp_path, where=CPU)


@pytest.mark.parametrize("length", [4, 500, 5000])
def test_a_file_that_is_cut_off(tmp_path, length):
    _, file = saved(tmp_path, tiny_llama)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="cut off"):
        models.load(tmp_path, where=CPU)


def test_a_tensor_of_another_shape(tmp_path):
    _, file = saved(tmp_path, tiny_llama)
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"don't fit its config\.json"):
        models.load(tmp_path, where=CPU)
