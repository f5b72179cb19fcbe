"""The lab of unit 09: equal learning, five tasks of digits, the study's losses against the reference, and dry runs of its benchmarks."""

import itertools
import sys

import pytest
import torch

from benchmarks import fisher, forgetting, gemma_forgetting, permuted_digits
from course.claims import forgetting as claims
from course.lab import models, permuted, recorded
from course.lab.forgetting import at_equal_learning, mean_of
from course.lab.stacked import Stack, next_token_losses
from course.lab.world import World
from reference.ewc import EWC, LoRAEWC, fisher_diagonal, uniform_fisher
from reference.lora import inject_lora, lora_layers
from reference.rehearsal import dark_experience, distillation, project_gradient


def test_the_old_loss_is_read_where_the_level_is_first_reached():
    new, old = [3.0, 2.0, 1.0, 2.5, 0.5], [0.0, 1.0, 3.0, 9.0, 9.0]
    assert at_equal_learning(new, old, 2.0) == 1.0
    assert at_equal_learning(new, old, 1.5) == 2.0
    assert at_equal_learning(new, old, 5.0) == 0.0 and at_equal_learning(new, old, 0.4) is None
    for bad in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="one length and not empty"):
            at_equal_learning(*bad, 1.0)


def test_an_interval_is_students():
    found = mean_of([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3) and found.high - found.mean == pytest.approx(4.302653 * (7 / 3) ** 0.5 / 3**0.5)
    with pytest.raises(ValueError, match="at least two"):
        mean_of([1.0])


# digits


def test_a_task_is_a_permutation_of_pixels():
    x0, y0, *_ = permuted.task(0)
    x1, y1, held_x, _ = permuted.task(1)
    assert torch.equal(y0, y1) and torch.equal(x0.sort(1).values, x1.sort(1).values) and not torch.equal(x0, x1)
    assert len(held_x) == permuted.HELD_OUT and torch.equal(permuted.task(1)[0], x1)


@pytest.mark.parametrize("method", permuted.SETTINGS)
def test_every_method_runs(method):
    table = permuted.run(method, seed=0, tasks=2, epochs=1)
    assert len(table) == 2 and all(0 <= value <= 1 for row in table for value in row)
    assert table == permuted.run(method, seed=0, tasks=2, epochs=1)


def test_progressive_forgets_nothing_and_plain_does():
    kept, lost = (permuted.run(method, seed=1, tasks=3, epochs=4) for method in ("progressive", "plain"))
    assert kept[0][0] == kept[1][0] == kept[2][0]
    assert lost[2][0] < lost[0][0] - 0.2
    with pytest.raises(ValueError, match="method must be one of"):
        permuted.run("magic")


def test_what_the_lesson_says_of_the_digits():
    """Each named method keeps more than the one before it, and three steps are beyond both intervals."""
    runs = {row["method"]: row for row in recorded.load("permuted_digits", "cpu")["result"]["runs"] if row["chosen"]}
    means = [mean_of([sum(t[-1]) / 5 for t in runs[m]["tables"]]) for m in ("plain", "L2 to the start", "EWC", "A-GEM", "replay", "DER++")]
    assert all(low.mean < high.mean for low, high in itertools.pairwise(means))
    assert means[2].low > means[0].high and means[4].low > means[2].high and means[5].low > means[4].high


def test_what_the_lesson_says_of_the_frontier():
    """At half a nat left to learn, with intervals that do not touch; and what its claims rest on."""
    assert claims.forgets_less("distillation, old text", "DER++", "replay", "L2 to the start", "EWC", "full fine-tuning", "LoRA")
    for control in ("full, embeddings and head fixed", "LoRA, embeddings and head too"):
        assert claims.forgets_less(control, "LoRA") and claims.forgotten(control) < 0.3 * claims.forgotten("LoRA")
    assert claims.rate_matters() > 10 and claims.larger_lambdas_do_not_help()
    assert claims.forgotten("full fine-tuning, scaled back") > 0.8 * claims.forgotten("full fine-tuning")  # nothing gained at the best rate
    high = [claims.of_setting(name, 0.0) for name in ("full fine-tuning", "full fine-tuning, scaled back")]
    assert high[1] < 0.5 * high[0]
    alone, factors, update = claims.of_setting("LoRA", 16), *(claims.of_setting(f"LoRA + EWC on {w}", 1000.0) for w in ("A, B", "ΔW"))
    assert update < factors < alone and alone - factors < 0.5 * (alone - update)
    assert claims.forgotten("progressive column", end="high") < 1e-6
    assert all(claims.facts_percent(m) > 99 for m in ("replay", "distillation, old text", "DER++"))


def test_what_the_lesson_says_of_gemma():
    """Which steps of the order no seed breaks, which ones overlap, and that what is compared has learned as much."""
    high, low, ewc = ("full fine-tuning", 1e-4), ("full fine-tuning", 3e-5), ("EWC", 1e-4)
    replay, both, lora, lora_low = ("replay 10 %", 1e-4), ("LoRA r=16 + replay 10 %", 1e-3), ("LoRA r=16", 1e-3), ("LoRA r=16", 3e-4)
    assert all(len(claims.gemma_runs(*plan)) == 3 for plan in (high, low, ewc, replay, both, lora, lora_low))
    assert all(claims.gemma_apart(*pair) for pair in itertools.pairwise((both, low, replay, ewc, high)))
    for plan in (lora, lora_low):  # against the high rate nothing is decided, against the low one everything
        assert not claims.gemma_apart(plan, high) and not claims.gemma_apart(high, plan) and claims.gemma_apart(low, plan)
    for other in (replay, low):
        assert not claims.gemma_apart(ewc, other, -1) and not claims.gemma_apart(other, ewc, -1)
    assert claims.gemma_forgotten(*ewc, 2, "least") > claims.gemma_forgotten(*ewc, -1, "most")  # it comes back
    ends = [claims.gemma_left(*plan) for plan in (ewc, replay, low)]
    assert max(ends) < 1.1 * min(ends)
    assert min(claims.gemma_forgotten(*plan, -1, "least") for plan in (ewc, replay, low)) >= 0.53
    assert max(claims.gemma_forgotten(*plan, -1, "most") for plan in (ewc, replay, low)) < 0.725
    assert claims.gemma_scaled(1e-3, 0.5, "new") == pytest.approx(claims.gemma_level(), abs=0.01)
    assert claims.gemma_scaled(1e-3, 0.5) < 0.25 * claims.gemma_lost_first(*lora) and claims.gemma_base_is_back()


def test_what_the_lesson_says_of_a_far_domain():
    left = [claims.foreign_left(f"LoRA r={r}") for r in (1, 4, 16, 64)]
    assert left == sorted(left, reverse=True)
    assert claims.foreign_left("full fine-tuning") < claims.foreign_left("LoRA r=16 + embeddings and head") < 0.5 * left[-1]
    trained = {row["method"]: row["trained"] for row in recorded.load("forgetting", "h200")["result"]["foreign"]}
    assert trained["LoRA r=16 + embeddings and head"] < trained["LoRA r=64"]


# the study's own losses are the reference's


@pytest.fixture(scope="module")
def study():
    return forgetting.Study(forgetting.SMALL, torch.device("cpu"))


@pytest.fixture(scope="module")
def ids():
    return torch.stack([World().sample("clinic", 2, 12, seed) for seed in range(2)])


def moved(stack: Stack) -> Stack:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in stack.trained.values():
            p.add_(0.02 * torch.randn(p.shape, generator=g))
    return stack


def alone(stack: Stack, copy_: int):
    """One copy as a model of the library."""
    model, _ = models.load("tiny", where=torch.device("cpu"))
    model.load_state_dict({name: W[min(copy_, len(W) - 1)].detach() for name, W in stack.weights.items()})
    return model


def step_of(study, stack, ids, values, old=None):
    logits = stack(ids)
    return forgetting.Step(stack, study, torch.tensor(values), ids, logits, next_token_losses(logits, ids), old)


@pytest.mark.parametrize("kind", ["sampled", None])
def test_anchors_are_ewc(study, ids, kind):
    stack, lam = moved(Stack(study.model, 2)), [3.0, 50.0]
    step = step_of(study, stack, ids, lam)
    found = forgetting.anchored(kind)(step) - step.loss
    for i in range(2):
        base, _ = models.load("tiny", where=torch.device("cpu"))
        penalty = EWC(base, study.fishers[kind] if kind else uniform_fisher(base), lam[i])
        base.load_state_dict(alone(stack, i).state_dict())
        assert found[i].item() == pytest.approx(penalty.penalty().item(), rel=1e-3, abs=2e-6)


def test_anchors_of_adapters_are_the_references(study, ids):
    stack, lam = Stack(study.model, 2, ranks=[16, 16], seeds=[0, 1]), [3.0, 50.0]
    stack.factor_fisher = study.factor_fisher(stack)
    starts = {name: p.detach().clone() for name, p in stack.trained.items()}
    moved(stack)
    step = step_of(study, stack, ids, lam)
    updates, factors = forgetting.anchored_update(step) - step.loss, forgetting.anchored_factors(step) - step.loss
    for i in range(2):
        model, _ = models.load("tiny", where=torch.device("cpu"))
        inject_lora(model, 16, 32)
        layers = dict(lora_layers(model))
        for name, layer in layers.items():
            layer.lora_A.data = starts[f"{name}.lora_A"][i].clone()
        of_update = LoRAEWC(model, study.fishers["sampled"], lam[i])
        rows = study.world.sample("general", max(2, study.sizes.fisher_rows // 8), forgetting.LENGTH, 600_000)
        fisher_AB = fisher_diagonal(model, [(rows[:, :-1], rows[:, 1:])], "sampled", generator=torch.Generator().manual_seed(0))
        of_factors = EWC(model, fisher_AB, lam[i])
        for name, layer in layers.items():
            layer.lora_A.data = stack.trained[f"{name}.lora_A"][i].detach().clone()
            layer.lora_B.data = stack.trained[f"{name}.lora_B"][i].detach().clone()
        assert updates[i].item() == pytest.approx(of_update.penalty().item(), rel=1e-3, abs=2e-6)
        assert factors[i].item() == pytest.approx(of_factors.penalty().item(), rel=1e-3, abs=2e-6)


def test_distilling_and_remembering_are_the_references(study, ids):
    stack = moved(Stack(study.model, 2))
    old = torch.stack([World().sample("general", 4, 12, seed) for seed in range(2)])
    step = step_of(study, stack, ids, [0.5, 2.0], old)
    on_old, on_new, dark = (loss(step) - step.loss for loss in (forgetting.distilled("old"), forgetting.distilled("new"), forgetting.dark))
    for i, weight in enumerate((0.5, 2.0)):
        model = alone(stack, i)
        with torch.no_grad():
            kl = [distillation(model(rows).logits[:, :-1], study.model(rows).logits[:, :-1], 2.0) for rows in (old[i], ids[i])]
            assert on_old[i].item() == pytest.approx(weight * kl[0].item(), rel=1e-3, abs=2e-6)
            assert on_new[i].item() == pytest.approx(weight * kl[1].item(), rel=1e-3, abs=2e-6)
            logits, stored, again = model(old[i, :2]).logits, study.model(old[i, :2]).logits, model(old[i, 2:]).logits
            wanted = dark_experience(logits, stored, again[:, :-1], old[i, 2:, 1:], 0.1 * weight, weight)
        assert dark[i].item() == pytest.approx(wanted.item(), rel=1e-3, abs=2e-6)


def test_projecting_copy_by_copy_is_the_references():
    g = torch.Generator().manual_seed(1)
    new, old = (tuple(torch.randn(6, *shape, generator=g) for shape in ((3, 2), (4,))) for _ in range(2))
    found = forgetting.projected(new, old)
    for i in range(6):
        for one, wanted in zip(found, project_gradient([t[i] for t in new], [t[i] for t in old]), strict=True):
            torch.testing.assert_close(one[i], wanted)


def test_the_choice_is_by_the_first_seed_and_the_report_by_the_others():
    Run = forgetting.Run
    path = {"new": [2.0, 0.1], "facts": [1.0, 1.0]}
    paths = {
        Run(1.0, 0.1, 0): path | {"old": [0.0, 5.0]},
        Run(2.0, 0.1, 0): path | {"old": [0.0, 1.0]},  # forgets least with seed 0
        Run(1.0, 0.1, 1): path | {"old": [0.0, 0.5]},  # and not with the others
        Run(2.0, 0.1, 1): path | {"old": [0.0, 9.0]},
    }
    rows = list(forgetting.at_levels(paths, 0.0))
    assert rows and all((row["value"], len(row["forgotten"])) == (2.0, 1) for row in rows)


# dry runs


@pytest.mark.parametrize("module", [fisher, permuted_digits])
def test_a_dry_run_is_saved(module, monkeypatch, tmp_path):
    name = module.__name__.rpartition(".")[2]
    monkeypatch.setattr(sys, "argv", [name, "--smoke", "--out", str(tmp_path)])
    module.main()
    found, known = (recorded.load(name, folder=folder)["result"] for folder in (tmp_path, recorded.FOLDER))
    assert set(found) == set(known)


def test_a_dry_run_of_gemma_is_saved(monkeypatch, tmp_path):
    """Windows of the real run, a tiny model: the same calls with the same arguments."""
    monkeypatch.setattr(sys, "argv", ["gemma_forgetting", "--smoke", "--out", str(tmp_path)])
    gemma_forgetting.main()
    found = recorded.load("gemma_forgetting", folder=tmp_path)["result"]
    assert {run["method"] for run in found["runs"]} == {plan.method for plan in gemma_forgetting.plans()}
    scaled = [run["scaled"] for run in found["runs"] if "scaled" in run]
    assert scaled and all(each["base_is_back"] for each in scaled)


def test_a_dry_run_of_a_part_of_the_study(monkeypatch, tmp_path):
    parts = ["LoRA", "A-GEM", "progressive column", "LoRA r=4", "an adapter for each, O-LoRA"]
    monkeypatch.setattr(sys, "argv", ["forgetting", "--smoke", "--out", str(tmp_path), "--only", *parts])
    forgetting.main()
    found = recorded.load("forgetting", folder=tmp_path)["result"]
    methods = {row["method"] for row in found["frontier"]["settings"]}
    assert methods == {"LoRA", "LoRA, scaled back", "A-GEM", "progressive column"}
    assert [row["method"] for part in ("foreign", "sequence") for row in found[part]] == parts[3:]


def test_notes_are_english_and_their_floor_is_the_sources():
    benchmark = object.__new__(gemma_forgetting.Benchmark)
    benchmark.settings, benchmark.world = gemma_forgetting.QUICK, World()
    texts, nats, words = benchmark.notes(3, 5)
    assert all(text.startswith("Patient ") and text.endswith("daily.") for text in texts)
    assert words == sum(len(text.replace(":", " :").replace(";", " ;").replace(".", " .").split()) for text in texts)
    ids = [benchmark.world.tokenizer(t.lower().replace(":", " :").replace(";", " ;").replace(".", " .")).input_ids for t in texts]
    assert nats == pytest.approx(-sum(benchmark.world.log_probs("clinic", torch.tensor([row])).sum().item() for row in ids))
