"""reference.multi_lora.combine against peft's add_weighted_adapter where that is right, and against the definition where it is not."""

import copy
import math
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import assert_same, tiny_llama
from peft.utils import merge_utils
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from reference.adapter_format import save_adapter
from reference.lora import inject_lora
from reference.multi_lora import Factors, combine, combine_adapters, factors_of, merge_tensors, merged_update, read_factors
from reference.multi_lora.rules import RULES

OUT, IN = 24, 20
SHORTCUTS = {"linear": {}, "ties": {"density": 0.4}, "dare_linear": {"density": 0.5}, "dare_ties": {"density": 0.5}}
SHORTCUTS["magnitude_prune"] = {"density": 0.3}
PEFT_NAMES = {rule: "svd" if rule == "linear" else f"{rule}_svd" for rule in RULES}


def peft_layer(ranks, alphas, rslora=False, dtype=torch.float32):
    """A layer with several adapters of peft's, and the same as factors."""
    model, names = nn.Sequential(nn.Linear(IN, OUT)).to(dtype), []
    for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], use_rslora=rslora, init_lora_weights=False)
        names.append(f"a{i}")
        if i == 0:
            model = peft.get_peft_model(model, config, adapter_name="a0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    own = [Factors(layer.lora_A[n].weight.detach().clone(), layer.lora_B[n].weight.detach().clone(), layer.scaling[n]) for n in names]
    return model, layer, names, own


def theirs(model, layer, names, weights, kind, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, weights, "new", kind, **settings)
    return Factors(layer.lora_A["new"].weight.detach(), layer.lora_B["new"].weight.detach(), layer.scaling["new"])


def random_factors(r, sizes=(OUT, IN), scaling=1.5, dtype=torch.float32):
    return Factors(torch.randn(r, sizes[1], dtype=dtype), torch.randn(sizes[0], r, dtype=dtype), scaling)


def the_sum(adapters, weights):
    return sum(w * a.scaling * a.B.double() @ a.A.double() for a, w in zip(adapters, weights, strict=True))


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -2.0)])
def test_cat_is_pefts(weights, dtype):
    """B to the bit, and A but for one rounding: w·s is one number here, and there two multiplications."""
    model, layer, names, own = peft_layer((3, 5), (6, 4), dtype=dtype)
    expected, found = theirs(model, layer, names, list(weights), "cat"), combine(own, weights, "cat")
    assert torch.equal(found.B, expected.B) and found.scaling == expected.scaling == 1
    assert_same(found.A, expected.A)


@pytest.mark.parametrize("rank", [None, 1, 4, 8])
def test_svd_gives_pefts_update(rank):
    model, layer, names, own = peft_layer((3, 5), (6, 4))
    expected, found = theirs(model, layer, names, [0.7, -0.3], "svd", svd_rank=rank), combine(own, (0.7, -0.3), "svd", rank)
    assert found.r == expected.r == (rank or 5)
    assert_same(found.delta(), expected.delta(), ulps=32)


@pytest.mark.parametrize("rule", SHORTCUTS)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -2.0)])
def test_rules_on_factors_are_pefts_to_the_bit(rule, weights, monkeypatch):
    model, layer, names, own = peft_layer((4, 4), (8, 4))
    if rule.startswith("dare"):  # peft makes the new adapter before it draws: let both draw after that
        real, draws = getattr(merge_utils, rule), []

        def draw(tensors, *arguments):
            if not draws:
                torch.manual_seed(5)
            draws.append(1)
            return real(tensors, *arguments)

        monkeypatch.setattr(peft.tuners.lora.model, rule, draw)
    expected = theirs(model, layer, names, list(weights), rule, **SHORTCUTS[rule])
    torch.manual_seed(5)
    found = combine(own, weights, rule, on="factors", **SHORTCUTS[rule])
    assert torch.equal(found.A, expected.A) and torch.equal(found.B, expected.B)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_rules_are_pefts_to_the_bit(rule, sign):
    tensors, weights = [torch.randn(9, 7) for _ in range(3)], [0.5, 2.0, -1.0]
    settings = {} if rule == "linear" else {"density": 0.6}
    more = {"majority_sign_method": sign} if rule.endswith("ties") else {}
    torch.manual_seed(1)
    expected = getattr(merge_utils, "task_arithmetic" if rule == "linear" else rule)(tensors, torch.tensor(weights), **settings, **more)
    torch.manual_seed(1)
    assert torch.equal(merge_tensors(tensors, weights, rule, sign=sign, **settings), expected)


