"""Many adapters over one base: equal to a loop, to a LoRA layer each, to peft's mixed batch; versions; errors."""

import copy
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import assert_same, tiny_llama
from torch import nn

from reference.lora import LoRALinear, inject_lora
from reference.multi_lora import Factors, MultiLoRA, MultiLoRALinear, Route, factors_of
from reference.qlora import NF4Linear, quantize_linears

IN, OUT = 24, 20
BASES = {
    "float32": lambda: nn.Linear(IN, OUT),
    "bfloat16": lambda: nn.Linear(IN, OUT).bfloat16(),
    "nf4": lambda: NF4Linear.from_linear(nn.Linear(IN, OUT).bfloat16()),
}


def factors(r, scaling=1.5, dtype=torch.float32, sizes=(OUT, IN)):
    return Factors(torch.randn(r, sizes[1], dtype=dtype), torch.randn(sizes[0], r, dtype=dtype), scaling)


def lora_over(base, f):
    """A LoRA layer with these factors over a copy of the base."""
    layer = LoRALinear(copy.deepcopy(base), f.r, f.scaling * f.r)
    layer.lora_A.data, layer.lora_B.data = f.A.clone(), f.B.clone()
    return layer.eval()


def table(layer):
    adapters = {"a": factors(1), "b": factors(5, 0.75), "c": factors(16, 2.0)}
    for name, f in adapters.items():
        layer.add(name, f)
    return adapters


@pytest.mark.parametrize("kind", BASES)
def test_one_adapter_is_a_lora_layer_to_the_bit(kind):
    base = BASES[kind]().eval()
    layer, x = MultiLoRALinear(copy.deepcopy(base)), torch.randn(3, 4, IN, dtype=torch.float32 if kind == "float32" else torch.bfloat16)
    with torch.no_grad():
        for name, f in table(layer).items():
            layer.select(name)
            for shape in (x, x[0], x[0, 0]):
                assert_same(layer(shape), lora_over(base, f)(shape), half_ulps=0)
        layer.select(None)
        assert torch.equal(layer(x), base(x))


@st.composite
def batches(draw):
    names = draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9))
    return draw(st.sampled_from(sorted(BASES))), names, draw(st.sampled_from([(), (3,), (2, 2)]))


@given(batches())
@settings(max_examples=40)
def test_a_mixed_batch_is_a_loop_over_its_rows(batch):
    kind, names, between = batch
    base = BASES[kind]().eval()
    layer = MultiLoRALinear(copy.deepcopy(base))
    adapters = table(layer)
    x = torch.randn(len(names), *between, IN, dtype=torch.float32 if kind == "float32" else torch.bfloat16)
    layer.select(names)
    with torch.no_grad():
        found = layer(x)
        rows = [base(row[None]) if name is None else lora_over(base, adapters[name])(row[None]) for row, name in zip(x, names, strict=True)]
    assert_same(found, torch.cat(rows), ulps=8)


