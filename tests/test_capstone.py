"""The capstone: memory before anything runs, data, resuming, exports that are loaded again, and everything that people get wrong."""

import argparse
import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from capstone_helpers import assert_served_as_one_of_many, on_the_cpu  # noqa: F401  a fixture that every test here uses
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from typer.testing import CliRunner

from benchmarks import gemma_capstone
from benchmarks.spread import Spread
from course import ROOT
from course.capstone import base as bases
from course.capstone import checkpoint, data, evaluate, export, gguf_file, merge, plan, report, run, train
from course.capstone.plan import Plan
from course.cli import app
from course.figures import capstone as figures
from course.lab import evaluation, instructions, models, recorded
from course.units import CourseError
from reference.instruct import read_conversations
from reference.lora import lora_layers
from reference.model_shapes import LLAMA_2_7B
from reference.qlora import merge_into_original

SMALL = {"steps": 6, "ask": 12, "checkpoint_every": 2, "method": "lora", "licence": "cc-by-4.0"}


def quick(out, **changes) -> Plan:
    return Plan(**(SMALL | {"out": str(out)} | changes))


def prepared(settings: Plan):
    """Base, rows and an adapted model, without a run around them."""
    base = bases.load(settings.base, settings.dtype, settings.path("out"), settings.seed)
    rows, digest = data.load(settings, base), bases.weights_hash(base.model)
    return base, rows, digest, bases.adapt(base, settings)


def trained_by(settings: Plan, after_step=None) -> list[float]:
    base, rows, digest, model = prepared(settings)
    folder = settings.path("out") / "checkpoints"
    return train.train(model, settings, rows, folder, digest, base.tokenizer.pad_token_id, False, after_step)[0]


class Killed(BaseException):
    pass


def kill_at(step):
    def stop(done):
        if done == step:
            raise Killed

    return stop


# Plan and memory


