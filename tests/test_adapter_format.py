"""reference.adapter_format: peft reads what is saved here and the other way round; everything else is refused by name."""

import copy
import json
import pickle
import shutil
import warnings

import peft
import pytest
import torch
from lora_helpers import assert_same, tiny_bert, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

from reference.adapter_format import READ, SILENT, load_adapter, save_adapter
from reference.lora import LoRALinear, inject_lora, lora_layers, lora_state_dict, merge_lora

IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def perturb(model):
    """As after some training: both factors moved from where they started."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))


def logits(model, x=IDS):
    model.eval()
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out)


def assert_same_logits(model, other, init=None):
    """With PiSSA each side takes the base apart by itself, and the rounding of that goes through all layers."""
    assert_same(logits(model), logits(other), ulps=100 if init == "pissa" else 16, half_ulps=3)


def quiet_peft_model(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**options))


CASES = [
    (tiny_llama, dict(target_modules=["q_proj", "v_proj"])),
    (tiny_llama, dict(target_modules="all-linear", use_rslora=True)),
    (tiny_llama, dict(target_modules=r".*layers\.1\..*(up|o)_proj", init="gaussian")),
    (tiny_llama, dict(target_modules=["model.layers.0.mlp.down_proj", "embed_tokens"])),
    (tiny_llama, dict(target_modules="all-linear", init="pissa")),
    (tiny_llama, dict(target_modules=["q_proj"], init="pissa", use_rslora=True)),
    (tiny_bert, dict(target_modules="all-linear", use_rslora=True, lora_dropout=0.3)),
    (tiny_bert, dict(target_modules=["query", "value", "classifier"])),
    (tiny_bert, dict(target_modules=r".*attention\.(self|output)\..*(query|dense)")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make, options", CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_peft_reads_ours(tmp_path, make, options, dtype):
    base = make().to(dtype)
    ours = copy.deepcopy(base)
    names = inject_lora(ours, 3, 5, **options)
    perturb(ours)
    save_adapter(ours, tmp_path, base_model_name_or_path="some/model")
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, peft.LoraConfig) and config.base_model_name_or_path == "some/model"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of missing and of unexpected keys
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert names == [name for name, part in theirs.base_model.model.named_modules() if isinstance(part, peft.tuners.lora.LoraLayer)]
    assert_same_logits(ours, theirs, options.get("init"))
    assert (logits(ours) - logits(base)).abs().max() > 0.05 * logits(base).abs().max()
    again = copy.deepcopy(base)
    assert load_adapter(again, tmp_path) == names
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make, options", CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_ours_reads_peft_s(tmp_path, make, options, dtype):
    base = make().to(dtype)
    options = dict(options)
    init = options.pop("init", True)
    theirs = quiet_peft_model(copy.deepcopy(base), r=3, lora_alpha=5, init_lora_weights=init, **options)
    perturb(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it also saves an adapted embedding's table
        theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path)
    assert_same_logits(ours, theirs, init)
    load_adapter(ours, tmp_path)  # and into a model that is injected already
    assert_same_logits(ours, theirs, init)
    trainable = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trainable == set(lora_state_dict(ours))


def digits():
    return nn.Sequential(nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(64, 5))


def test_convolutions_both_ways(tmp_path):
    base, x = digits(), torch.randn(3, 2, 8, 8)
    ours = copy.deepcopy(base)
    inject_lora(ours, 2, 7, ["0", "2", "4"])
    perturb(ours)
    save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    assert_same(logits(ours, x), logits(theirs, x))
    perturb(theirs)
    theirs.save_pretrained(tmp_path / "b")
    load_adapter(ours, tmp_path / "b")
    assert_same(logits(ours, x), logits(theirs, x))


def test_a_name_that_ends_another_s_is_not_taken_for_it(tmp_path):
    """ "0" chooses "inner.0" too, by the rule for lists; only the outer one is adapted."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    ours, x = copy.deepcopy(base), torch.randn(3, 4)
    assert inject_lora(ours, 2, 3, "0") == ["0"]
    perturb(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_same(logits(ours, x), logits(theirs, x))
    assert load_adapter(copy.deepcopy(base), tmp_path) == ["0"]


def test_the_files_are_those_that_peft_writes(tmp_path):
    ours = tiny_llama()
    inject_lora(ours, 2, 3, ["q_proj", "embed_tokens"])
    save_adapter(ours, tmp_path / "deep" / "folder")
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "deep" / "folder" / "adapter_model.safetensors")
    prefix = "base_model.model.model."
    assert {key.removeprefix(prefix): tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "embed_tokens.lora_embedding_A": (2, 40),
        "embed_tokens.lora_embedding_B": (16, 2),
        **{f"layers.{layer}.self_attn.q_proj.lora_A.weight": (2, 16) for layer in range(2)},
        **{f"layers.{layer}.self_attn.q_proj.lora_B.weight": (16, 2) for layer in range(2)},
    }