def test_a_model_gives_what_pefts_mixed_batch_gives():
    base = tiny_llama().eval()
    served, names = MultiLoRA(copy.deepcopy(base), ["q_proj", "v_proj", "down_proj"]), ["x", "y", "__base__"]
    for i, (name, r) in enumerate((("x", 2), ("y", 5))):
        config = peft.LoraConfig(r=r, lora_alpha=3 * r, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        if i == 0:
            theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        layers = {k: m for k, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
        served.add(
            name, {k: Factors(m.lora_A[name].weight.detach(), m.lora_B[name].weight.detach(), m.scaling[name]) for k, m in layers.items()}
        )
    theirs.eval()
    ids, rows = torch.randint(40, (5, 7)), ["y", "__base__", "x", "x", "y"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(input_ids=ids, adapter_names=rows).logits
        with served.rows([None if row == "__base__" else row for row in rows]):
            found = served.model(input_ids=ids).logits
        assert torch.equal(served.model(input_ids=ids).logits, base(input_ids=ids).logits)  # the block has ended
    assert_same(found, expected, ulps=8)
    assert names and not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("quantized", [False, True])
def test_each_row_of_a_model_is_its_own_adapters_answer(quantized):
    base = tiny_llama().eval()
    if quantized:
        quantize_linears(base)
    adapters, alone = {}, {}
    for name, r, targets in (("sql", 2, ["q_proj", "up_proj"]), ("clinic", 4, "all-linear")):  # of other layers and ranks
        alone[name] = copy.deepcopy(base)
        inject_lora(alone[name], r, 3 * r, targets)
        for layer in alone[name].modules():
            if isinstance(layer, LoRALinear):
                nn.init.normal_(layer.lora_B, std=0.3)
        adapters[name] = factors_of(alone[name])
    served = MultiLoRA(copy.deepcopy(base))
    for name, adapter in adapters.items():
        served.add(name, adapter)
    ids, rows = torch.randint(40, (4, 6)), ["clinic", "sql", None, "clinic"]
    with torch.no_grad():
        with served.rows(rows):
            found = served.model(input_ids=ids).logits
        for i, name in enumerate(rows):
            expected = (base if name is None else alone[name].eval())(input_ids=ids[i : i + 1]).logits
            assert_same(found[i : i + 1], expected, ulps=64 if not quantized else 2**17)
        served.select("sql")
        assert_same(served.model(input_ids=ids).logits, alone["sql"](input_ids=ids).logits, ulps=64)


def test_what_is_selected_outlives_a_replacement_and_a_removal():
    layer, x = MultiLoRALinear(nn.Linear(IN, OUT)), torch.randn(2, IN)
    layer.add("a", old := factors(2))
    layer.select(["a", None])
    before = layer(x)
    layer.replace("a", factors(7))  # of another rank
    assert torch.equal(layer(x), before)
    layer.remove("a")
    assert torch.equal(layer(x), before)
    layer.add("a", new := factors(3))
    assert torch.equal(layer(x), before)
    layer.select(["a", None])
    torch.testing.assert_close(layer(x)[0], layer.base(x)[0] + x[0] @ new.delta().T)
    assert not torch.equal(old.delta(), new.delta())


def test_the_same_for_a_model_and_a_caller_who_changes_his_table():
    served = MultiLoRA(tiny_llama().eval(), ["q_proj"])
    name = next(iter(served.layers))
    adapter = {name: factors(2, sizes=(16, 16))}
    served.add("t", adapter)
    served.select("t")
    ids = torch.randint(40, (1, 5))
    with torch.no_grad():
        before = served.model(input_ids=ids).logits
        adapter[name] = factors(2, sizes=(16, 16))
        served.select("t")
        assert torch.equal(served.model(input_ids=ids).logits, before)
        served.replace("t", adapter)
        assert torch.equal(served.model(input_ids=ids).logits, before)
        served.select("t")
        assert not torch.equal(served.model(input_ids=ids).logits, before)
        served.remove("t")
        assert "t" not in served.adapters


def test_a_model_is_given_back_as_it_was():
    base = tiny_llama().eval()
    ids, names = torch.randint(40, (1, 5)), [name for name, _ in base.named_parameters()]
    before = base(input_ids=ids).logits
    served = MultiLoRA(base)
    assert set(base.state_dict()) != set(names)
    plain = served.unwrap()
    assert [name for name, _ in plain.named_parameters()] == names
    assert torch.equal(plain(input_ids=ids).logits, before)


def test_it_serves_and_holds_nothing_that_trains():
    layer = MultiLoRALinear(nn.Linear(IN, OUT))
    table(layer)
    assert not [p for p in layer.parameters() if p.requires_grad]
    assert set(layer.state_dict()) == {"base.weight", "base.bias"}
    x = torch.randn(3, IN, requires_grad=True)
    layer.select(["a", None, "b"])
    layer(x).sum().backward()  # a gradient goes through to the input, as through any layer
    W = layer.base.weight
    expected = [W + layer.adapters["a"].delta(), W, W + layer.adapters["b"].delta()]
    torch.testing.assert_close(x.grad, torch.stack([w.detach().sum(0) for w in expected]))


def test_moving_and_casting_leave_factors_in_their_dtype():
    layer = MultiLoRALinear(nn.Linear(IN, OUT))
    table(layer)
    layer.select("a")
    layer.bfloat16()
    assert layer.adapters["a"].A.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    x = torch.randn(2, IN, dtype=torch.bfloat16)
    assert torch.equal(layer(x), layer.base(x))  # a selection ends
    assert "3 adapters: a (r = 1), b (r = 5)" in repr(layer)


def test_rows_are_sorted_by_the_same_object_not_by_equal_ones():
    a, b = [1], [1]
    route = Route([a, None, b, a, None])
    assert route.groups == [[0, 3], [2]] and route.distinct[0] is a and route.distinct[1] is b and not route.whole
    assert [i.tolist() for i in route.indices(torch.device("cpu"))] == [[0, 3], [2]]
    assert Route([a, a]).whole and not Route([a, None]).whole and Route.same(a).whole
    assert Route([None, None]).groups == []


def layer_with_a():
    layer = MultiLoRALinear(nn.Linear(IN, OUT))
    layer.add("a", factors(2))
    return layer


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda layer: layer.select("b"), ValueError, "no adapter 'b'; there are: 'a'"),
        (lambda layer: layer.select(["a", ""]), ValueError, "no adapter ''"),
        (lambda layer: layer.remove("b"), ValueError, "no adapter 'b'"),
        (lambda layer: layer.replace("b", factors(2)), ValueError, "no adapter 'b'"),
        (lambda layer: layer.add("a", factors(2)), ValueError, "there is an adapter 'a': replace"),
        (
            lambda layer: layer.add("b", factors(2, sizes=(IN, OUT))),
            ValueError,
            r"sizes \(out, in\) = \(24, 20\); Linear\(24, 20\) has \(20, 24\)",
        ),
        (lambda layer: layer.add("b", torch.ones(2, 2)), TypeError, "factors must be Factors, got Tensor"),
        (lambda layer: layer.add("b", factors(2).to("meta")), ValueError, "the factors are on meta, the base on cpu"),
        (lambda layer: (layer.select(["a", None]), layer(torch.ones(3, IN))), ValueError, "the batch has 3 rows, the selection 2"),
        (lambda layer: (layer.select(["a", None]), layer(torch.ones(IN))), ValueError, "the batch has 1 rows, the selection 2"),
        (lambda layer: MultiLoRALinear(layer), ValueError, "wrapped already, in a MultiLoRALinear"),
        (lambda layer: MultiLoRALinear(LoRALinear(layer.base, 2, 2)), ValueError, "wrapped already, in a LoRALinear"),
        (lambda layer: MultiLoRALinear(nn.Embedding(3, 4)), TypeError, "base must be a linear layer"),
    ],
)
def test_what_does_not_fit_is_refused(work, error, message):
    layer, x = layer_with_a(), torch.randn(2, IN)
    layer.select("a")
    before = layer(x)
    with pytest.raises(error, match=message):
        work(layer)
    assert list(layer.adapters) == ["a"]
    layer.select("a")
    assert torch.equal(layer(x), before)