def test_a_plan_is_read_and_options_go_before_it(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('base = "tiny"\nr = 4\ntargets = ["q_proj", "v_proj"]\n')
    found = plan.read(file, r=8, steps=None)
    assert (found.r, found.steps, found.targets, found.path("out")) == (8, 150, ("q_proj", "v_proj"), tmp_path / "capstone")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank = 4", "unknown keys rank"),
        ("r = 0", "r must be an integer of at least 1, got 0"),
        ('method = "dora"', "method must be one of auto, lora, qlora, full"),
        ("lr = 3.0", "lr must be a number above 0 and below 1"),
        ("replay = 1.0", "replay must be a number from 0 to 0.9, got 1.0"),
        ('replay = "a"', "replay must be a number from 0 to 0.9, got 'a'"),
        ("lora_dropout = -1", "lora_dropout must be a number from 0 to below 1, got -1"),
        ('seed = "a"', "seed must be an integer from 0 on, got 'a'"),
        ("licence = 3", "licence must be a text, got 3"),
        ('exports = "gguf"', "exports must be a list, such as .*, got 'gguf'"),
        ('exports = ["onnx"]', "exports must be of adapter, merged, gguf, got onnx"),
        ("steps = ", "is no TOML"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said(tmp_path, text, words):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(CourseError, match=words.replace("(", r"\(")):
        plan.read(file)


def test_auto_takes_the_first_way_that_fits():
    long = Plan(base="x", batch=4, max_length=2048, dtype="bfloat16")
    ways = [plan.choose(dataclasses.replace(long, memory_gb=gb), LLAMA_2_7B)[0] for gb in (200, 24, 12)]
    assert [(each.method, each.checkpointing) for each in ways] == [("lora", False), ("lora", True), ("qlora", True)]


def test_what_will_not_fit_is_refused_with_the_nearest_plan_that_does():
    with pytest.raises(
        CourseError, match=r"needs .* GB at its fullest moment .* Most of it is .* With batch = 1 and checkpointing it would fit"
    ):
        plan.choose(Plan(batch=16, max_length=4096, method="qlora", dtype="bfloat16", memory_gb=10), LLAMA_2_7B)
    with pytest.raises(CourseError, match="take a smaller base or more memory"):
        plan.choose(Plan(max_length=4096, dtype="bfloat16", memory_gb=2), LLAMA_2_7B)
    with pytest.raises(CourseError, match='With method = "lora"'):
        plan.choose(Plan(method="full", memory_gb=40, max_length=256, batch=1), LLAMA_2_7B)


def test_the_predicted_weights_are_those_of_the_model(tmp_path):
    base = bases.load("tiny", "float32", tmp_path)
    memory = plan.predict(Plan(method="lora"), plan.shape_of(base.model.config))
    assert memory["weights"] == sum(p.numel() * 4 for p in base.model.parameters())


# The base


def test_a_base_without_a_template_gets_marks_and_is_written_whole(tmp_path):
    base = bases.load("tiny", "float32", tmp_path)
    assert base.new == (349, 350, 351) and base.tokenizer.eos_token == "<end>" and base.in_the_world
    again = bases.load(base.name, "float32")
    assert again.new == base.new and not again.words
    assert bases.weights_hash(again.model) == bases.weights_hash(base.model)
    with pytest.raises(CourseError, match="has no chat template"):
        bases.load("tiny", "float32")


def test_one_bit_is_another_base(tmp_path):
    base = bases.load("tiny", "float32", tmp_path)
    before = bases.weights_hash(base.model)
    with torch.no_grad():
        base.model.model.norm.weight[3] += 1e-6
    assert bases.weights_hash(base.model) != before


# Data


def rows_file(folder, count=80, extra=()):
    file = data.write_course(folder / "rows.jsonl", 0, count)
    file.write_text(file.read_text() + "".join(f"{line}\n" for line in extra))
    return file


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 81: not JSON"),
        ('{"messages": []}', "line 81: no conversation: messages is empty"),
        ('{"text": "a"}', "line 81: no conversation: the row has the keys text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 81: no conversation: the last turn is not the assistant's"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, words):
    file = rows_file(tmp_path, extra=[line])
    with pytest.raises(CourseError, match=words):
        data.load(quick(tmp_path, data=str(file)), bases.load("tiny", "float32", tmp_path))


def test_a_row_that_is_too_long_is_an_error_or_said(tmp_path):
    long = json.dumps({"instruction": "repeat " + "mira " * 80, "output": "mira"})
    file, base = rows_file(tmp_path, extra=[long]), bases.load("tiny", "float32", tmp_path)
    rows = data.load(quick(tmp_path, data=str(file)), base)
    assert any("line 81 is left out: too long" in words for words in rows.words)
    with pytest.raises(CourseError, match=r"line 81: too long, \d+ tokens; max_length is 64"):
        data.load(quick(tmp_path, data=str(file), overflow="raise"), base)
    with pytest.raises(CourseError, match="max_length is 300, and the base reads 256 tokens at most"):
        data.load(quick(tmp_path, data=str(file), max_length=300), base)


def test_nothing_that_is_asked_is_trained_on(tmp_path):
    question = {"role": "user", "content": "return  3 Plus 4"}
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"instruction": f"return {a} plus 4", "output": str(a + 4)}) + "\n" for a in range(9)))
    twice = json.dumps({"messages": [question, {"role": "assistant", "content": "7"}]})
    file = rows_file(tmp_path, extra=[twice, twice])
    rows = data.load(quick(tmp_path, data=str(file), held_out=str(held)), bases.load("tiny", "float32", tmp_path))
    assert any("repeat an earlier one" in words for words in rows.words)
    assert any("are asked in the test too" in words for words in rows.words)
    asked = {each.example.ids for each in rows.asked}
    assert not asked & {row.ids for row in rows.train}


def test_a_prompt_is_on_one_side_whatever_the_order():
    rows = data.of_the_course(0, 0, 300)
    train_rows, held = data.split(rows, 3)
    assert {data.prompt(row) for row in train_rows}.isdisjoint(data.prompt(row) for row in held) and held
    again = data.split(rows[::-1], 3)[1]
    assert {data.prompt(row) for row in again} == {data.prompt(row) for row in held}


