"""Sharded QLoRA: two and three processes give the numbers of one, to the bit where nothing is summed in another order."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import cases
from course import ROOT
from reference.adapter_format import load_adapter
from reference.llama import Llama
from reference.lora import inject_lora, lora_layers
from reference.memory.sharding import adapter_tensors, layer_tensors, sharded_memory, share_bytes, whole_everywhere
from reference.qlora import NF4Linear, quantize_linears
from reference.sharded import RowwiseNF4Linear, engine, load_state, on_first, processes, quantize_and_shard, save_adapter, save_state, share
from tests import sharded_worker as worker


def run(count: int, folder: Path, *scenarios: str) -> list[dict]:
    """What each of ``count`` processes wrote and said, and how long it ran after it had written.

    They are started as torchrun would, without its own. Rank 1 hangs or dies at the end, and is not waited for.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
    running, said = [], [folder / f"{scenarios[0]}.{rank}.said" for rank in range(count)]
    for rank, words in enumerate(said):
        environment = os.environ | {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command = [sys.executable, "-m", "tests.sharded_worker", str(folder), *scenarios]
        with words.open("w") as file:
            running.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=file, stdout=file))
    for rank in [rank for rank in range(count) if rank != 1]:
        running[rank].wait(300)
    ended = time.time()
    running[1].kill()
    running[1].wait()
    results = []
    for rank, words in enumerate(said):
        written = folder / f"{scenarios[0]}.{rank}.json"
        assert written.exists(), words.read_text()[-3000:]
        result = {"said": words.read_text(), "after": ended - written.stat().st_mtime}
        results.append(json.loads(written.read_text()) | {"process": result})
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder) -> list[dict]:
    return run(2, folder, "two", "hang")


@pytest.fixture(scope="module")
def three(folder, two) -> list[dict]:
    return run(3, folder, "three")


def plain() -> Llama:
    """The model in one process, in four bits."""
    with torch.device("meta"):
        model = Llama(worker.SHAPE).requires_grad_(False)
    quantize_linears(model, block_size=worker.BLOCK, compute_dtype=torch.float32, device="cpu", weights=worker.weights)
    return model


@pytest.fixture(scope="module")
def one() -> dict:
    torch.manual_seed(0)
    model = plain()
    codes = {name: part.weight.clone() for name, part in model.named_modules() if isinstance(part, NF4Linear)}
    inject_lora(model, worker.RANK, worker.ALPHA)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=worker.RATE)
    losses = []
    for step in range(worker.BEFORE + worker.AFTER):
        loss = model.loss(worker.batch(step))
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return {"model": model, "codes": codes, "losses": losses}


def test_codes_are_those_of_one_process(one, two, folder):
    gathered = load_file(folder / worker.GATHERED)
    assert len(gathered) == 2 * len(one["codes"])
    for name, codes in one["codes"].items():
        rows = gathered[f"{name}.base.weight"]
        assert rows.shape[0] == one["model"].get_submodule(name).base.out_features
        assert torch.equal(rows.view(-1, 1), codes)


def test_losses_are_those_of_one_process(one, two):
    """Five rows over two processes: three here, two there."""
    for rank in two:
        assert rank["losses"] + rank["more"] == pytest.approx(one["losses"], rel=2e-6)
    assert one["losses"][-1] < one["losses"][0] - 0.005  # something was learned


def test_another_number_of_processes_goes_on(one, two, three):
    for rank in three:
        assert rank["step"] == worker.BEFORE
        assert rank["losses"] == pytest.approx(one["losses"][worker.BEFORE :], rel=2e-6)


@pytest.mark.parametrize("name", ["after", "after_three"])
def test_adapters_are_whole_in_pefts_files(name, one, three, folder):
    model = plain()
    load_adapter(model, folder / name)
    trained = dict(lora_layers(one["model"]))
    for path, layer in lora_layers(model):
        torch.testing.assert_close(layer.lora_A, trained[path].lora_A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.lora_B, trained[path].lora_B, rtol=1e-4, atol=1e-5)
    assert len(load_file(folder / name / "adapter_model.safetensors")) == 2 * len(trained)