@pytest.mark.parametrize("rule", ["ties", "magnitude_prune"])
def test_rules_on_the_update_are_pefts(rule):
    model, layer, names, own = peft_layer((3, 5), (6, 4))
    expected = theirs(model, layer, names, [0.7, 0.3], PEFT_NAMES[rule], density=0.4, svd_rank=IN)
    assert_same(combine(own, (0.7, 0.3), rule, rank=IN, density=0.4).delta(), expected.delta(), ulps=64)


@given(st.integers(0, 2**20), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
@settings(max_examples=40)
def test_cat_and_full_rank_svd_are_the_definition(seed, ranks, data):
    torch.manual_seed(seed)
    own = [random_factors(r, scaling=data.draw(st.sampled_from([0.25, 1.0, 2.5]))) for r in ranks]
    weights = [data.draw(st.sampled_from([-1.5, -0.2, 0.3, 1.0])) for _ in ranks]
    exact = the_sum(own, weights)
    full = min(sum(ranks), OUT, IN)
    assert distance(combine(own, weights).delta(), exact) < 1e-5
    for method in ("svd", "linear"):
        assert distance(combine(own, weights, method, full).delta(), exact) < 1e-5
    assert distance(merged_update(own, weights), exact) < 1e-5


@given(st.integers(0, 2**20), st.integers(1, 8))
@settings(max_examples=25)
def test_a_cut_is_the_best_there_is(seed, rank):
    """Eckart–Young: what is lost is the tail of the singular values, though ΔW was never formed."""
    torch.manual_seed(seed)
    own = [random_factors(3), random_factors(5, scaling=0.5)]
    exact = the_sum(own, (1.0, -0.5))
    tail = torch.linalg.svdvals(exact)[rank:].norm()
    lost = (combine(own, (1.0, -0.5), "svd", rank).delta().double() - exact).norm()
    torch.testing.assert_close(lost, tail, rtol=1e-4, atol=1e-4)


def test_averaging_factors_adds_products_that_nobody_trained():
    one, other = random_factors(4, scaling=2.0), random_factors(4, scaling=2.0)
    weights = (0.7, 0.3)
    found, exact = combine([one, other], weights, "linear", on="factors").delta().double(), the_sum([one, other], weights)
    cross = 2.0 * math.sqrt(0.7 * 0.3) * (one.B @ other.A + other.B @ one.A).double()
    assert distance(found, exact + cross) < 1e-6
    assert distance(found, exact) > 0.5


@pytest.mark.parametrize("rule", ["linear", "ties"])
def test_the_same_adapter_in_other_signs_is_another_result_on_factors_and_the_same_on_updates(rule):
    one, other = random_factors(4), random_factors(4)
    turned, more = Factors(-other.A, -other.B, other.scaling), SHORTCUTS[rule]
    assert torch.equal(turned.delta(), other.delta())
    before, after = (combine([one, o], (0.5, 0.5), rule, on="factors", **more).delta() for o in (other, turned))
    assert distance(after, before) > 0.5
    before, after = (combine([one, o], (0.5, 0.5), rule, rank=8, **more).delta() for o in (other, turned))
    assert distance(after, before) < 1e-5


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_rslora_adapters_come_out_too_large_in_peft_and_right_here(kind):
    model, layer, names, own = peft_layer((4, 4), (8, 8), rslora=True)
    settings = {"svd_rank": 8} if kind == "svd" else {}
    expected = theirs(model, layer, names, [0.7, 0.3], kind, **settings)
    options = {"on": "factors"} if kind == "linear" else {"rank": 8} if kind == "svd" else {}
    found = combine(own, (0.7, 0.3), kind, **options)
    # Should a later peft give them scale 1, this ratio is 1, and the texts that name it must go.
    assert distance(expected.delta(), math.sqrt(expected.r) * found.delta()) < 1e-5
    if kind != "linear":
        assert distance(found.delta(), the_sum(own, (0.7, 0.3))) < 1e-5


def test_ties_by_hand():
    """The stronger side wins; the mean of those on it, before which their weights multiply; zeros are on no side."""
    one, other, third = torch.tensor([3.0, -1.0, 0.0, 2.0]), torch.tensor([-1.0, -3.0, 0.0, 4.0]), torch.tensor([-1.0, 1.0, 5.0, -6.0])
    found = merge_tensors([one, other, third], [1.0, 1.0, 2.0], "ties", density=1.0)
    assert found.tolist() == [3.0, -2.0, 10.0, 3.0]  # the last is a draw, which is plus


def test_pruning_by_hand():
    found = merge_tensors([torch.tensor([1.0, -4.0, 2.0, 3.0, 0.5])], [2.0], "magnitude_prune", density=0.5)
    assert found.tolist() == [0.0, -8.0, 0.0, 6.0, 0.0]  # int(2.5) entries


def test_dare_keeps_the_mean():
    tensor, generator = torch.randn(50), torch.Generator().manual_seed(0)
    mean = torch.stack([merge_tensors([tensor], [1.0], "dare_linear", density=0.3, generator=generator) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, tensor, rtol=0.12, atol=0.02)


def test_a_generator_repeats_the_draws():
    own, first = [random_factors(3), random_factors(3)], None
    for _ in range(2):
        found = combine(own, (1, 1), "dare_ties", density=0.5, generator=torch.Generator().manual_seed(4)).delta()
        assert first is None or torch.equal(found, first)
        first = found


def test_whole_adapters_may_cover_different_layers():
    a, b, c = (random_factors(2) for _ in range(3))
    found = combine_adapters([{"x": a, "y": b}, {"y": c}], [2.0, 0.5])
    assert distance(found["x"].delta(), 2 * a.delta()) < 1e-6
    assert distance(found["y"].delta(), the_sum([b, c], [2.0, 0.5])) < 1e-6


def test_half_types_are_combined_in_float32_and_stay_half():
    own = [random_factors(3, dtype=torch.bfloat16), random_factors(4, dtype=torch.bfloat16)]
    for method, more in (("cat", {}), ("svd", {"rank": 7}), ("ties", {"density": 1.0, "rank": IN})):
        found = combine(own, (0.5, 2.0), method, **more)
        assert found.A.dtype == found.B.dtype == torch.bfloat16
        if method != "ties":
            assert distance(found.delta(), the_sum(own, (0.5, 2.0))) < 0.02


@pytest.mark.parametrize("rslora", [False, True])
def test_factors_of_a_model_and_of_its_file_are_the_same(tmp_path, rslora):
    model = tiny_llama()
    inject_lora(model, 3, 5, ["q_proj", "down_proj"], use_rslora=rslora, init="gaussian")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    inside, read = factors_of(model), read_factors(tmp_path)
    assert inside.keys() == read.keys()
    for name, factors in read.items():
        layer = model.get_submodule(name)
        assert torch.equal(factors.A, inside[name].A) and torch.equal(factors.B, inside[name].B)
        assert factors.scaling == inside[name].scaling == layer.scaling
        assert_same(factors.delta(), layer.delta_weight().detach())
    assert all(factors.A.dtype == torch.bfloat16 for factors in read_factors(tmp_path, torch.bfloat16).values())


ONE, TWO = Factors(torch.ones(2, 4), torch.ones(3, 2)), Factors(torch.ones(1, 4), torch.ones(3, 1))
WIDE = Factors(torch.ones(2, 5), torch.ones(3, 2))


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (([], []), {}, ValueError, "adapters must hold at least one"),
        (([ONE], [1.0, 2.0]), {}, ValueError, "weights: 2 numbers for 1 adapters"),
        (([ONE, ONE], [1.0, math.nan]), {}, ValueError, r"weights\[1\] must be finite"),
        (([ONE], ["1"]), {}, TypeError, r"weights\[0\] must be a number"),
        (([torch.ones(2)], [1.0]), {}, TypeError, r"adapters\[0\] must be Factors, got Tensor"),
        (([ONE, WIDE], [1, 1]), {}, ValueError, r"adapters\[1\] is of a layer of other sizes"),
        (([ONE], [1]), {"method": "mean"}, ValueError, "method must be one of .* got 'mean'"),
        (([ONE], [1]), {"method": "ties"}, ValueError, "density must say which share stays"),
        (([ONE], [1]), {"method": "cat", "density": 0.5}, ValueError, "'cat' keeps every entry: leave out density=0.5"),
        (([ONE], [1]), {"method": "ties", "density": 0}, ValueError, "density must be above 0"),
        (([ONE], [1]), {"method": "ties", "density": 1.5}, ValueError, "density must be from 0 to 1, got 1.5"),
        (([ONE], [1]), {"method": "ties", "density": 0.5, "sign": "most"}, ValueError, "sign must be one of"),
        (([ONE], [1]), {"on": "weights"}, ValueError, "on must be 'update' or 'factors', got 'weights'"),
        (([ONE], [1]), {"method": "cat", "on": "factors"}, ValueError, "'cat' is no rule for entries"),
        (([ONE, TWO], [1, 1]), {"method": "linear", "on": "factors"}, ValueError, r"ranks must be equal, got \[2, 1\]: use on='update'"),
        (([ONE], [1]), {"method": "cat", "rank": 2}, ValueError, "rank=2 has no use here"),
        (([ONE, TWO], [1, 1]), {"method": "svd", "rank": 4}, ValueError, "rank must be from 1 to 3, got 4"),
        (([ONE], [1]), {"method": "svd", "rank": 1.0}, TypeError, "rank must be an integer"),
    ],
)
def test_bad_input_is_named(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        combine(*arguments, **settings)


@pytest.mark.parametrize(
    ("A", "B", "scaling", "error", "message"),
    [
        (torch.ones(2, 4), torch.ones(3, 1), 1.0, ValueError, "with one r"),
        (torch.ones(4), torch.ones(3, 1), 1.0, ValueError, "A must be"),
        (torch.ones(0, 4), torch.ones(3, 0), 1.0, ValueError, "rank must be at least 1"),
        (torch.ones(2, 4).half(), torch.ones(3, 2), 1.0, ValueError, "of one dtype"),
        (torch.ones(2, 4).int(), torch.ones(3, 2), 1.0, TypeError, "floating numbers"),
        (torch.ones(2, 4), torch.ones(3, 2), math.inf, ValueError, "scaling must be finite"),
        (torch.ones(2, 4), torch.ones(3, 2), "1", TypeError, "scaling must be a number"),
    ],
)
def test_factors_that_do_not_fit_are_refused(A, B, scaling, error, message):
    with pytest.raises(error, match=message):
        Factors(A, B, scaling)


def test_a_layer_in_which_it_fails_is_named():
    with pytest.raises(ValueError, match=r"mlp: adapters\[1\] is of a layer of other sizes"):
        combine_adapters([{"mlp": ONE}, {"mlp": WIDE}], [1, 1])
    with pytest.raises(ValueError, match="weights: 1 numbers for 2 adapters"):
        combine_adapters([{}, {}], [1])
    with pytest.raises(ValueError, match="at least one layer"):
        combine_adapters([{}], [1])


def test_models_whose_adapters_are_no_plain_lora_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no LoRA layer"):
        factors_of(tiny_llama())
    model = tiny_llama()
    inject_lora(model, 2, 4, ["q_proj", "embed_tokens"])
    with pytest.raises(TypeError, match="embed_tokens is a LoRAEmbedding"):
        factors_of(model)
    save_adapter(model, tmp_path / "embedding")
    with pytest.raises(ValueError, match="not pairs of A and B of linear layers"):
        read_factors(tmp_path / "embedding")
    model = tiny_llama()
    inject_lora(model, 2, 4, ["q_proj"])
    model.model.layers[0].self_attn.q_proj.merge()
    with pytest.raises(ValueError, match="is merged: unmerge"):
        factors_of(model)
    pissa = tiny_llama()
    inject_lora(pissa, 2, 4, ["q_proj"], init="pissa")
    save_adapter(pissa, tmp_path / "pissa")
    with pytest.raises(ValueError, match="belongs to a base of its own"):
        read_factors(tmp_path / "pissa")


def test_a_hot_swap_in_peft_fills_a_smaller_rank_with_zeros(tmp_path):
    base = tiny_llama()

    def adapted(r):
        config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(copy.deepcopy(base), config).eval()

    first, second = adapted(4), adapted(2)
    second.save_pretrained(tmp_path)
    hotswap_adapter(first, str(tmp_path), adapter_name="default")
    factors = [p for name, p in first.named_parameters() if "lora_A" in name]
    assert factors and all(len(p) == 4 and p[:2].all() and not p[2:].any() for p in factors)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(first(ids).logits, second(ids).logits)
