"""The Fisher's diagonal against brute force, closed forms, libraries and their formulas; EWC's penalty, and EWC for adapters."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from reference.ewc import ESTIMATORS, EWC, LoRAEWC, fisher_diagonal, orthogonality, uniform_fisher
from reference.lora import inject_lora, lora_layers, merge_lora
from reference.progressive import Adapter


def mlp(*sizes: int, seed: int = 0, dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())][:-1]
    return nn.Sequential(*layers).to(dtype)


class Words(nn.Module):
    """An embedding, attention over earlier positions, a norm, and a head that may be the embedding's own tensor."""

    def __init__(self, words: int = 7, width: int = 6, tied: bool = False):
        super().__init__()
        self.embed, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        h = h + F.scaled_dot_product_attention(h, self.mix(h), h, is_causal=True)
        return self.head(self.norm(h))


def words(tied: bool = False) -> nn.Module:
    torch.manual_seed(3)
    return Words(tied=tied).double()


def by_rows(model, batches, estimator, likelihood="softmax", draw=None):
    """As the definition reads: a backward pass for every row, and for exact for every position and answer."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total, count = {n: torch.zeros_like(p) for n, p in trained.items()}, 0

    def squares(loss):
        found = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
        return [0 if g is None else g.square() for g in found]

    for inputs, targets in batches:
        out = model(inputs)
        out = out if out.dim() > 2 else out[:, None]
        logs = out.log_softmax(-1)
        y = None if targets is None else targets.view(out.shape[:2]) if likelihood == "softmax" else targets.view_as(out)
        if estimator == "batch":
            mean = F.cross_entropy(out.flatten(0, 1), y.flatten()) if likelihood == "softmax" else ((out - y) ** 2).sum(-1).mean() / 2
            parts = [(out.shape[0] * out.shape[1], squares(mean))]
        elif estimator == "empirical" and likelihood == "softmax":
            parts = [(1, squares(sum(logs[n, t, y[n, t]] for t in range(out.shape[1]) if y[n, t] >= 0))) for n in range(len(out))]
        elif estimator == "empirical":
            parts = [(1, squares(((out[n] - y[n]) ** 2).sum() / 2)) for n in range(len(out))]
        elif likelihood == "gaussian":  # the score at f + ε is J·ε, and the mean of its square is the sum over J's rows
            parts = [(1, squares(out[n, t, c])) for n in range(len(out)) for t in range(out.shape[1]) for c in range(out.shape[2])]
        else:
            places = [(n, t, c) for n in range(len(out)) for t in range(out.shape[1]) for c in range(out.shape[2])]
            places = [(n, t, c) for n, t, c in places if y is None or y[n, t] >= 0]
            parts = [(logs[n, t, c].exp().detach(), squares(logs[n, t, c])) for n, t, c in places]
        for weight, found in parts:
            for name, square in zip(trained, found, strict=True):
                total[name] += weight * square
        count += int((y >= 0).sum()) if y is not None and likelihood == "softmax" else out.shape[0] * out.shape[1]
    return {name: value / count for name, value in total.items()}


def alike(one, other, rtol=1e-9):
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")


def classified(rows=11, features=5, classes=4, batches=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, features, generator=g, dtype=torch.float64), torch.randint(classes, (rows,), generator=g))
        for _ in range(batches)
    ]


def sentences(rows=3, length=5, batches=2):
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(7, (rows, length), generator=g) for _ in range(batches)]
    return [(each[:, :-1], each[:, 1:]) for each in ids]


@pytest.fixture(scope="module")
def lab():
    """The course's tiny model and its world, imported here: the tests of the GPU do without."""
    from course.lab import models
    from course.lab.world import World

    return models, World()


# the estimators


@pytest.mark.parametrize("estimator", ["exact", "empirical", "batch"])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_of_a_classifier_as_by_brute_force(estimator, chunk):
    model, batches = mlp(5, 6, 4), classified()
    alike(fisher_diagonal(model, batches, estimator, chunk=chunk), by_rows(model, batches, estimator))