def test_peft_reads_the_adapter(two, folder):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Llama(worker.SHAPE).model

        def forward(self, ids):
            return self.model(ids)

    config = peft.PeftConfig.from_pretrained(folder / "adapter")
    loaded = peft.PeftModel.from_pretrained(Holder(), folder / "adapter", config=config)
    found = {name for name, _ in loaded.named_parameters() if "lora_A" in name}
    assert len(found) == 7 * worker.SHAPE.layers and config.base_model_name_or_path == "a base"


def test_rank_0_reads_and_no_process_holds_more_than_a_layer_beside_its_shares(two):
    parameters = 1 + 9 * worker.SHAPE.layers + 2
    assert [rank["reads"] for rank in two] == [parameters, 0]
    frozen, adapters = layer_tensors(worker.SHAPE, worker.BLOCK, 4), adapter_tensors(worker.SHAPE, worker.RANK)
    whole, share = (share_bytes(frozen + adapters, cards) for cards in (1, 2))
    one_weight = 4 * worker.SHAPE.hidden * worker.SHAPE.mlp
    shares = (worker.SHAPE.layers - 1) * share + whole_everywhere(worker.SHAPE, worker.BLOCK)
    assert two[0]["most_in_layers"] <= 1.02 * (shares + whole + one_weight)


def test_received_bytes_are_as_predicted(two):
    predicted = predict()
    assert [rank["received"] for rank in two] == [predicted.received] * 2


def predict(cards: int = 2):
    """Of the tests' model: everything is float32 in it, and blocks have 32 weights."""
    return sharded_memory(worker.SHAPE, cards, worker.RANK, block=worker.BLOCK, other_bytes=4)


def test_shares_are_as_predicted(two):
    predicted = predict()
    shares = sum(two[0]["shares"].values())
    assert predicted.shares + predicted.adapters // 4 == pytest.approx(shares, rel=0.01)
    inside = two[0]["inside_a_layer"]
    assert predicted.gathered == pytest.approx(inside, rel=0.1)


def test_odd_rows_and_empty_shares(two):
    torch.manual_seed(0)
    model = worker.OddModel().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(worker.odd_weights(name))
    quantize_linears(model, double_quant=False, compute_dtype=torch.float32)
    torch.manual_seed(0)
    names = inject_lora(model, 1, 4, ["up"])
    for _, layer in lora_layers(model):
        layer.lora_B.data.fill_(0.5)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(7))
    model(x).square().mean().backward()
    for rank, rows in zip(two, (17, 16), strict=True):
        assert rank["odd"]["names"] == names and rank["odd"]["rows_here"] == [rows, rows]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(torch.tensor(rank["odd"]["grads"][name]), parameter.grad, rtol=1e-5, atol=1e-7)


def test_an_error_of_rank_0_is_everyones(two):
    wrong = "weights('model.layers.0.input_layernorm.weight') must have shape (64,), got (63,)"
    first, second = (rank["errors"] for rank in two)
    assert first["weights"] == f"ValueError: {wrong}"
    assert second["weights"] == f"RuntimeError: rank 0 failed: ValueError: {wrong}"
    for rank in (first, second):
        assert "NotADirectoryError" in rank["disk"] and "there is no file" in rank["state"]
        assert "a batch of 1 rows leaves some of 2 ranks without one" in rank["batch"]
        assert 'build the model under torch.device("meta")' in rank["values"]


def test_a_state_of_another_model_is_refused(three):
    assert all("is of another model: it holds a (3,)" in rank["error"] for rank in three)


def test_a_process_that_hangs_is_noticed(two):
    assert "rank 0 of 2: another rank did not answer within 10 s, or has ended" in two[0]["process"]["said"]
    assert two[0]["process"]["after"] < 60