def one_layer():
    model = nn.Sequential(nn.Linear(4, 3))
    inject_lora(model, 2, 3)
    perturb(model)
    return model


def test_factors_that_are_views_or_shared_are_written_as_what_they_show(tmp_path):
    ours = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    inject_lora(ours, 2, 3)
    whole = torch.randn(4, 6)
    ours[0].lora_A.data, ours[1].lora_A.data = whole.T[:2], whole.T[:2]
    save_adapter(ours, tmp_path)
    again = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    load_adapter(again, tmp_path)
    assert all(torch.equal(layer.lora_A, whole.T[:2]) for layer in again)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_factors_of_every_float_dtype_are_read_into_float32(tmp_path, dtype):
    ours = one_layer()
    save_adapter(ours, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    narrow = {key: tensor.to(dtype) for key, tensor in load_file(weights).items()}
    save_file(narrow, weights)
    load_adapter(ours, tmp_path)
    assert torch.equal(ours[0].lora_A, narrow["base_model.model.0.lora_A.weight"].float())
    assert ours[0].lora_A.dtype == torch.float32


def test_saving_again_replaces(tmp_path):
    ours = tiny_llama()
    inject_lora(ours, 2, 3, ["q_proj"])
    save_adapter(ours, tmp_path)
    perturb(ours)
    save_adapter(ours, tmp_path)
    again = tiny_llama()
    load_adapter(again, tmp_path)
    assert all(torch.equal(value, lora_state_dict(ours)[name]) for name, value in lora_state_dict(again).items())
    assert len(list(tmp_path.iterdir())) == 2


def test_merging_a_loaded_adapter(tmp_path):
    base = tiny_bert()
    ours = copy.deepcopy(base)
    inject_lora(ours, 2, 3, ["query"])
    perturb(ours)
    save_adapter(ours, tmp_path)
    other = copy.deepcopy(base)
    load_adapter(other, tmp_path)
    assert_same(logits(merge_lora(other)), logits(ours), ulps=200)


# ---- refusals ------------------------------------------------------------------------------------------------------------------------


def test_what_can_not_be_saved(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="no LoRA layer"):
        save_adapter(model, tmp_path / "x")
    inject_lora(model, 2, 3, ["q_proj"])
    layer = model.model.layers[1].self_attn.q_proj
    layer.merge()
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj is merged.*unmerge"):
        save_adapter(model, tmp_path / "x")
    layer.unmerge()
    layer.lora_A.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight holds NaN"):
        save_adapter(model, tmp_path / "x")
    layer.lora_A.data[0, 0] = 0
    inject_lora(model, 2, 3, ["v_proj"], use_rslora=True)
    with pytest.raises(ValueError, match=r"v_proj and model\.layers\.0\.self_attn\.q_proj differ in r or"):
        save_adapter(model, tmp_path / "x")
    with pytest.raises(ValueError, match="itself a LoRA layer"):
        save_adapter(LoRALinear(nn.Linear(4, 4), 2, 3), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_failing_disk_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = tiny_llama()
    inject_lora(model, 2, 3, ["q_proj"])
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    perturb(model)

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = tiny_llama()
    inject_lora(model, 2, 3, ["q_proj", "v_proj"])
    perturb(model)
    save_adapter(model, folder)
    return folder


def assert_refused(folder, words, error=ValueError, prepare=lambda model: None):
    """Refused in these words, with the model as it was."""
    model = tiny_llama()
    prepare(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=words):
        load_adapter(model, folder)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(use_dora=True), r"missing: .*q_proj\.lora_magnitude_vector"),
        (dict(bias="all"), "bias='all'"),
        (dict(bias="lora_only"), "bias='lora_only'"),
        (dict(lora_bias=True), "lora_bias=True"),
        (dict(rank_pattern={"q_proj": 4}), r"of another shape: .*q_proj\.lora_A\.weight \(2, 16\), not \(4, 16\)"),
        (dict(rank_pattern={"(": 4}), "not a regular expression"),
        (dict(modules_to_save=["lm_head"]), r"missing: .*lm_head\.weight"),
        (dict(modules_to_save="lm_head"), "modules_to_save is .lm_head., which can.t be read"),
        (dict(trainable_token_indices=[3]), r"missing: .*embed_tokens\.token_adapter\.trainable_tokens_delta"),
        (dict(trainable_token_indices=[40]), "trainable_token_indices must be from 0 to 39, got 40"),
        (dict(layers_to_transform=0), "layers_to_transform=0"),
        (dict(exclude_modules=["v_proj"]), "exclude_modules"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(something_new={"a": 1}), "something_new"),
        (dict(peft_type="BOFT"), "peft_type must be 'LORA' or another that is read here.*got 'BOFT'"),
        (dict(peft_type="IA3"), "not supported here: .*r=2"),
        (dict(peft_type="P_TUNING"), "stands around the model: call load_prompt"),
        (dict(init_lora_weights="olora"), "init_lora_weights='olora'.*path_initial_model_for_weight_conversion"),
        (dict(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
        (dict(target_modules=["c_attn"]), "matches no layer"),
        (dict(target_modules=None), "target_modules is None"),
        (dict(r="2"), "r is '2'"),
        (dict(r=0), "does not fit"),
        (dict(lora_dropout=2.0), "lora_dropout"),
        (dict(r=4), r"of another shape: .*q_proj\.lora_A\.weight \(2, 16\), not \(4, 16\)"),
        (dict(target_modules=["q_proj"]), r"unexpected: .*v_proj\.lora_A\.weight"),
        (dict(target_modules=["q_proj", "v_proj", "k_proj"]), r"missing: .*k_proj\.lora_A\.weight"),
    ],
)
def test_configs_that_do_not_fit(folder, changes, words):
    edit_config(folder, **changes)
    assert_refused(folder, words)


def test_every_switch_that_peft_has_and_this_module_lacks_is_refused(folder):
    """A config written by peft names all of its options. Turning any unknown one on must not be overlooked."""
    for key, value in peft.LoraConfig().to_dict().items():
        if key not in READ | SILENT:
            config = shutil.copytree(folder, folder.parent / key)
            edit_config(config, **{key: {"on": 1} if not isinstance(value, bool) else not value})
            assert_refused(config, key)


def test_missing_and_foreign_files(folder, tmp_path):
    assert_refused(tmp_path / "nowhere", "holds no adapter_config.json", FileNotFoundError)
    weights = folder / "adapter_model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-5])
    assert_refused(folder, "cut off")
    weights.write_text("These are not weights, whatever the name says.\n")
    assert_refused(folder, "not a safetensors file")
    weights.unlink()
    assert_refused(folder, "holds no adapter_model.safetensors", FileNotFoundError)
    torch.save({"a": torch.zeros(1)}, folder / "adapter_model.bin")
    assert_refused(folder, "a pickle: reading it can run any code")
    weights.write_bytes(original)
    (folder / "adapter_config.json").write_text("{")
    assert_refused(folder, "not JSON")
    (folder / "adapter_config.json").write_text("[]")
    assert_refused(folder, "got 'list'")


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        file_of(b"no JSON"),
        file_of([1, 2]),
        file_of({"a": 5}),
        file_of({"a": {"dtype": "F32"}}),
        file_of({"a": ENTRY | {"dtype": "F1"}}, bytes(8)),
        file_of({"a": ENTRY | {"shape": [3]}}, bytes(8)),
        file_of({"a": ENTRY | {"shape": [-2]}}, bytes(8)),
        file_of({"a": ENTRY | {"shape": [-1, -2]}}, bytes(8)),
        file_of({"a": ENTRY | {"shape": [2.0]}}, bytes(8)),
        file_of({"a": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)),
        file_of({"a": ENTRY | {"data_offsets": [0, 4, 8]}}, bytes(8)),
        file_of({"a": ENTRY, "b": ENTRY}, bytes(8)),
        file_of({"a": ENTRY}, bytes(7)),
        file_of({"a": ENTRY}, bytes(9)),
    ],
)
def test_broken_and_foreign_weights_are_named_with_the_remedy(folder, content):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(content)
    assert_refused(folder, f"{weights} is cut off, or not a safetensors file: copy it again")


