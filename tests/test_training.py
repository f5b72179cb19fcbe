"""The training loop trains what it should and measures what it says; the shipped tiny model is as good as stated."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from course.lab import models
from course.lab.pretrain import FOLDER, main, tiny_config
from course.lab.training import above_floor, cross_entropy, fact_accuracy, next_token_loss, train, warmup_cosine
from course.lab.world import World


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture
def tiny():
    return models.load("tiny", where=torch.device("cpu"))[0]


def test_the_shipped_model_is_within_0_05_nats_of_the_floor(world, tiny):
    assert above_floor(tiny, world, "general", rows=256) < 0.05
    assert fact_accuracy(tiny, world) > 0.99
    assert all(above_floor(tiny, world, domain) > 1 for domain in ("clinic", "legal", "sql"))  # downstream there is something to learn


def test_the_shipped_files_are_what_the_readme_of_the_model_says(world):
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size < 8_000_000
    report = json.loads((FOLDER / "training.json").read_text())
    assert report["parameters"] == sum(tensor.numel() for tensor in load_file(weights).values())
    assert 1_000_000 <= report["parameters"] <= 2_000_000 and report["above_floor"] < 0.05


def test_plain_transformers_loads_it(world):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    question, answer = world.facts()[0]
    out = model.generate(**tokenizer(question, return_tensors="pt", return_token_type_ids=False), max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True) == f"{question} {answer} ."


def test_its_predictions_are_the_true_distribution(world, tiny):
    """Not only the loss: after a prefix, the probabilities themselves."""
    prefix = "the dog near the cars"
    truth = world.sources["general"].next_words(prefix.split())
    with torch.no_grad():
        probabilities = tiny(input_ids=world.tokenizer(prefix, return_tensors="pt").input_ids).logits[0, -1].softmax(-1)
    distance = sum(abs(probabilities[world.ids[word]].item() - truth.get(word, 0.0)) for word in world.vocabulary) / 2
    assert distance < 0.1  # total variation


def test_loss_and_cross_entropy_are_the_mean_over_predicted_tokens(world, tiny):
    ids = world.sample("general", 5, 20, seed=1)
    with torch.no_grad():
        logits = tiny(input_ids=ids).logits
        one_by_one = [F.cross_entropy(logits[row, t], ids[row, t + 1]).item() for row in range(5) for t in range(19)]
        assert next_token_loss(tiny, ids).item() == pytest.approx(sum(one_by_one) / 95, rel=1e-5)
    assert cross_entropy(tiny, ids, rows_at_once=2) == pytest.approx(sum(one_by_one) / 95, rel=1e-5)


def test_training_moves_only_what_requires_a_gradient(world, tiny):
    tiny.requires_grad_(False)
    tiny.lm_head.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    history = train(tiny, lambda step: world.sample("sql", 8, 32, step), 12, 1e-2, evaluate=lambda: 0.5, every=5, progress=False)
    changed = {name for name, tensor in tiny.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"lm_head.weight"}
    assert sum(history.losses[-3:]) < sum(history.losses[:3])
    assert [step for step, _ in history.evaluations] == [0, 5, 10, 12]
    assert not tiny.training  # the mode it came in


def test_two_equal_runs_are_equal(world):
    def run():
        torch.manual_seed(3)
        model = LlamaForCausalLM(tiny_config(world))
        return train(model, lambda step: world.sample("general", 4, 16, step), 4, 1e-3, progress=False).losses

    assert run() == run()


def test_schedule_and_errors(world, tiny):
    factor = warmup_cosine(warmup=0.1, floor=0.2)
    assert factor(0.05) == pytest.approx(0.5) and factor(0.1) == pytest.approx(1.0) and factor(1.0) == pytest.approx(0.2)
    tiny.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        train(tiny, lambda step: None, 1, 1e-3)
    broken = LlamaForCausalLM(tiny_config(world))
    nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0: lower lr"):
        train(broken, lambda step: world.sample("general", 2, 8, step), 1, 1e-3, progress=False)


def test_the_command_trains_and_saves(tmp_path, capsys):
    main(folder=tmp_path, steps=2)
    assert {"model.safetensors", "config.json", "tokenizer.json", "training.json"} <= {path.name for path in tmp_path.iterdir()}
    assert models.load(tmp_path)[0].num_parameters() == json.loads((tmp_path / "training.json").read_text())["parameters"]


def test_names_that_cannot_be_loaded_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"no folder '\./missing'"):
        models.load("./missing")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        models.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        models.load("missing.gguf")
    (tmp_path / "fake.gguf").write_bytes(b"not one")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        models.load(tmp_path / "fake.gguf")
    with pytest.raises(FileNotFoundError, match="neither cached nor reachable"):
        models.load("nobody/such-a-model")
