"""What unit 01 states: small matrices and a photograph, computed; fine-tunings as benchmarks recorded them.

What was measured on the tiny model and on small networks is `benchmarks/update_rank.py`'s, on a CPU; Gemma 3 270M ran on a GPU, and its
figures take the ``device`` of the record. ``measure`` is written as in the records.
"""

import math
import statistics
from functools import cache

import torch
from torch import Tensor

from course.claims.shared import CPU, GPU, normal
from course.lab import recorded
from reference import lowrank

# Small matrices


def factors(n: int, rank: int) -> int:
    """Numbers in the two factors of an n × n matrix."""
    return rank * (n + n)


def factors_percent(n: int, rank: int) -> float:
    """The same in percent of the matrix's; of the multiplications for a vector, too."""
    return 100 * factors(n, rank) / n**2


def break_even_rank(n: int) -> int:
    """From where the factors of an n × n matrix have as many numbers as it has."""
    return n**2 // factors(n, 1)


def error_percent(energy: float) -> float:
    """Relative error, of the norm, where this share of the energy is kept."""
    return 100 * math.sqrt(1 - energy)


FOUR_LARGE = torch.tensor([10.0] * 4 + [0.3] * 124, dtype=torch.float64)  # singular values


def four_large_energy_percent() -> float:
    """Of the energy that the four large values hold."""
    return 100 * lowrank.energy_captured(FOUR_LARGE, 4)


def four_large_rank(measure: str) -> float:
    """The "effective_rank" or the "stable_rank" of these."""
    return getattr(lowrank, measure)(FOUR_LARGE)


def effective_rank(*values: float) -> float:
    """Of these singular values."""
    return lowrank.effective_rank(torch.tensor(values, dtype=torch.float64))


def _noise(seed: int = 0) -> Tensor:
    return normal(128, 128, seed=seed, dtype=torch.float64)


@cache
def noise_effective_rank() -> float:
    """Of a 128 × 128 matrix of independent normal numbers, mean of five."""
    return statistics.fmean(lowrank.effective_rank(torch.linalg.svdvals(_noise(seed))) for seed in range(5))


def noise_upper_edge() -> float:
    """Largest singular value of unit noise, 128 × 128, by Marchenko and Pastur."""
    return lowrank.marchenko_pastur_edges((128, 128), std=1.0)[1]


def little_noise_makes_rank_full() -> bool:
    """One piece plus a millionth of noise: numerical rank 128, effective rank close to one."""
    matrix = _noise()[:, :1] @ _noise()[:1] + 1e-6 * _noise(1)
    return bool(torch.linalg.matrix_rank(matrix) == 128) and lowrank.effective_rank(torch.linalg.svdvals(matrix)) < 1.01


def no_rival_is_closer() -> bool:
    """A hundred rivals of the same rank, in three norms, on random matrices: none is closer than the truncated SVD."""
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        weight = torch.randn(12, 9, generator=g, dtype=torch.float64)
        rank = int(torch.randint(1, 9, (1,), generator=g))
        b, a = lowrank.truncated_svd(weight, rank)
        q = torch.linalg.qr(torch.randn(9, rank, generator=g, dtype=torch.float64)).Q
        rivals = weight @ q @ q.T, (b + 0.01 * torch.randn(b.shape, generator=g, dtype=torch.float64)) @ a
        for order in ("fro", "nuc", 2):
            least = torch.linalg.matrix_norm(weight - b @ a, ord=order)
            if any(torch.linalg.matrix_norm(weight - rival, ord=order) < least - 1e-12 for rival in rivals):
                return False
    return True


def best_in_the_spectral_norm_is_not_unique() -> bool:
    """diag(3, 2, 1) at rank 1: diag(3 − t, 0, 0) has the least spectral error for 0 ≤ t ≤ 2, the least Frobenius error for t = 0 alone."""
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    rivals = {t: torch.diag(torch.tensor([3 - t, 0, 0], dtype=torch.float64)) for t in (0.0, 0.5, 1.0, 2.0, 2.5)}
    spectral, frobenius = ({t: torch.linalg.matrix_norm(weight - x, ord=o).item() for t, x in rivals.items()} for o in (2, "fro"))
    ties = all(math.isclose(error, 2) for t, error in spectral.items() if t <= 2)
    return ties and spectral[2.5] > 2.4 and all(frobenius[t] > frobenius[0.0] for t in rivals if t)


def energy_is_one_minus_squared_error() -> bool:
    """Of 128 × 128 noise cut to rank 20."""
    weight = _noise()
    b, a = lowrank.truncated_svd(weight, 20)
    error = (torch.linalg.matrix_norm(weight - b @ a) / torch.linalg.matrix_norm(weight)).item()
    return math.isclose(lowrank.energy_captured(torch.linalg.svdvals(weight), 20), 1 - error**2, rel_tol=1e-12)