def test_no_pickle_is_opened_whatever_its_name(folder, tmp_path):
    trace = tmp_path / "ran"
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb(str(trace))))
    assert_refused(folder, "not a safetensors file")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(str(trace)))).close()
    assert trace.exists()  # it would have


def test_a_file_cut_anywhere_is_refused(tmp_path):
    model = one_layer()
    save_adapter(model, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole, before = weights.read_bytes(), copy.deepcopy(model.state_dict())
    for length in range(len(whole)):
        weights.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is cut off, or not a safetensors file"):
            load_adapter(model, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_keys_values_and_shapes(folder):
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, weights)
    assert_refused(folder, f"missing: {key}")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(40, 16)}, weights)
    assert_refused(folder, r"unexpected: base_model\.model\.lm_head\.weight")  # not the model's own
    save_file(tensors | {key: tensors[key].T.contiguous()}, weights)
    assert_refused(folder, r"another shape: .*q_proj\.lora_B\.weight \(2, 16\), not \(16, 2\)")
    save_file(tensors | {key: tensors[key] * torch.inf}, weights)
    assert_refused(folder, r"q_proj\.lora_B\.weight holds NaN, infinity")
    save_file(tensors | {key: tensors[key].int()}, weights)
    assert_refused(folder, r"q_proj\.lora_B\.weight holds .*integers")


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(r=4, lora_alpha=3), "has r=4, the file 2"),
        (dict(r=2, lora_alpha=16), "has lora_alpha=16, the file 3"),
        (dict(r=2, lora_alpha=3, use_rslora=True), "has use_rslora=True, the file False"),
        (dict(r=2, lora_alpha=3, init="pissa"), "init='pissa', the file 'kaiming'"),
        (dict(r=2, lora_alpha=3, target_modules=["q_proj"]), r"unexpected: .*v_proj\.lora_A"),
        (dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "o_proj"]), r"missing: .*o_proj\.lora_A"),
    ],
)
def test_models_that_are_injected_otherwise(folder, options, words):
    options = {"target_modules": ["q_proj", "v_proj"]} | options
    assert_refused(folder, words, prepare=lambda model: inject_lora(model, **options))


def test_a_merged_model_takes_no_adapter(folder):
    def prepare(model):
        inject_lora(model, 2, 3, ["q_proj", "v_proj"])
        for _, layer in lora_layers(model):
            layer.merge()

    assert_refused(folder, "is merged", prepare=prepare)
