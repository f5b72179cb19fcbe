"""Adapters that were broken on purpose, each found by the name of its check; and a sound one that passes all of them."""

import json
import shutil

import pytest
import torch
from capstone_helpers import on_the_cpu  # noqa: F401  a fixture that every test here uses
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from course.capstone import audit, export, rule, run
from course.capstone.checkpoint import sha256
from course.capstone.plan import Plan
from course.cli import app
from course.lab import models
from course.units import CourseError
from reference.adapter_format import load_adapter


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The folder of a short run: ``adapter`` and ``base``."""
    out = tmp_path_factory.mktemp("run")
    run.run(Plan(out=str(out), method="lora", steps=20, ask=8, licence="cc-by-4.0", exports=("adapter",)), lambda words: None, False)
    return out


@pytest.fixture
def adapter(sound, tmp_path):
    """A copy to break."""
    return shutil.copytree(sound / "adapter", tmp_path / "adapter")


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_weights(folder, change):
    tensors = load_file(folder / audit.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / audit.WEIGHTS)


def sign(folder):
    """As if it had been exported so: what is wrong must then be found by its own check."""
    record = folder / export.RECORD
    if record.is_file():
        change_json(
            record, lambda told: told.update(files={name: sha256(folder / name) for name in told["files"] if (folder / name).is_file()})
        )


def failed(folder, base, **server) -> dict[str, str]:
    sign(folder)
    return {each.name: each.found for each in audit.audit(folder, str(base), audit.Server(**server)).failed}


def test_a_sound_adapter_passes_every_check(sound):
    done = audit.audit(sound / "adapter", str(sound / "base"))
    assert {each.state for each in done.findings} == {"passed"} and len(done.findings) == len(audit.CHECKS) == 16


def test_no_config(adapter, sound):
    (adapter / audit.CONFIG).unlink()
    assert failed(adapter, sound / "base") == {"files": "there is no adapter_config.json"}


def test_an_interrupted_copy(adapter, sound):
    file = adapter / audit.WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    assert "is cut off" in failed(adapter, sound / "base")["files"]


def test_a_pickle(adapter, sound):
    (adapter / audit.WEIGHTS).rename(adapter / "adapter_model.bin")
    assert "a pickle, which runs code" in failed(adapter, sound / "base")["files"]


def test_changed_after_the_export(adapter, sound):
    change_weights(adapter, lambda tensors: next(iter(tensors.values())).mul_(1.0001))
    done = audit.audit(adapter, str(sound / "base"))
    assert {each.name for each in done.failed} == {"unchanged since export"}


def test_nan(adapter, sound):
    change_weights(adapter, lambda tensors: tensors[sorted(tensors)[3]].view(-1)[0].fill_(float("nan")))
    found = failed(adapter, sound / "base")
    assert set(found) == {"finite values"} and "1 tensors hold NaN or infinity" in found["finite values"]


def test_saved_before_training(adapter, sound):
    change_weights(adapter, lambda tensors: [t.zero_() for key, t in tensors.items() if "lora_B" in key])
    assert failed(adapter, sound / "base")["trained"].startswith("all B are zero")


def test_a_layer_without_gradient(adapter, sound):
    change_weights(adapter, lambda tensors: tensors[next(key for key in sorted(tensors) if "lora_B" in key)].zero_())
    assert "1 of 28 B are zero" in failed(adapter, sound / "base")["trained"]


def test_another_alpha(adapter, sound):
    change_json(adapter / audit.CONFIG, lambda config: config.update(lora_alpha=16))
    found = failed(adapter, sound / "base")
    assert (
        set(found) == {"rank and alpha"}
        and "trained with r = 16, alpha = 32, the config says r = 16, alpha = 16" in found["rank and alpha"]
    )


def test_another_rank(adapter, sound):
    change_json(adapter / audit.CONFIG, lambda config: config.update(r=8))
    assert "the config says r = 8, the factors have rank 16" in failed(adapter, sound / "base")["rank and alpha"]


def test_a_target_is_lost(adapter, sound):
    change_json(adapter / audit.CONFIG, lambda config: config.update(target_modules=["q_proj", "v_proj"]))
    found = failed(adapter, sound / "base")
    assert set(found) == {"targets"} and "20 layers have factors and are no targets" in found["targets"]


def test_a_target_that_was_never_trained(adapter, sound):
    change_json(adapter / audit.CONFIG, lambda config: config["target_modules"].append("lm_head"))
    assert "lm_head are targets without factors" in failed(adapter, sound / "base")["targets"]


def test_a_base_of_another_size(adapter, tmp_path, sound):
    model, tokenizer = models.load(sound / "base")
    model.config.intermediate_size = 256
    type(model)(model.config).save_pretrained(tmp_path / "narrow")
    tokenizer.save_pretrained(tmp_path / "narrow")
    found = failed(adapter, tmp_path / "narrow")
    assert set(found) == {"base fits"} and "is (128, 256) in the base" in found["base fits"]


def test_another_revision_of_the_base(adapter, tmp_path, sound):
    model, tokenizer = models.load(sound / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    model.save_pretrained(tmp_path / "revision")
    tokenizer.save_pretrained(tmp_path / "revision")
    found = failed(adapter, tmp_path / "revision")
    assert set(found) == {"base's weights", "reloaded answers"} and "it fits, and is another model" in found["base's weights"]


def test_the_base_without_the_marks(adapter):
    assert "the tokenizer has 352 tokens, the base 349 rows" in failed(adapter, "tiny")["tokenizer"]


def test_no_tokenizer(adapter, sound):
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer that can be read" in failed(adapter, sound / "base")["tokenizer"]


def test_another_vocabulary(adapter, sound):
    change_json(adapter / "tokenizer.json", lambda told: swap(told["model"]["vocab"], "mira", "leo"))
    found = failed(adapter, sound / "base")
    assert set(found) == {"tokenizer"} and "2 tokens have another id" in found["tokenizer"]


def swap(table, one, other):
    table[one], table[other] = table[other], table[one]


def save_tokenizer(folder, **changes):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


def test_a_template_with_two_bos(adapter, sound):
    save_tokenizer(adapter, chat_template="{{ bos_token }}" + AutoTokenizer.from_pretrained(adapter).chat_template)
    found = failed(adapter, sound / "base")
    assert set(found) == {"template"} and "token 2 is '<bos>'" in found["template"]


def test_no_template(adapter, sound):
    (adapter / "chat_template.jinja").unlink()
    assert "no chat template" in failed(adapter, sound / "base")["template"]


def test_an_end_that_nobody_says(adapter, sound):
    save_tokenizer(adapter, eos_token="<pad>")
    found = failed(adapter, sound / "base")
    assert set(found) == {"end of turn"} and "generation would not stop" in found["end of turn"]


def test_generation_stops_elsewhere(adapter, sound):
    change_json(adapter / "generation_config.json", lambda told: told.update(eos_token_id=[4, 35]))
    assert "generation_config.json stops at [4, 35], a turn ends with 351" in failed(adapter, sound / "base")["end of turn"]


def test_a_rank_above_the_servers(adapter, sound):
    found = failed(adapter, sound / "base", max_rank=8)
    assert set(found) == {"server's limits"}
    assert "the server loads factors only" in failed(adapter, sound / "base", loads_rows=False)["server's limits"]


def test_no_licence(adapter, sound):
    change_json(adapter / export.RECORD, lambda told: told.update(licence=""))
    (adapter / "README.md").write_text("---\nlicense: unknown\n---\n")
    assert set(failed(adapter, sound / "base")) == {"licence"}


def test_not_what_was_evaluated(adapter, sound):
    """All files are as they were signed, sizes and config are right: only the answers tell."""
    change_weights(adapter, lambda tensors: [t.mul_(0.5) for key, t in tensors.items() if "lora_B" in key])
    found = failed(adapter, sound / "base")
    assert set(found) == {"reloaded answers"} and "nats" in found["reloaded answers"]


def test_a_merge_into_other_weights_than_those_trained_on(adapter, sound):
    change_json(adapter / export.RECORD, lambda told: told["merge"].update(error=0.09, way="into the original weights"))
    assert "off by 9.0e-02 of the trained weights" in failed(adapter, sound / "base")["merge"]


def test_without_a_record_what_is_not_known_is_not_passed(adapter, sound):
    (adapter / export.RECORD).unlink()
    states = {each.name: each.state for each in audit.audit(adapter, str(sound / "base")).findings}
    unknown = {name for name, state in states.items() if state == "unknown"}
    assert unknown == {"unchanged since export", "base's weights", "template", "reloaded answers", "memory and latency", "merge"}
    assert "failed" not in states.values()


def test_the_command_its_exit_status_and_its_reports(adapter, sound, tmp_path):
    call = ["audit", str(adapter), "--base", str(sound / "base"), "--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0 and "16 passed" in done.output
    change_json(adapter / audit.CONFIG, lambda config: config.update(lora_alpha=64))
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 1
    told = json.loads((tmp_path / "a.json").read_text())
    assert {each["name"] for each in told["findings"] if each["state"] == "failed"} == {"unchanged since export", "rank and alpha"}
    assert 'class="bad">failed' in (tmp_path / "a.html").read_text()
    with pytest.raises(CourseError, match="no folder"):
        audit.audit(tmp_path / "none", "tiny")


def test_the_rule_over_an_adapter_and_ones_own_questions(sound, tmp_path):
    items = tmp_path / "items.jsonl"
    items.write_text("\n".join(json.dumps({"context": "what means oslo ?", "choices": ["place", "drug"], "gold": i % 2}) for i in range(9)))
    verdict = rule.rule(str(sound / "base"), sound / "adapter", items, rows=8)
    assert set(verdict.found["4-bit"]) == {"perplexity", "certain words", "instructions", "acc", "acc_norm"}
    assert verdict.choice == "not enough data" and verdict.safe == "16-bit"
    with pytest.raises(CourseError, match="the adapter can't be loaded"):
        rule.rule(str(sound / "base"), tmp_path)
    with pytest.raises(CourseError, match=r"rows must be at least 8, .* got 0"):
        rule.rule("tiny", rows=0)
    with pytest.raises(CourseError, match=r"tolerance must be a share above 0 and below 1, such as 0\.02, got -1"):
        rule.rule("tiny", tolerance=-1)
    items.write_text("")
    with pytest.raises(CourseError, match=r"items\.jsonl holds 0 questions"):
        rule.rule("tiny", items=items)


def test_the_rule_is_not_asked_of_an_adapter_over_another_base(sound, tmp_path):
    with pytest.raises(CourseError, match=f"no chat template .* trained on {sound / 'base'}: give --base"):
        rule.tuned("tiny", sound / "adapter")
    model, tokenizer = models.load(str(sound / "base"))
    with torch.no_grad():
        model.model.norm.weight.mul_(1.001)
    model.save_pretrained(tmp_path / "revision")
    tokenizer.save_pretrained(tmp_path / "revision")
    with pytest.raises(CourseError, match="its weights have another hash than the record's; the adapter was trained on"):
        rule.tuned(str(tmp_path / "revision"), sound / "adapter")


def test_the_rule_merges_a_qlora_adapter_into_dequantized_weights(tmp_path):
    settings = Plan(out=str(tmp_path), method="qlora", steps=12, ask=8, licence="x", exports=("adapter",), lr=5e-3)
    run.run(settings, lambda words: None, False)
    beside = export.load_base(str(tmp_path / "base"), "qlora", "float32")
    load_adapter(beside, tmp_path / "adapter")
    ids = torch.arange(24).view(2, 12)
    merged = rule.tuned(str(tmp_path / "base"), tmp_path / "adapter").model
    with torch.no_grad():
        wanted, got = (model.eval()(input_ids=ids).logits for model in (beside, merged))
    assert torch.allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize(
    "file, content, name, words",
    [
        (audit.CONFIG, "[]", "files", "holds list, not an object"),
        (export.RECORD, '{"base":', "files", "is not JSON"),
        (export.RECORD, '{"base": {"name": "tiny"}}', "files", "lacks base, or a part of it"),
        ("generation_config.json", "{", "end of turn", "no JSON of settings"),
        ("chat_template.jinja", "{% for x in %}", "template", "does not render a conversation of the run"),
    ],
)
def test_a_file_that_can_not_be_read_is_found_and_not_a_traceback(adapter, sound, file, content, name, words):
    if file != export.RECORD:
        (adapter / file).write_text(content)
        sign(adapter)
    (adapter / file).write_text(content)
    found = {each.name: each.found for each in audit.audit(adapter, str(sound / "base")).failed}
    assert set(found) == {name} and words in found[name]


@pytest.mark.parametrize(
    "change, name, words",
    [
        ({"target_modules": "*_proj"}, "targets", "'*_proj', which is no regular expression"),
        ({"rank_pattern": [16]}, "rank and alpha", "rank_pattern is [16]"),
    ],
)
def test_settings_of_the_wrong_kind_are_found(adapter, sound, change, name, words):
    change_json(adapter / audit.CONFIG, lambda config: config.update(change))
    found = failed(adapter, sound / "base")
    assert set(found) == {name} and words in found[name]


def test_a_check_that_stops_is_a_failure_and_the_others_go_on(adapter, sound, monkeypatch):
    def stops(subject):
        raise KeyError("where")

    monkeypatch.setattr(audit, "CHECKS", {**audit.CHECKS, "licence": (("files",), stops)})
    done = audit.audit(adapter, str(sound / "base"))
    assert [(each.name, each.found) for each in done.failed] == [("licence", "it can't be checked: KeyError: 'where'")]
    assert done.findings[-1].state == "passed"


def test_a_record_without_rows_is_unknown(adapter, sound):
    change_json(adapter / export.RECORD, lambda told: told.update(rows=[]))
    states = {each.name: each.state for each in audit.audit(adapter, str(sound / "base")).findings}
    assert states["reloaded answers"] == states["merge"] == "unknown" and "failed" not in states.values()


def test_names_are_whole_in_eighty_columns_and_advice_only_where_there_is_some(adapter, sound, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    good = CliRunner().invoke(app, ["audit", str(adapter), "--base", str(sound / "base")])
    assert "→" not in good.output and "adapter_model.safetensors:" in good.output and max(map(len, good.output.splitlines())) <= 80
    bad = CliRunner().invoke(app, ["audit", str(adapter), "--base", "nothere"])
    assert "→" in bad.output and "…" not in bad.output and max(map(len, bad.output.splitlines())) <= 80