def test_a_failed_selection_leaves_the_last_one():
    layer, x = layer_with_a(), torch.randn(2, IN)
    layer.select("a")
    before = layer(x)
    with pytest.raises(ValueError, match="no adapter"):
        layer.select(["a", "b"])
    assert torch.equal(layer(x), before)


def test_models_and_adapters_that_do_not_fit_are_refused():
    model = tiny_llama()
    served = MultiLoRA(model, ["q_proj"])
    name = next(iter(served.layers))
    good = {name: factors(2, sizes=(16, 16))}
    served.add("a", good)
    with pytest.raises(ValueError, match=r"adapter 'b': layers .*lm_head.* are not served"):
        served.add("b", {"lm_head": factors(2)})
    with pytest.raises(ValueError, match=f"adapter 'b', {name}: the factors are for a layer of sizes"):
        served.add("b", {name: factors(2)})
    with pytest.raises(ValueError, match="adapter 'b' holds no layer"):
        served.add("b", {})
    with pytest.raises(ValueError, match="there is an adapter 'a'"):
        served.add("a", good)
    for work in (served.remove, served.select, lambda n: served.select([n]), lambda n: served.replace(n, good)):
        with pytest.raises(ValueError, match="no adapter 'b'; there are: 'a'"):
            work("b")
    with pytest.raises(ValueError, match="q_proj is adapted already"):
        MultiLoRA(model)
    injected = tiny_llama()
    inject_lora(injected, 2, 2, ["q_proj"])
    with pytest.raises(ValueError, match="q_proj is adapted already"):
        MultiLoRA(injected)
    with pytest.raises(TypeError, match="embed_tokens is a Embedding"):
        MultiLoRA(tiny_llama(), ["embed_tokens"])