@pytest.mark.parametrize("estimator", ["exact", "empirical", "batch"])
@pytest.mark.parametrize("tied", [False, True])
def test_of_a_language_model_as_by_brute_force(estimator, tied):
    """Positions, an embedding, a norm, attention; with a tied head the two gradients add up before the square."""
    model, batches = words(tied), sentences()
    alike(fisher_diagonal(model, batches, estimator, chunk=5), by_rows(model, batches, estimator))


@pytest.mark.parametrize("estimator", ["exact", "empirical", "batch"])
def test_of_a_gaussian_likelihood_as_by_brute_force(estimator):
    model = mlp(5, 6, 4)
    batches = [(x, torch.randn(len(x), 4, dtype=x.dtype)) for x, _ in classified()]
    alike(fisher_diagonal(model, batches, estimator, likelihood="gaussian"), by_rows(model, batches, estimator, "gaussian"))


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_what_is_ignored_does_not_count(estimator):
    model, ((x, y), *_) = words(), sentences()
    y = y.clone()
    y[0, 2:] = -100
    alike(fisher_diagonal(model, [(x, y)], estimator), by_rows(model, [(x, y)], estimator))


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian"])
def test_sampled_answers_agree_with_exact_in_the_mean(likelihood):
    model, batches = mlp(5, 6, 3), [(x, None) for x, _ in classified(rows=400, classes=3)]
    generator = torch.Generator().manual_seed(0)
    draws = [fisher_diagonal(model, batches, "sampled", likelihood=likelihood, generator=generator) for _ in range(60)]
    exact = fisher_diagonal(model, batches, "exact", likelihood=likelihood)
    for name, value in exact.items():
        mean = torch.stack([d[name] for d in draws]).mean(0)
        assert ((mean - value).norm() / value.norm()) < 0.03, name


def test_sampled_is_drawn_by_the_generator_alone():
    def drawn(seed):
        return fisher_diagonal(words(), sentences(), "sampled", generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(5)
    first = drawn(1)
    torch.manual_seed(6)
    alike(first, drawn(1))
    assert any((first[n] != other).any() for n, other in drawn(2).items())


def test_exact_is_the_closed_form_of_softmax_regression():
    """F of weight c, i is the mean of p_c (1 − p_c) x_i²."""
    model, batches = mlp(5, 4), classified()
    x = torch.cat([x for x, _ in batches])
    p = model(x).softmax(-1)
    found = fisher_diagonal(model, batches)
    torch.testing.assert_close(found["0.weight"], torch.einsum("nc,ni->ci", p * (1 - p), x**2) / len(x))
    torch.testing.assert_close(found["0.bias"], (p * (1 - p)).mean(0))


def test_exact_is_the_closed_form_of_the_linear_gaussian():
    """F of weight o, i is the mean of x_i², whatever o is and whatever the weights are."""
    model, batches = mlp(5, 3), classified()
    x = torch.cat([x for x, _ in batches])
    found = fisher_diagonal(model, [(x, None)], likelihood="gaussian")
    torch.testing.assert_close(found["0.weight"], (x**2).mean(0).expand(3, 5))


def test_exact_is_the_hessian_at_a_converged_fit():
    """Of softmax regression the Fisher is the Hessian of the mean loss anywhere: its diagonal, by autograd."""
    model, ((x, y), *_) = mlp(5, 4), classified()
    weight = model[0].weight.detach()
    hessian = torch.autograd.functional.hessian(lambda w: F.cross_entropy(F.linear(x, w, model[0].bias), y), weight)
    torch.testing.assert_close(fisher_diagonal(model, [(x, y)])["0.weight"], hessian.flatten(0, 1).flatten(1).diagonal().view(4, 5))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), features=st.integers(1, 5), classes=st.integers(2, 5), chunk=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_sizes(rows, features, classes, chunk, seed):
    model, batches = mlp(features, 3, classes, seed=seed), classified(rows, features, classes, seed=seed)
    for estimator in ("exact", "empirical", "batch"):
        found = fisher_diagonal(model, batches, estimator, chunk=chunk)
        assert all((value >= 0).all() for value in found.values())
        alike(found, by_rows(model, batches, estimator))