def test_a_missing_file_and_too_few_rows_are_said(tmp_path):
    base = bases.load("tiny", "float32", tmp_path)
    with pytest.raises(CourseError, match=r"no file .*none\.jsonl"):
        data.load(quick(tmp_path, data="none.jsonl"), base)
    with pytest.raises(CourseError, match="fewer than one batch"):
        data.load(quick(tmp_path, data=str(rows_file(tmp_path, 60)), batch=64, held_out=str(rows_file(tmp_path, 60))), base)


def test_a_large_base_is_not_loaded_for_a_file_that_is_not_there_or_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(bases, "load", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(CourseError, match=r"no file .*none\.jsonl"):
        run.run(quick(tmp_path, data="none.jsonl"), lambda words: None, False)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(CourseError, match=r"empty\.jsonl holds no row: write a conversation a line"):
        run.run(quick(tmp_path, data=str(empty)), lambda words: None, False)


def test_few_prompts_are_refused_in_words(tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"return {a} plus 4", "output": "5"}) + "\n" for a in range(8)))
    with pytest.raises(CourseError, match="asks 8 different prompts, and 8 at least are held out"):
        data.load(quick(tmp_path, data=str(file)), bases.load("tiny", "float32", tmp_path))


def test_a_row_that_is_too_long_is_never_one_that_is_held_out(tmp_path):
    base = bases.load("tiny", "float32", tmp_path)
    for word in ("mira", "nils", "kira", "tara"):  # by its hash one of them would be
        file = rows_file(tmp_path, extra=[json.dumps({"instruction": f"repeat {word} " * 60, "output": word})])
        rows = data.load(quick(tmp_path, data=str(file)), base)
        assert any("line 81 is left out: too long" in words for words in rows.words) and len(rows.asked) >= 8


def test_words_that_the_base_does_not_know_are_said(tmp_path):
    file = rows_file(tmp_path, extra=[json.dumps({"instruction": f"Traduisez {a} , s'il vous plaît", "output": "oui"}) for a in range(5)])
    words = data.load(quick(tmp_path, data=str(file)), bases.load("tiny", "float32", tmp_path)).words
    assert any("5 of " in each and "rows hold words that the base has no token for" in each for each in words)


# Training, and what interrupts it


def test_a_run_that_was_killed_gives_the_same_losses(tmp_path):
    settings = quick(tmp_path / "whole", lora_dropout=0.1)
    whole = trained_by(settings)
    broken = dataclasses.replace(settings, out=str(tmp_path / "broken"))
    with pytest.raises(Killed):
        trained_by(broken, kill_at(3))  # the last checkpoint is of step 2
    assert trained_by(broken) == whole
    assert trained_by(broken) == whole  # and when all is done nothing is done again


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_other_methods_go_on_too(tmp_path, method):
    settings = quick(tmp_path / "whole", method=method, lr=1e-4, steps=4)
    whole = trained_by(settings)
    broken = dataclasses.replace(settings, out=str(tmp_path / "broken"))
    with pytest.raises(Killed):
        trained_by(broken, kill_at(3))
    assert trained_by(broken) == whole


