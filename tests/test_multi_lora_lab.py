"""What unit 11's notebook and benchmarks stand on: merged updates, tenants that can be told apart, costs fitted to steps, dry runs."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import merging as merging_benchmark
from benchmarks import serving_scenario
from course.lab import merging, recorded, serving
from reference.multi_lora import Factors, MultiLoRA, bytes_of
from reference.multi_lora.serving import AdapterPool, Engine, Request, generate
from reference.multi_lora.simulation import Load, simulate


def test_costs_are_found_again_from_the_steps_that_they_make():
    base, row, adapter = 0.03, 0.002, 0.0005
    table = [{"rows": r, "distinct": d, "milliseconds": 1e3 * (base + row * r + adapter * d)} for r in (1, 4, 16) for d in (0, 1, r)]
    assert serving.fitted(table) == pytest.approx((base, row, adapter))
    assert min(serving.fitted([{**each, "milliseconds": 10 - each["rows"] / 10} for each in table])) >= 0


def test_tiny_llama_is_the_tiny_model():
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(serving.tiny_llama().logits(ids), serving.tiny()(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_tenants_answer_with_their_own_words_in_one_batch():
    words = serving.secrets(3)
    assert len(set(words)) == 3
    tenants = {f"t{i}": serving.tenant(secret) for i, secret in enumerate(words)}
    served, tokenizer = MultiLoRA(serving.tiny_llama()), merging.world().tokenizer
    for name, adapter in tenants.items():
        served.add(name, adapter)
    prompt = tokenizer(serving.QUESTION).input_ids
    with served.rows([*tenants, None]):
        found = [tokenizer.decode(ids) for ids in generate(served.model, [prompt] * 4, 3)]
    assert found[:3] == words and found[3] not in words
    pool = AdapterPool(served, bytes_of(tenants["t0"]) + 4096 * len(served.layers), 1 << 24)
    for name, adapter in tenants.items():
        pool.register(name, adapter)
    engine = Engine(served, pool, 2, 1 << 20)
    for name in ("t0", "t1", "t2", "t0"):
        engine.submit(Request(name, prompt, 3))
    assert {(r.tenant, tokenizer.decode(r.tokens)) for r in engine.run()} == set(zip(tenants, words, strict=True))


def test_measured_costs_run_the_simulation():
    served = MultiLoRA(serving.tiny_llama())
    adapters = [serving.random_adapter(served, 4, seed=i) for i in range(4)]
    costs, table = serving.measured_costs(served, adapters, 8, serving.copy_rate(served, adapters[0], 2), 0.1, repeats=2)
    assert {(row["rows"], row["distinct"]) for row in table} == {(1, 0), (1, 1), (4, 0), (4, 1), (4, 4)}
    assert costs.base + costs.row > 0 and costs.bus > 0
    assert simulate(Load(9, 5.0, new=2), costs, 4, requests=20).per_second > 0


def test_a_sum_of_updates_is_the_stacked_adapter():
    g = torch.Generator().manual_seed(0)

    def some():
        return {"model.layers.0.self_attn.q_proj": Factors(torch.randn(5, 128, generator=g), torch.randn(128, 5, generator=g), 0.5)}

    pair = some(), some()
    update = merging.merged(pair, merging.METHODS["sum"])
    expected = {name: pair[0][name].delta() + pair[1][name].delta() for name in pair[0]}
    torch.testing.assert_close(update, expected)
    for name, method in merging.METHODS.items():
        assert merging.merged(pair, method).keys() == update.keys(), name
    q = merging.updated(update).get_submodule("model.layers.0.self_attn.q_proj").weight
    torch.testing.assert_close(
        q - merging.base().get_submodule("model.layers.0.self_attn.q_proj").weight, *expected.values(), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("benchmark", [merging_benchmark, serving_scenario], ids=lambda module: module.__name__)
def test_a_dry_run_saves_its_result(benchmark, monkeypatch, tmp_path):
    name = benchmark.__name__.rpartition(".")[2]
    monkeypatch.setattr(sys, "argv", [name, "--smoke", "--out", str(tmp_path)])
    benchmark.main()
    result = recorded.load(name, folder=tmp_path)["result"]
    if name == "merging":
        assert {row["name"] for row in result["rows"] if row["kind"] == "method"} == set(merging.METHODS)
        return
    assert [row["live"] for row in result["unmerged"]] == [1, 6]
    assert result["unmerged"][1]["loads"] >= 5 and result["base"]["loads"] == 0
    assert len(result["in_turn"]["merge_seconds"]) == 2 and result["costs"]["base"] + result["costs"]["row"] > 0


def test_a_base_that_adapters_are_merged_into_stays_where_it_lies():
    """Recorded steps read it there."""
    setting = serving_scenario.smoke()
    served = MultiLoRA(serving_scenario.build(setting, torch.device("cpu")))
    a, b = list(serving_scenario.tenants_of(served, setting).values())[:2]
    base, layers = serving_scenario.Base(served), [layer.base for layer in served.layers.values()]
    where, plain = [layer.weight.data_ptr() for layer in layers], [layer.weight.clone() for layer in layers]
    a, b = ({name: replace(f, B=1000 * f.B) for name, f in adapter.items()} for adapter in (a, b))
    base.merge(a)
    merged = [layer.weight.clone() for layer in layers]
    base.merge(b)
    assert [layer.weight.data_ptr() for layer in layers] == where and all(layer.weight is not None for layer in layers)
    assert not any(torch.equal(x, y) for x, y in zip(merged, plain, strict=True))
    base.restore()
    assert all(torch.equal(layer.weight, x) for layer, x in zip(layers, plain, strict=True))