def test_batches_of_any_size_give_the_same_but_for_batch():
    model, ((x, y), *_) = mlp(5, 6, 4), classified(rows=12)
    for estimator in ("exact", "empirical"):
        alike(fisher_diagonal(model, [(x, y)], estimator), fisher_diagonal(model, zip(x.split(5), y.split(5), strict=True), estimator))
    alike(fisher_diagonal(model, zip(x.split(1), y.split(1), strict=True), "batch"), fisher_diagonal(model, [(x, y)], "empirical"))


def test_batch_shrinks_like_one_over_the_batch():
    """Where labels are drawn from the model, the square of a batch's mean is F / B in the mean."""
    model = mlp(5, 6, 4)
    x = torch.randn(4096, 5, dtype=torch.float64)
    y = torch.multinomial(model(x).softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    exact = sum(v.sum() for v in fisher_diagonal(model, [(x, None)]).values())
    for size in (4, 16, 64):
        batch = fisher_diagonal(model, zip(x.split(size), y.split(size), strict=True), "batch")
        assert size * sum(v.sum() for v in batch.values()) / exact == pytest.approx(1, abs=0.25)


def test_the_tiny_model_with_adapters_and_without(lab):
    tiny, _ = lab[0].load("tiny", where=torch.device("cpu"))
    ids = lab[1].sample("general", 2, 5, 1)
    batches = [(ids[:, :-1], ids[:, 1:])]
    alike(fisher_diagonal(tiny, batches, "empirical"), by_rows_of_tiny(tiny, batches), 2e-3)
    inject_lora(tiny, 2, 4, ["q_proj", "down_proj"])
    found = fisher_diagonal(tiny, batches, "empirical")
    assert {name.rsplit(".", 1)[1] for name in found} == {"lora_A", "lora_B"}
    assert all((value == 0).all() == name.endswith("lora_A") for name, value in found.items())  # B = 0: A has no gradient
    for _, layer in lora_layers(tiny):
        nn.init.normal_(layer.lora_B, std=0.1)
    alike(fisher_diagonal(tiny, batches, "empirical"), by_rows_of_tiny(tiny, batches), 2e-3)


def by_rows_of_tiny(model, batches):
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total, count = {n: torch.zeros_like(p) for n, p in trained.items()}, 0
    for inputs, targets in batches:
        for x, y in zip(inputs, targets, strict=True):
            loss = F.cross_entropy(model(x[None]).logits[0], y, reduction="sum")
            for name, g in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
                total[name] += g.square()
            count += len(y)
    return {name: value / count for name, value in total.items()}


def test_mode_gradients_and_parameters_are_left_as_they_were():
    model, batches = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 4)).double(), classified()
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    before = [(p.clone(), p.grad.clone()) for p in model.parameters()]
    first = fisher_diagonal(model, batches)
    alike(first, fisher_diagonal(model, batches))  # without dropout
    assert model.training and all(
        torch.equal(p, a) and torch.equal(p.grad, b) for p, (a, b) in zip(model.parameters(), before, strict=True)
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_a_parameter_that_is_not_used_has_none():
    model = mlp(5, 6, 4)
    model.extra = nn.Linear(2, 2).double()
    model.forward = lambda x: model[2](model[1](model[0](x)))
    found = fisher_diagonal(model, classified())
    assert (found["extra.weight"] == 0).all() and found["0.weight"].any()


# beside the libraries: pip install --no-deps backpack-for-pytorch nngeometry unfoldNd einops (they ask for torchvision and do without)


def test_as_backpack_gives_it():
    """DiagGGNExact of a mean cross-entropy is the exact Fisher per prediction; SumGradSquared · N the empirical one."""
    backpack = pytest.importorskip("backpack")
    from backpack import extensions

    model, ((x, y), *_) = mlp(5, 6, 4), classified()
    theirs, loss = backpack.extend(copy.deepcopy(model)), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.DiagGGNExact(), extensions.SumGradSquared()):
        loss(theirs(x), y).backward()
    exact = {name: p.diag_ggn_exact for name, p in theirs.named_parameters()}
    alike(fisher_diagonal(model, [(x, y)]), exact)
    empirical = {name: p.sum_grad_squared * len(x) for name, p in theirs.named_parameters()}
    alike(fisher_diagonal(model, [(x, y)], "empirical"), empirical)