def test_sigkill_in_the_middle_of_the_command(tmp_path):
    """The real thing: the process is shot as soon as a checkpoint is there, and the same command is given again."""
    out = tmp_path / "shot"
    command = [sys.executable, "-m", "course", "capstone", "--out", str(out), "--method", "lora", "--steps", "20", "--licence", "mit"]
    file = tmp_path / "run.toml"
    file.write_text('ask = 8\ncheckpoint_every = 2\nexports = ["adapter"]\n')
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | {"CUDA_VISIBLE_DEVICES": ""}}
    process = subprocess.Popen([*command[:4], str(file), *command[4:]], cwd=ROOT, **quiet)
    until = time.monotonic() + 90
    while not list(out.glob("checkpoints/step-*")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found, _ = checkpoint.newest(out / "checkpoints")
    assert found is not None and found.step < 20
    settings = plan.read(file, out=str(out), method="lora", steps=20, licence="mit")
    assert trained_by(settings) == trained_by(dataclasses.replace(settings, out=str(tmp_path / "whole")))


def test_a_checkpoint_is_whole_or_passed_over(tmp_path):
    settings = quick(tmp_path)
    whole = trained_by(settings)
    folder = tmp_path / "checkpoints"
    newest = sorted(folder.glob("step-*"))[-1]
    tensors = bytearray((newest / checkpoint.TENSORS).read_bytes())
    tensors[-1] ^= 1
    (newest / checkpoint.TENSORS).write_bytes(tensors)
    (folder / ".step-000007.partial").mkdir()  # what a kill leaves
    found, words = checkpoint.newest(folder)
    assert found.step == 4 and "step-000006 is damaged" in words[0]
    assert trained_by(settings) == whole


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    settings = quick(tmp_path)
    real = checkpoint.save_file
    written = []

    def full(tensors, file):
        if len(written) == 2:
            file.write_bytes(b"half of a")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        real(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CourseError, match=r"step-000006 was not written: the disk is full.*What was there before is kept"):
        trained_by(settings)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    monkeypatch.undo()
    assert len(trained_by(settings)) == 6


def test_too_little_space_is_seen_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    with pytest.raises(CourseError, match=r"has 0\.001 GB free, and the run will write"):
        run.run(quick(tmp_path), lambda words: None, False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CourseError, match="may not be written"), checkpoint.whole_folder(tmp_path / "x"):
        pass


def test_a_loss_of_nan_stops_and_keeps_the_last_good_state(tmp_path):
    settings = quick(tmp_path)
    base, rows, digest, model = prepared(settings)
    folder = tmp_path / "checkpoints"

    def spoil(done):
        if done == 3:
            next(layer for _, layer in lora_layers(model)).lora_B.data.fill_(float("nan"))

    with pytest.raises(CourseError, match=r"the loss is nan at step 4; step 2 is kept in .* try lr = 0\.00033 with another --out"):
        train.train(model, settings, rows, folder, digest, base.tokenizer.pad_token_id, False, spoil)
    assert checkpoint.newest(folder)[0].step == 2


def test_a_run_does_not_go_on_with_another_plan_or_base(tmp_path):
    settings = quick(tmp_path)
    trained_by(settings)
    with pytest.raises(CourseError, match=r"another plan \(lr was 0\.001 and is 0\.002\)"):
        trained_by(dataclasses.replace(settings, lr=2e-3))
    base, rows, _, model = prepared(settings)
    with pytest.raises(CourseError, match="base's hash was"):
        train.train(model, settings, rows, tmp_path / "checkpoints", "another", base.tokenizer.pad_token_id, False)


def test_another_plan_leaves_the_base_of_the_run_as_it_was(tmp_path):
    settings = quick(tmp_path)
    trained_by(settings)
    before = checkpoint.sha256(tmp_path / "base" / "model.safetensors")
    with pytest.raises(CourseError, match=r"another plan \(seed was 0 and is 1\)"):
        run.run(dataclasses.replace(settings, seed=1), lambda words: None, False)
    assert checkpoint.sha256(tmp_path / "base" / "model.safetensors") == before


def test_a_base_with_nan_is_refused_before_training(tmp_path):
    base = bases.load("tiny", "float32", tmp_path)
    with torch.no_grad():
        base.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    bases.save_base(base.model, base.tokenizer, tmp_path / "broken")
    settings = quick(tmp_path / "out", base=str(tmp_path / "broken"))
    with pytest.raises(CourseError, match=r"before any training the base's loss is nan on \d+ of \d+ held-out rows, the first on line"):
        run.run(settings, lambda words: None, False)


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CourseError, match="there is a file of that name"):
        bases.load("tiny", "float32", tmp_path / "taken")