def test_a_process_that_dies_is_noticed(three):
    for rank in (0, 2):
        process = three[rank]["process"]
        assert f"rank {rank} of 3: another rank did not answer within 120 s, or has ended" in process["said"]
        assert process["after"] < 60  # a connection that breaks says so before the time is over


def test_a_policy_of_mixed_precision_would_find_no_floats():
    layer = RowwiseNF4Linear(64, 33, bias=True, dtype=torch.float32)
    assert {name for name, tensor in layer.state_dict().items() if tensor.is_floating_point()} == {"bias"}
    weight = torch.randn(33, 64, generator=torch.Generator().manual_seed(0))
    layer.quantize(weight)
    before = layer.dequantize(torch.float32)
    assert torch.equal(layer.half().dequantize(torch.float32), before)
    linear = nn.Linear(64, 33)
    linear.weight.data.copy_(weight)
    assert torch.equal(NF4Linear.from_linear(linear).dequantize(torch.float32), before)


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_layer_is_nf4linear_in_rows(double_quant):
    linear = nn.Linear(96, 7)
    x = torch.randn(3, 96)
    known = NF4Linear.from_linear(linear, 32, double_quant, torch.float32)
    layer = RowwiseNF4Linear(96, 7, True, 32, double_quant, torch.float32)
    layer.quantize(linear.weight)
    layer.bias = linear.bias
    assert torch.equal(layer(x), known(x)) and layer.weight.shape == (7, 48)
    assert "block_size=32" in repr(layer)


def test_bad_arguments_of_the_layer_are_named():
    with pytest.raises(ValueError, match=r"block_size must divide 96, got 64; .* choose a smaller one"):
        RowwiseNF4Linear(96, 4)
    with pytest.raises(ValueError, match=r"weight must have shape \(4, 64\), got \(64, 4\)"):
        RowwiseNF4Linear(64, 4).quantize(torch.zeros(64, 4))
    with pytest.raises(ValueError, match="weight holds NaN"):
        RowwiseNF4Linear(64, 4).quantize(torch.full((4, 64), torch.nan))


@pytest.fixture
def mesh():
    """One process, this one."""
    with processes(device="cpu") as found:
        yield found


def test_one_process_needs_no_torchrun(mesh, tmp_path):
    model, adam = worker.sharded_llama(mesh)
    losses = worker.train(model, adam, mesh, range(2))
    save_state(model, adam, tmp_path / "state", 2)
    expected = worker.train(model, adam, mesh, range(2, 4))
    other, fresh = worker.sharded_llama(mesh)
    assert load_state(other, fresh, tmp_path / "state") == 2
    assert worker.train(other, fresh, mesh, range(2, 4)) == expected and losses[0] > expected[0]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_broken_state_changes_nothing(mesh, tmp_path):
    model, adam = worker.sharded_llama(mesh)
    save_state(model, adam, tmp_path / "state", 0)
    before = {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    (tmp_path / "cut").write_bytes((tmp_path / "state").read_bytes()[:-100])
    with pytest.raises(ValueError, match="is cut off"):
        load_state(model, adam, tmp_path / "cut")
    some = load_file(tmp_path / "state")
    first = sorted(some)[0]
    for change, problem in {"lacks": some.keys() - {first}, "says no step": some.keys()}.items():
        save_file({key: some[key] for key in problem}, tmp_path / "less", metadata={"step": "1"} if change == "lacks" else None)
        with pytest.raises(ValueError, match=change):
            load_state(model, adam, tmp_path / "less")
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name).full_tensor(), value)