def test_as_nngeometry_gives_it():
    metrics = pytest.importorskip("nngeometry.metrics")
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    model, ((x, y), *_) = mlp(5, 6, 4, dtype=torch.float32), classified()
    loader = DataLoader(TensorDataset(x.float(), y), batch_size=4)
    found = metrics.FIM(model=model, loader=loader, representation=PMatDiag, variant="classif_logits").get_diag()
    ours = fisher_diagonal(model, [(x.float(), y)])
    torch.testing.assert_close(torch.cat([ours[name].flatten() for name, _ in model.named_parameters()]), found, rtol=1e-4, atol=1e-7)


def avalanche(model, batches):
    """avalanche 0.6.0, plugins/ewc.py: importances are the mean over batches of the squared gradient of the batch's mean loss."""
    importances = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            importances[name] += p.grad.clone().pow(2)
    return {name: value / len(batches) for name, value in importances.items()}


def mammoth(model, x, y, batch_size):
    """mammoth, models/ewc_on.py: row by row p(y|x) · g², over len(loader) · batch_size, where the last batch may be short."""
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for row, label in zip(x, y, strict=True):
        model.zero_grad()
        loss = -F.nll_loss(model(row[None]).log_softmax(1), label[None], reduction="none")
        loss.mean().backward()
        for name, p in model.named_parameters():
            total[name] += loss.mean().exp().detach() * p.grad**2
    return {name: value / (math.ceil(len(x) / batch_size) * batch_size) for name, value in total.items()}


def test_avalanches_penalty_is_ours_with_batch_and_twice_its_lambda():
    """Theirs is λ Σ F (θ − θ*)², without a half; with rows as batches of one its F is the empirical one."""
    model, batches = mlp(5, 6, 4), classified(rows=8)
    theirs = avalanche(model, batches)
    alike(fisher_diagonal(model, batches, "batch"), theirs)
    ones = [(x, y) for xs, ys in batches for x, y in zip(xs.split(1), ys.split(1), strict=True)]
    alike(fisher_diagonal(model, batches, "empirical"), avalanche(model, ones))
    ours, start = (
        EWC(model, fisher_diagonal(model, batches, "batch"), lam=2 * 0.7),
        {n: p.detach().clone() for n, p in model.named_parameters()},
    )
    moved(model)
    penalty = 0.7 * sum((theirs[n] * (p - start[n]) ** 2).sum() for n, p in model.named_parameters())
    torch.testing.assert_close(ours.penalty(), penalty)


def test_mammoths_fisher_is_the_exact_ones_share_of_the_labels():
    """Weighing by p(y|x) and summing over every label gives the exact F; theirs keeps the term of the true label alone."""
    model, ((x, y), *_) = mlp(5, 6, 4), classified(rows=10)
    summed = [mammoth(model, x, torch.full_like(y, label), 10) for label in range(4)]
    alike({n: sum(each[n] for each in summed) for n in summed[0]}, fisher_diagonal(model, [(x, None)]))
    short = mammoth(model, x, y, 4)  # 10 rows, 3 batches of 4: divided by 12
    alike({n: F * 12 / 10 for n, F in short.items()}, mammoth(model, x, y, 10))


# the penalty


def moved(model, by=0.3):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p))


def test_the_penalty_is_its_formula_and_so_is_its_gradient():
    model, batches = mlp(5, 6, 4), classified()
    fisher = fisher_diagonal(model, batches)
    ewc, start = EWC(model, fisher, 3.0), {n: p.detach().clone() for n, p in model.named_parameters()}
    assert ewc.penalty() == 0
    moved(model)
    wanted = 1.5 * sum((fisher[n] * (p - start[n]) ** 2).sum() for n, p in model.named_parameters())
    torch.testing.assert_close(ewc.penalty(), wanted)
    ewc.penalty().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 3.0 * fisher[n] * (p - start[n]).detach())