def test_every_row_comes_once_an_epoch():
    order = train.Order(7, 3)
    places = [place for step in range(7) for place in order(step * 3, 3)]
    assert [sorted(places[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3 and places[:7] != places[7:14]
    assert order(4, 3) == places[4:7]


# Evaluation, merge, exports


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from end to end, without GGUF; and what it said."""
    said = []
    settings = quick(tmp_path_factory.mktemp("finished"), steps=30, exports=("adapter", "merged"))
    return settings, run.run(settings, said.append, False), said


def test_the_report_tells_what_changed(finished):
    settings, result, said = finished
    loss = result["learned"][0]
    assert loss["name"] == "held-out loss" and loss["after"] < loss["before"] and loss["verdict"] == "better"
    assert loss["after"] - loss["before"] == pytest.approx(loss["lost"]["estimate"])
    assert {change["name"] for change in result["forgotten"]} == {"loss on old text", "facts known"}
    page = (settings.path("out") / "report.html").read_text()
    assert page.count("<table>") == 4 and "nan" not in page and "http" not in page
    assert json.loads((settings.path("out") / "report.json").read_text())["verdict"] == result["verdict"]
    for mark, kind in (('<li class="bad">✗ ', "against"), ('<li class="open">? ', "decide")):
        assert page.count(mark) == len(result["verdict"][kind])
    assert any(words.startswith("merge: into the base's own weights") for words in said)


def test_every_export_answers_as_the_trained_model(finished):
    result = finished[1]
    found = {each["kind"]: each for each in result["exports"]}
    assert set(found) == {"adapter", "adapter in peft", "served", "merged"}
    served = found.pop("served")  # the tiny base got marks, whose rows are trained
    assert served["logits"] is None and "rows of the embedding" in served["words"]
    assert found["adapter"]["logits"] == 0
    assert all(each["logits"] < 1e-3 and each["changed"] == 0 for each in found.values())
    assert result["merge"]["error"] < 1e-6


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_of_linear_layers_is_served_as_one_of_many(tmp_path, method):
    assert_served_as_one_of_many(quick(tmp_path, method=method, steps=4, ask=8, new_tokens=4))


def test_gguf_is_loaded_again_and_answers_alike(finished):
    settings, _, _ = finished
    model, tokenizer = models.load(settings.path("out") / "merged")
    base = bases.Base("merged", model, tokenizer, (), ())
    rows = data.load(settings, bases.load(settings.base, "float32", settings.path("out")))
    done = export.gguf(model, base, settings.path("out") / "gguf", settings, rows, export.trained(model, base, rows, settings.new_tokens))
    assert done.logits == 0 and done.changed == 0 and "without a vocabulary" in done.words


def test_a_family_without_a_gguf_is_said(finished):
    settings, _, _ = finished
    model, tokenizer = models.load(settings.path("out") / "merged")
    model.config.model_type = "other"
    done = export.gguf(model, bases.Base("merged", model, tokenizer, (), ()), settings.path("out") / "no", settings, None, None)
    assert "this writer knows llama, gemma3_text, not other" in done.words and not (settings.path("out") / "no").exists()


def small_gemma(**changes):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**(sizes | changes)))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def test_a_gguf_of_gemma_gives_the_same_logits(tmp_path):
    model, ids = small_gemma(), torch.arange(1, 13)[None]
    gguf_file.write(model, bases.Base("random", model, SimpleNamespace(eos_token_id=1), (), ()), tmp_path / "model.gguf")
    again = gguf_file.read(tmp_path / "model.gguf", torch.float32)
    assert (again(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("changes", [{"query_pre_attn_scalar": 64}, {"layer_types": ["full_attention"] * 6}])
def test_what_a_gguf_can_not_tell_is_not_written(changes):
    with pytest.raises(gguf_file.CannotWrite, match="has no place for this attention's scale or its order of layers"):
        gguf_file.check_gemma(small_gemma(**changes).config)


def test_interleaving_is_what_transformers_takes_back():
    weight = torch.arange(8.0)[:, None]
    assert gguf_file.interleaved(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    with pytest.raises(gguf_file.CannotWrite, match=r"no place for model\.layers\.0\.mlp\.experts"):
        gguf_file.gguf_name("model.layers.0.mlp.experts", "llama")


def test_qlora_is_merged_into_what_it_was_trained_on(tmp_path):
    settings = quick(tmp_path, method="qlora", steps=4)
    base, rows, digest, model = prepared(settings)
    train.train(model, settings, rows, tmp_path / "checkpoints", digest, base.tokenizer.pad_token_id, False)
    wanted = export.some_logits(model, rows)
    original = dict(bases.load("tiny", "float32", tmp_path).model.state_dict())
    done = merge.merge(model, "qlora", original)
    assert done.way == "into the dequantized weights" and done.error < 1e-6
    assert done.others["original"] > 0.05 and done.others["requantized"] > 1e-4
    far = max((one - other).abs().max().item() for one, other in zip(export.some_logits(model, rows), wanted, strict=True))
    assert far < 1e-4

    _, _, _, other = prepared(settings)
    train.train(other, settings, rows, tmp_path / "checkpoints", digest, base.tokenizer.pad_token_id, False)
    merge_into_original(other, original)
    wrong = max((one - two).abs().max().item() for one, two in zip(export.some_logits(other, rows), wanted, strict=True))
    assert wrong > 100 * far  # the check above can fail


def test_a_run_that_answers_nothing_rightly_is_not_ready_and_forgetting_is_to_be_decided(tmp_path):
    def verdict(right: float, *forgotten: dict) -> dict:
        learned = [{"verdict": "better", "after": 1.0}, {"verdict": "no difference shown", "after": right}]
        return run.verdict({"learned": learned, "forgotten": list(forgotten)}, [], quick(tmp_path))

    assert verdict(0.1) == {"ready": True, "against": [], "decide": []} and report.judgement(verdict(0.1)) == "Ready."
    assert not verdict(0.0)["ready"] and "not one held-out answer is the expected one" in verdict(0.0)["against"][0]
    lost = {"estimate": 0.5, "low": 0.25, "high": 0.75}
    old = {"name": "loss on old text", "before": 1.0, "after": 1.5, "unit": "nats", "verdict": "worse", "lost": lost}
    found = verdict(0.1, old, old | {"name": "facts known", "verdict": "better"})
    assert found["ready"] and found["decide"] == [
        "loss on old text: 1.000 → 1.500, +0.500 (+0.250 to +0.750) nats: worse. Too much? More replay or a lower rate costs less"
    ]
    assert report.judgement(found) == "Ready, if you accept this." and report.judgement(verdict(0.0, old)) == "Not ready."


def test_a_change_is_named_by_its_interval():
    before = evaluate.Measured(
        torch.rand(20, dtype=torch.float64) + 2, torch.full((20,), 3), [("a", True)] * 20, torch.zeros(20).bool(), torch.ones(9)
    )
    better = dataclasses.replace(before, losses=before.losses - 1, right=torch.ones(20).bool())
    found = {change.name: change.verdict for change in evaluate.learned(before, better)}
    assert found == {"held-out loss": "better", "right answers": "better", "answers that end": "no difference shown"}
    assert evaluate.learned(better, before)[0].verdict == "worse"


def test_a_mark_in_place_of_a_fact_is_a_wrong_answer(tmp_path):
    base = bases.load("tiny", "float32", tmp_path)
    assert evaluation.facts_right(base.model, instructions.world()).all()
    with torch.no_grad():  # the model says nothing but marks
        base.model.get_output_embeddings().weight[: base.new[0]] = 0
        base.model.get_output_embeddings().weight[list(base.new)] *= torch.tensor([[1000.0], [-1000.0], [1.0]])
    assert not evaluation.facts_right(base.model, instructions.world()).any()


def test_toml_of_a_report_is_a_plan_again(tmp_path):
    settings = Plan(r=4, targets=("q_proj",), memory_gb=2.0)
    (tmp_path / "again.toml").write_text(report.toml(settings.settings()))
    assert dataclasses.replace(plan.read(tmp_path / "again.toml"), folder=".") == settings


def test_the_command_refuses_in_one_sentence_and_predicts(tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["capstone", "--dry", "--memory-gb", "0.2", "--out", str(tmp_path)])
    assert done.exit_code == 0 and "◀ peak" in done.output and "method = lora" in done.output
    assert "tiny · LoRA" in done.output
    for name in ("nothere", str(tmp_path)):
        other = runner.invoke(app, ["capstone", "--dry", "--base", name])
        assert isinstance(other.exception, CourseError) and f"the configuration of '{name}' can't be read" in str(other.exception)
    refused = runner.invoke(app, ["capstone", "--memory-gb", "0.01", "--out", str(tmp_path)])
    assert isinstance(refused.exception, CourseError) and "of 0.01 GB 90 % may be planned for" in str(refused.exception)


def test_the_benchmark_takes_the_same_path(tmp_path):
    """A plan of the recorded study in two steps; and the rows of the real model, which are conversations as anybody's."""
    row = gemma_capstone.one("tiny", "QLoRA r = 16, 10 % replay", 1, tmp_path, gemma_capstone.QUICK, {"qlora": 5e-4})
    recorded_row = recorded.load("capstone_tiny", "cpu")["result"]["rows"][0]
    assert set(row) == set(recorded_row) and row["predicted"] > 0 and row["merge"]["others"]["original"] > 0.05
    files = gemma_capstone.data_files(tmp_path)
    counts = {field: len(read_conversations(Path(file))[0]) for field, file in files.items()}
    assert counts["data"] > 500 and counts["held_out"] > 80


def test_the_lesson_s_order_holds_in_every_recorded_seed():
    """Replay does most on both models; which method forgets less changes places; QLoRA's loss on Gemma is mostly that of four bits."""

    def forgotten(plan, base):
        return [figures.change(row, "loss on old text")["lost"]["estimate"] for row in figures.runs(base) if row["plan"] == plan]

    lora, none, _, qlora, full = figures.PLANS
    seeds = {base: [len(forgotten(plan, base)) for plan in figures.PLANS] for base in figures.RECORDS}
    assert set(seeds["tiny"]) == set(seeds["gemma"]) == {3}
    for base, factor in (("tiny", 10), ("gemma", 5)):
        assert min(forgotten(none, base)) > factor * max(forgotten(lora, base))
    assert max(forgotten(full, "tiny")) < min(forgotten(lora, "tiny"))
    assert max(forgotten(lora, "gemma")) < min(forgotten(full, "gemma")) < 0.5 * min(forgotten(none, "gemma"))
    alone = figures.four_bits_alone()["estimate"]
    assert all(0.5 * each < alone < each for each in forgotten(qlora, "gemma"))
    for row in figures.runs("gemma"):
        assert row["peak"] < row["predicted"]
        assert all(each["changed"] == 0 for each in row["exports"] if each["logits"] is not None)
        if row["plan"] == qlora:
            assert row["merge"]["error"] < 1e-6 < row["merge"]["others"]["requantized"] < row["merge"]["others"]["original"]


def test_rates_are_chosen_on_rows_that_are_neither_trained_on_nor_held_out(tmp_path, monkeypatch):
    """The best at an end is not the best yet; a rate that diverges is none; and no question stands on two sides."""
    given = []

    def loss(settings):
        given.append(settings)
        return math.inf if settings.lr > 2e-2 else abs(math.log(settings.lr / (1e-2 if settings.method == "lora" else 1e-3)))

    monkeypatch.setattr(gemma_capstone, "validation_loss", loss)
    found = gemma_capstone.search("tiny", tmp_path, {}, dict.fromkeys(gemma_capstone.METHODS, 1e-3))
    assert found["chosen"] == {"lora": 9e-3, "qlora": 1e-3, "full": 1e-3}
    assert found["tried"]["lora"][-1] == [0.027, None] and len(found["tried"]["qlora"]) == 3
    real = {"ask": 120} | gemma_capstone.data_files(tmp_path)
    tests = data.asked_of_the_course(120), read_conversations(Path(real["held_out"]))[0]
    assert_apart(given[0], tests[0], found["prompts"])
    again = gemma_capstone.search("gemma-3-270m", tmp_path, real, dict.fromkeys(gemma_capstone.METHODS, 1e-3))
    assert_apart(given[-1], tests[1], again["prompts"])


def assert_apart(settings: Plan, tests: list, counts: dict) -> None:
    trained_on, validation = ({data.prompt(row) for row in read_conversations(settings.path(name))[0]} for name in ("data", "held_out"))
    assert counts == {"data": len(trained_on), "held_out": len(validation)} and len(validation) > 30
    assert not trained_on & validation and not (trained_on | validation) & {data.prompt(row) for row in tests}


def test_a_resumed_benchmark_runs_what_is_lacking(tmp_path, monkeypatch):
    """A row that failed, one of another rate, and all that was not begun; the others stay as they are. A failure costs its own row."""
    begun, plans = [], list(gemma_capstone.PLANS)
    rates = dict.fromkeys(gemma_capstone.METHODS, 1e-3)

    def one(model, name, seed, folder, settings, chosen):
        begun.append((name, seed))
        if name == plans[1]:
            raise MemoryError("too much")
        return {"plan": name, "seed": seed, "lr": 1e-3, "again": True}

    monkeypatch.setattr(gemma_capstone, "one", one)
    monkeypatch.setattr(gemma_capstone, "checked", lambda *_: {"audit": {}, "rule": {"choice": "4 bits"}})
    kept = {"plan": plans[3], "seed": 0, "lr": 1e-3}
    rows = [kept, {"plan": plans[4], "seed": 0, "lr": 1e-4}, {"plan": plans[2], "seed": 0, "error": "x"}]
    result = {"model": "tiny", "seeds": 1, "search": {"chosen": rates}, "rows": rows}
    given = argparse.Namespace(model="tiny", smoke=True, out=tmp_path, device=torch.device("cpu"))
    gemma_capstone.measure(result, given, gemma_capstone.TINY, tmp_path, Spread())
    assert begun == [(plans[i], 0) for i in (0, 1, 2, 4)]
    assert [row["plan"] for row in result["rows"]] == plans and kept in result["rows"]
    assert result["rows"][1] == {"plan": plans[1], "seed": 0, "error": "MemoryError: too much"}
    assert recorded.load("capstone_tiny", folder=tmp_path)["result"] == result


def test_answers_do_not_depend_on_the_padding(tmp_path):
    """Prompts of several lengths together, and each alone."""
    settings = quick(tmp_path)
    base = bases.load("tiny", "float32", tmp_path, 0)
    asked = data.load(dataclasses.replace(settings, ask=24), base).asked
    assert len({len(each.example.ids) for each in asked}) > 1
    together = evaluate.answers(base.model, base.tokenizer, asked, 8)
    assert together == [evaluate.answers(base.model, base.tokenizer, [each], 8)[0] for each in asked]


def test_what_runs_share_does_not_change_them(tmp_path, monkeypatch):
    """A base in a folder: loaded, prepared and measured once for two runs, and each is as one that did all of it itself."""
    base = bases.load("tiny", "float32", tmp_path / "made", 0)
    files = {"data": tmp_path / "data.jsonl", "held_out": tmp_path / "held_out.jsonl"}
    for file, seed in zip(files.values(), (0, 5), strict=True):
        data.write_course(file, seed, 60)
    settings = gemma_capstone.QUICK | {name: str(file) for name, file in files.items()}
    arguments = base.name, "full fine-tuning, 10 % replay", 1, tmp_path, settings, {"full": 1e-3}
    first, second = gemma_capstone.one(*arguments), gemma_capstone.one(*arguments)
    assert gemma_capstone.kept.cache_info().misses == gemma_capstone.prepared.cache_info().misses == 1
    monkeypatch.setattr(gemma_capstone, "start_of", lambda given: None)
    alone = gemma_capstone.one(*arguments)
    timed = {"peak", "seconds", "train_seconds"}
    assert all(first[key] == second[key] == alone[key] for key in alone.keys() - timed)