def test_nothing_broken_is_saved(mesh, tmp_path):
    model, _ = worker.sharded_llama(mesh)
    model.get_parameter("model.layers.1.mlp.up_proj.lora_B").data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.lora_B.weight holds NaN"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="model holds no LoRA layer"):
        save_adapter(nn.Linear(2, 2), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_bad_arguments_are_refused_before_anything_is_read(mesh):
    with torch.device("meta"):
        model = Llama(worker.SHAPE)
    with pytest.raises(ValueError, match="block_size must divide 96, got 64"):
        quantize_and_shard(model, worker.weights, mesh, 4, 8)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(ValueError, match="timeout_seconds must be at least 1, got 0"), processes(0):
        pass


def test_the_librarys_llama_too(mesh, tmp_path):
    def weights(name: str) -> torch.Tensor:
        return worker.weights(name).bfloat16()

    losses, ids = [], worker.batch(0)
    for sharded in (False, True):
        model, _ = cases.skeleton(worker.SHAPE, torch.device("cpu"))
        torch.manual_seed(0)
        if sharded:
            quantize_and_shard(model, weights, mesh, 4, 8, block_size=worker.BLOCK)
        else:
            quantize_linears(model, block_size=worker.BLOCK, device="cpu", weights=weights)
            inject_lora(model, 4, 8)
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    save_adapter(model, tmp_path / "adapter")
    assert "model.layers.0.mlp.down_proj" in peft.PeftConfig.from_pretrained(tmp_path / "adapter").target_modules


def test_a_batch_is_divided(mesh):
    rows = torch.arange(6).view(3, 2)
    assert torch.equal(share(rows, mesh)[0], rows) and share(rows, mesh)[1] == 1
    assert on_first(lambda: "done") == "done"


@pytest.mark.gpu
def test_one_gpu_through_nccl(tmp_path):
    """The numbers of the layer that is not sharded, by the same kernels, and a state that is read back."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Llama(worker.SHAPE).requires_grad_(False)
    device = {"device": "cuda", "block_size": worker.BLOCK}
    quantize_linears(model, weights=lambda name: worker.weights(name).cuda(), **device)
    inject_lora(model, worker.RANK, worker.ALPHA)
    ids = worker.batch(0).cuda()
    with processes(device="cuda") as mesh:
        torch.manual_seed(0)
        with torch.device("meta"):
            other = Llama(worker.SHAPE)
        quantize_and_shard(other, worker.weights, mesh, worker.RANK, worker.ALPHA, block_size=worker.BLOCK)
        for one in (model, other):
            one.loss(ids).backward()
        assert torch.equal(model.loss(ids), other.loss(ids))
        grads = dict(model.named_parameters())
        for name, parameter in other.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad.full_tensor(), grads[name].grad)
        adam = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], fused=True)
        adam.step()
        save_state(other, adam, tmp_path / "state", 1)
        assert load_state(other, torch.optim.AdamW(adam.param_groups[0]["params"], fused=True), tmp_path / "state") == 1
        save_adapter(other, tmp_path / "adapter")


def test_older_engines_are_asked_for_no_gradient_of_integers(monkeypatch):
    """What torch 2.11 does to a share: a parameter that asks for gradients first, and gets the whole one's flag afterwards."""
    seen = []

    def older(module, mesh):
        from torch.distributed.fsdp._fully_shard import _fsdp_param

        for whole in module.parameters():
            share = _fsdp_param.nn.Parameter(whole.detach().clone())
            share.requires_grad_(whole.requires_grad)
            seen.append((share.dtype, share.requires_grad))
        assert _fsdp_param.nn.Linear is torch.nn.Linear
        return module

    layer = RowwiseNF4Linear(64, 3)
    with pytest.raises(RuntimeError, match="floating point"):
        older(layer, None)  # without the mending
    monkeypatch.setattr(engine, "SHARES_KEEP_THEIR_FLAG", False)
    monkeypatch.setattr(engine.fsdp, "fully_shard", older)
    seen.clear()
    assert engine.fully_shard(layer, None) is layer
    assert seen == [(torch.uint8, False), (torch.uint8, False)]