def test_at_lambda_one_the_penalty_is_the_old_losss_rise_where_the_matrix_is_diagonal():
    """One weight moved a little, at a converged fit: λ/2 F δ² is what the old loss rises by."""
    torch.manual_seed(0)
    model, x = mlp(3, 3), torch.randn(500, 3, dtype=torch.float64)
    y = torch.multinomial(model(x).softmax(-1), 1)[:, 0]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    before = F.cross_entropy(model(x), y).item()
    ewc = EWC(model, fisher_diagonal(model, [(x, y)]), 1.0)
    with torch.no_grad():
        model[0].weight[1, 2] += 0.05
    assert F.cross_entropy(model(x), y).item() - before == pytest.approx(ewc.penalty().item(), rel=0.05)


def test_it_keeps_copies():
    model = mlp(5, 4)
    fisher = uniform_fisher(model)
    ewc = EWC(model, fisher, 1.0)
    fisher["0.weight"].zero_()
    moved(model)
    plain = sum(((p - ewc.start[n]) ** 2).sum() for n, p in model.named_parameters())
    torch.testing.assert_close(ewc.penalty(), plain / 2)  # ones: L2 to the start


@settings(max_examples=20, deadline=None)
@given(gamma=st.floats(0, 1), tasks=st.integers(1, 4), seed=st.integers(0, 99))
def test_online_sums_with_decay_and_moves_its_centre(gamma, tasks, seed):
    model = mlp(3, 2, seed=seed)
    fishers = [{n: torch.rand_like(p) for n, p in model.named_parameters()} for _ in range(tasks)]
    ewc = EWC(model, fishers[0], 2.0)
    for fisher in fishers[1:]:
        moved(model)
        ewc.consolidate(fisher, gamma)
        assert ewc.penalty() == 0  # centred where the model is now
    for name in fishers[0]:
        torch.testing.assert_close(ewc.fisher[name], sum(gamma ** (tasks - 1 - i) * f[name] for i, f in enumerate(fishers)))


def test_several_tasks_are_several_penalties():
    """Two parabolas of one curvature each, centred apart: together one of twice the curvature, centred between, and a constant."""
    model = mlp(2, 2)
    first = EWC(model, uniform_fisher(model), 1.0)
    moved(model)
    second = EWC(model, uniform_fisher(model), 1.0)
    moved(model)
    between = {n: (first.start[n] + second.start[n]) / 2 for n in first.start}
    around = sum(((p - between[n]) ** 2).sum() for n, p in model.named_parameters())
    constant = sum(((first.start[n] - second.start[n]) ** 2).sum() for n in between) / 4
    torch.testing.assert_close(first.penalty() + second.penalty(), around + constant)


# adapters


def adapted(r=2, alpha=6):
    base = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    return base, lambda: inject_lora(base, r, alpha, ["0", "2"])


def test_ewc_on_the_update_is_ewc_on_the_merged_weights():
    torch.manual_seed(0)
    base, inject = adapted()
    batches = classified()
    fisher = fisher_diagonal(base, batches)
    plain = copy.deepcopy(base)
    full = EWC(plain, fisher, 4.0)
    inject()
    ewc = LoRAEWC(base, fisher, 4.0)
    assert ewc.penalty() == 0
    for _, layer in lora_layers(base):
        nn.init.normal_(layer.lora_B)
    ours = ewc.penalty()
    ours.backward()
    assert all(layer.lora_A.grad.any() and layer.lora_B.grad.any() for _, layer in lora_layers(base))
    plain.load_state_dict(merge_lora(base).state_dict())
    torch.testing.assert_close(ours.detach(), full.penalty().detach())


def test_ewc_on_the_factors_does_not_see_a():
    """Before training the Fisher of A is zero: A may go anywhere, and B's penalty knows only the first A."""
    torch.manual_seed(0)
    base, inject = adapted()
    inject()
    batches = classified()
    fisher = fisher_diagonal(base, batches)
    assert not fisher["0.lora_A"].any() and fisher["0.lora_B"].any()
    ewc = EWC(base, fisher, 1.0)
    with torch.no_grad():
        base[0].lora_A.mul_(100)
    assert ewc.penalty() == 0