def projected_gradient_is_the_gradient_of_z() -> bool:
    """dL/dz = Pᵀ · dL/dθ, in float64, for both kinds of P."""
    x = normal(6, 5, dtype=torch.float64)
    for projection in ("sparse", "dense"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain, module = (torch.nn.Linear(5, 3).double() for _ in range(2))
        module.load_state_dict(plain.state_dict())
        subspace = lowrank.RandomSubspace(module, 4, projection=projection)
        plain(x).square().sum().backward()
        subspace(x).square().sum().backward()
        full = torch.cat([p.grad.flatten() for p in plain.parameters()])
        if not torch.allclose(subspace.project(full), subspace.z.grad, rtol=1e-10):
            return False
    return True


# The photograph


@cache
def _photograph() -> Tensor:
    """Singular values of scikit-learn's photograph of a temple, 427 × 640 grey values."""
    from sklearn.datasets import load_sample_image

    return torch.linalg.svdvals(torch.tensor(load_sample_image("china.jpg"), dtype=torch.float64).mean(-1) / 255)


def photograph_rank(energy: float) -> int:
    """That keeps this share of the energy."""
    return lowrank.rank_for_energy(_photograph(), energy)


def photograph_rank_by_the_mistake(energy: float) -> int:
    """The same if σ is added up in place of σ²."""
    kept = _photograph().cumsum(0)
    return int((kept < energy * kept[-1]).sum()) + 1


# Fine-tunings of the tiny model, recorded; means of three seeds


@cache
def _recorded() -> dict:
    return recorded.load("update_rank", CPU)["result"]


def rank_percent(what: str, measure: str = "effective_rank", domain: str = "clinic") -> float:
    """Mean rank of the linear layers of the blocks, of the largest possible.

    Args:
        what: trained "weights", "noise" of their shapes, or the "updates" of a fine-tuning on ``domain``.
        measure: "effective_rank" or "rank_for_90_percent_energy".
    """
    found = _recorded()["updates"][domain] if what == "updates" else [_recorded()[what]]
    largest = {name: min(shape) for name, shape in _recorded()["shapes"].items() if ".layers." in name}
    return 100 * statistics.fmean(run[name][measure] / largest[name] for run in found for name in largest)


def updates_are_lower_in_every_layer() -> bool:
    """Every linear layer, every domain and seed: effective rank of ΔW below W's, and W's below noise's."""
    r = _recorded()
    runs = [run for domain in r["updates"].values() for run in domain]
    layers = [name for name in r["weights"] if ".layers." in name]
    erank = "effective_rank"
    lower = all(run[name][erank] < r["weights"][name][erank] for run in runs for name in layers)
    return lower and all(r["weights"][name][erank] < r["noise"][name][erank] for name in layers)


def gain_percent(rank: int, domain: str = "clinic") -> float:
    """Of what fine-tuning gained, what is left when every update is cut to ``rank``."""
    r = _recorded()
    at = r["ranks"].index(rank)
    runs = zip(r["loss"][domain], r["retained"][domain], strict=True)
    return 100 * statistics.fmean((before - kept[at]) / (before - after) for (before, after), kept in runs)


def weights_cut_nats(rank: int) -> float:
    """A token above the floor on general text when every weight matrix is cut to ``rank``."""
    cut = _recorded()["weights_truncated"]
    return cut["loss_on_general"][cut["ranks"].index(rank)]


def after(step: int, optimizer: str, what: str) -> float:
    """The "loss", nats a token above the floor, or the "share": effective rank of the updates, of the largest possible."""
    along = _recorded()["along_training"]
    at = along["steps"].index(step)
    return statistics.fmean(run[at] for run in along["runs"][optimizer][what])


def rank_percent_after(step: int, optimizer: str) -> float:
    """That share in percent; after the first step of SGD it is the gradient's."""
    return 100 * after(step, optimizer, "share")


# Gemma 3 270M


def _gemma(device: str = GPU) -> dict:
    return recorded.load("gemma_spectra", device)["result"]


def gemma_rank_percent(what: str, device: str = GPU) -> float:
    """Mean effective rank of the recorded layers' "weights" or "updates", of the largest possible."""
    return 100 * statistics.fmean(entry["effective_rank"] / min(entry["shape"]) for entry in _gemma(device)[what].values())


def gemma_updates_are_lower_in_every_layer() -> bool:
    """In effective rank, than the weights."""
    g = _gemma()
    return all(g["updates"][name]["effective_rank"] < g["weights"][name]["effective_rank"] for name in g["weights"])


def gemma_energy_percent(rank: int, device: str = GPU) -> float:
    """Mean over the recorded layers: of an update's energy, what its best part of that rank holds."""
    return 100 * statistics.fmean(entry["energy"][str(rank)] for entry in _gemma(device)["updates"].values())


def gemma_gain_percent(rank: int, device: str = GPU) -> float:
    """Of the gain on held-out code, what is left when the updates of all linear layers are cut to ``rank``.

    At rank 0 it is what embeddings and norms alone keep.
    """
    g, loss = _gemma(device), recorded.row("gemma_spectra", device, rank=rank)["loss"]
    return 100 * (g["loss_before"] - loss) / (g["loss_before"] - g["loss_after_full"])


# Random subspaces; means of three seeds


def _network(width: int | None) -> dict:
    """The network of that width, which reads digits; None is the tiny model."""
    tiny = _recorded()["tiny"]
    return tiny | {"full": [1], "subspace": tiny["share_of_gain"]} if width is None else _recorded()["digits"][str(width)]


def parameters(width: int | None = None) -> int:
    """Of such a network."""
    return _network(width)["parameters"]


def tiny_gain_percent(dimensions: int) -> float:
    """Of what full fine-tuning gains, in so many random directions."""
    return 100 * statistics.fmean(_recorded()["tiny"]["share_of_gain"][str(dimensions)])


def d90(width: int | None = None) -> int:
    """The smallest dimension tried that reaches 90 % of full training: of the digits' accuracy, or of the tiny model's gain."""
    enough = 0.9 * statistics.fmean(_network(width)["full"])
    return min(int(d) for d, results in _network(width)["subspace"].items() if statistics.fmean(results) >= enough)


def d90_percent(width: int | None = None) -> float:
    """The same, of all parameters."""
    return 100 * d90(width) / parameters(width)