def test_on_b_alone_the_two_agree_to_first_order_in_the_rank():
    """With r = 1 and one input per layer, F_B = (s·A)² F_W: the penalties are one."""
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(1, 3)).double()
    batches = [(torch.randn(20, 1, dtype=torch.float64), torch.randint(3, (20,)))]
    fisher = fisher_diagonal(base, batches)
    inject_lora(base, 1, 5.0, ["0"])
    factors = EWC(base, fisher_diagonal(base, batches), 2.0)
    update = LoRAEWC(base, fisher, 2.0)
    nn.init.normal_(base[0].lora_B)
    torch.testing.assert_close(factors.penalty(), update.penalty())


def test_orthogonality_is_zero_for_orthogonal_adapters_only():
    a = torch.eye(4)[:2]
    assert orthogonality([a], torch.eye(4)[2:]) == 0
    new = torch.tensor([[0.5, -2.0, 1.0, 0.0]], requires_grad=True)
    assert orthogonality([a, a], new) == 5.0
    orthogonality([a], new).backward()
    assert new.grad.tolist() == [[1, -1, 0, 0]]


# bad input


def test_nothing_to_train():
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        fisher_diagonal(mlp(5, 4).requires_grad_(False), classified())
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        EWC(mlp(5, 4).requires_grad_(False), {}, 1.0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_loader(estimator):
    with pytest.raises(ValueError, match="batches is empty"):
        fisher_diagonal(mlp(5, 4), [], estimator)
    with pytest.raises(ValueError, match="batches is empty"):
        fisher_diagonal(mlp(5, 4), [(torch.zeros(2, 5).double(), torch.tensor([-100, -100]))], estimator)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"estimator": "true"}, "estimator must be one of exact, sampled, empirical, batch, got 'true'"),
        ({"likelihood": "poisson"}, "likelihood must be one of softmax, gaussian"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ],
)
def test_settings_that_do_not_exist(settings, words):
    with pytest.raises(ValueError, match=words):
        fisher_diagonal(mlp(5, 4), classified(), **settings)


def test_targets_that_are_missing_or_do_not_fit():
    x, y = classified()[0]
    with pytest.raises(ValueError, match="'empirical' needs targets"):
        fisher_diagonal(mlp(5, 4), [(x, None)], "empirical")
    with pytest.raises(ValueError, match="don't fit"):
        fisher_diagonal(mlp(5, 4), [(x, y[:-1])], "empirical")


def test_outputs_that_are_not_finite():
    with pytest.raises(ValueError, match="NaN or infinity"):
        fisher_diagonal(mlp(5, 4), [(torch.full((2, 5), math.nan).double(), None)])


def test_rows_that_can_not_be_told_apart():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 4)

        def forward(self, x):
            return self.inner(x.flatten(0, 1)).view(*x.shape[:2], 4)

    model, x = Flat(), torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match="sees 10 rows where the batch has 5"):
        fisher_diagonal(model, [(x, None)])


class Outside(nn.Module):
    """A model that reads a layer's weight beside the layer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x):
        return self.inner(x) + F.linear(x, self.inner.weight)


def test_a_weight_that_is_used_from_outside():
    with pytest.raises(ValueError, match=r"'inner\.weight' comes from outside"):
        fisher_diagonal(Outside(), [(torch.randn(5, 3), None)])
    with pytest.raises(ValueError, match="must map tensors to one"):
        fisher_diagonal(nn.LSTM(3, 4), [(torch.randn(5, 2, 3), None)], forward=lambda m, x: m(x)[0])


@pytest.mark.parametrize("lam, kind", [(-1.0, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError)])
def test_a_lambda_that_is_none(lam, kind):
    model = mlp(5, 4)
    with pytest.raises(kind, match="lam must be"):
        EWC(model, uniform_fisher(model), lam)
    with pytest.raises(kind, match="lam must be"):
        LoRAEWC(model, uniform_fisher(model), lam)


def test_a_fisher_that_does_not_fit():
    model = mlp(5, 4)
    good = uniform_fisher(model)
    for bad, words in (
        (good | {"1.weight": good["0.weight"]}, "'1.weight', which is no trained parameter"),
        ({"0.weight": good["0.weight"]}, "lacks '0.bias'"),
        (good | {"0.bias": torch.ones(5)}, r"fisher\['0.bias'\] has the shape \(5,\), its parameter \(4,\)"),
        (good | {"0.bias": -good["0.bias"]}, "nowhere negative"),
        (good | {"0.bias": good["0.bias"] * math.nan}, "must be finite"),
    ):
        with pytest.raises(ValueError, match=words):
            EWC(model, bad, 1.0)
    ewc = EWC(model, good, 1.0)
    before = copy.deepcopy((ewc.fisher, ewc.start))
    moved(model)
    for arguments in (({"0.weight": good["0.weight"]},), (good, 1.5), (good, -0.1)):
        with pytest.raises(ValueError):
            ewc.consolidate(*arguments)
    alike(ewc.fisher, before[0])
    alike(ewc.start, before[1])


def test_adapters_that_do_not_fit():
    base, inject = adapted()
    fisher = fisher_diagonal(base, classified())
    with pytest.raises(ValueError, match="holds no LoRA layer"):
        LoRAEWC(base, fisher, 1.0)
    inject()
    with pytest.raises(ValueError, match=r"lacks '2\.weight'"):
        LoRAEWC(base, {"0.weight": fisher["0.weight"]}, 1.0)
    base[0].merge()
    with pytest.raises(ValueError, match="0 is merged"):
        LoRAEWC(base, fisher, 1.0)
    with pytest.raises(ValueError, match=r"old \(2, 4\) and new \(2, 3\)"):
        orthogonality([torch.ones(2, 4)], torch.ones(2, 3))


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_on_a_gpu_as_on_a_cpu(estimator):
    model, batches = words().float(), sentences()
    found = [
        fisher_diagonal(
            model.to(where), [(x.to(where), y.to(where)) for x, y in batches], estimator, generator=torch.Generator().manual_seed(0)
        )
        for where in ("cpu", "cuda")
    ]
    assert all(value.is_cuda for value in found[1].values())
    alike(found[0], {name: value.cpu() for name, value in found[1].items()}, 1e-3)


@pytest.mark.gpu
def test_the_tiny_model_on_a_gpu(lab):
    tiny, _ = lab[0].load("tiny", where=torch.device("cuda"))
    ids = lab[1].sample("general", 2, 4, 1).cuda()
    found = fisher_diagonal(tiny, [(ids[:, :-1], ids[:, 1:])], chunk=256)
    alike(found, by_rows_exact_of(tiny, ids), 5e-3)
    ewc = EWC(tiny, found, 1.0)
    moved(tiny, 0.01)
    assert ewc.penalty().is_cuda and ewc.penalty() > 0


def by_rows_exact_of(model, ids):
    trained = dict(model.named_parameters())
    total, count = {n: torch.zeros_like(p) for n, p in trained.items()}, 0
    for row in ids:
        logs = model(row[None, :-1]).logits[0].log_softmax(-1)
        for t in range(len(logs)):
            count += 1
            for c in range(logs.shape[1]):
                gradients = torch.autograd.grad(logs[t, c], list(trained.values()), retain_graph=True)
                for name, g in zip(trained, gradients, strict=True):
                    total[name] += logs[t, c].exp().detach() * g.square()
    return {name: value / count for name, value in total.items()}


def test_lateral_adapters_are_told_apart_too():
    """A module of one's own, with a parameter that is a number."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(Adapter(5, 3, 4)).double(), classified()
    alike(fisher_diagonal(model, batches), by_rows(model, batches, "exact"))


def test_the_check_can_be_left_out_and_changes_nothing_else():
    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    for estimator in ("exact", "empirical"):
        checked = fisher_diagonal(model, [(x, y)], estimator)
        for name, value in fisher_diagonal(model, [(x, y)], estimator, check=False).items():
            assert torch.equal(value, checked[name])

    outside, batches = Outside(), [(x, y)]
    wrong = fisher_diagonal(outside, batches, check=False)["inner.weight"]  # as the docstring says: nobody looked
    torch.testing.assert_close(4 * wrong, by_rows(outside, batches, "exact")["inner.weight"])  # twice the gradient, by two ways
