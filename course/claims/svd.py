"""What unit 01 states: small matrices and a photograph, computed; fine-tunings as `benchmarks/update_rank.py` recorded them on a CPU."""

import functools
import math
import statistics

import torch
from torch import Tensor

from course.lab import recorded
from reference import lowrank

# Small matrices


def largest_saving_rank_4096() -> int:
    """Factors of a 4096 × 4096 matrix are smaller than it below this rank."""
    return 4096 * 4096 // (4096 + 4096)


def factors_share_4096_r16() -> float:
    """Numbers of rank-16 factors in percent of a 4096 × 4096 matrix's."""
    return 100 * 16 * (4096 + 4096) / 4096**2


def error_at_99_percent_energy() -> float:
    """Relative error, in percent of the norm, where 99 % of the energy is kept."""
    return 100 * math.sqrt(1 - 0.99)


def error_at_90_percent_energy() -> float:
    return 100 * math.sqrt(1 - 0.9)


def _four_large() -> Tensor:
    """Four singular values of 10 and 124 of 0.3."""
    return torch.tensor([10.0] * 4 + [0.3] * 124, dtype=torch.float64)


def four_large_energy() -> float:
    return 100 * lowrank.energy_captured(_four_large(), 4)


def four_large_effective_rank() -> float:
    return lowrank.effective_rank(_four_large())


def four_large_stable_rank() -> float:
    return lowrank.stable_rank(_four_large())


def effective_rank_by_hand() -> float:
    """Of the singular values 2, 1, 1."""
    return lowrank.effective_rank(torch.tensor([2.0, 1.0, 1.0]))


def _noise(seed: int = 0) -> Tensor:
    return torch.randn(128, 128, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def noise_effective_rank_128() -> float:
    """Of a 128 × 128 matrix of independent normal numbers, mean of five."""
    return statistics.fmean(lowrank.effective_rank(torch.linalg.svdvals(_noise(seed))) for seed in range(5))


def noise_upper_edge_128() -> float:
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


def energy_is_one_minus_squared_error() -> bool:
    weight = _noise()
    b, a = lowrank.truncated_svd(weight, 20)
    error = (torch.linalg.matrix_norm(weight - b @ a) / torch.linalg.matrix_norm(weight)).item()
    return math.isclose(lowrank.energy_captured(torch.linalg.svdvals(weight), 20), 1 - error**2, rel_tol=1e-12)


def projected_gradient_is_the_gradient_of_z() -> bool:
    """dL/dz = Pᵀ · dL/dθ, in float64, for both kinds of P."""
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
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


@functools.cache
def _photograph() -> Tensor:
    """Singular values of scikit-learn's photograph of a temple, 427 × 640 grey values."""
    from sklearn.datasets import load_sample_image

    return torch.linalg.svdvals(torch.tensor(load_sample_image("china.jpg"), dtype=torch.float64).mean(-1) / 255)


def photograph_rank_for_99_percent() -> int:
    return lowrank.rank_for_energy(_photograph(), 0.99)


def photograph_rank_for_90_percent() -> int:
    return lowrank.rank_for_energy(_photograph(), 0.9)


def photograph_rank_by_the_mistake() -> int:
    """The rank for 90 % if σ is added up in place of σ²."""
    kept = _photograph().cumsum(0)
    return int((kept < 0.9 * kept[-1]).sum()) + 1


# Fine-tunings of the tiny model, recorded


@functools.cache
def _recorded() -> dict:
    return recorded.load("update_rank", device="cpu")["result"]


def _share(found: dict, measure: str = "effective_rank") -> float:
    """Mean over the linear layers of the blocks, in percent of the largest possible."""
    shapes = _recorded()["shapes"]
    return 100 * statistics.fmean(entry[measure] / min(shapes[name]) for name, entry in found.items() if ".layers." in name)


def weights_share() -> float:
    """Effective rank of trained weights, in percent of n."""
    return _share(_recorded()["weights"])


def noise_share() -> float:
    return _share(_recorded()["noise"])


def update_share(domain: str = "clinic") -> float:
    """Of updates, mean of three seeds."""
    return statistics.fmean(map(_share, _recorded()["updates"][domain]))


def update_share_legal() -> float:
    return update_share("legal")


def update_share_sql() -> float:
    return update_share("sql")


def update_energy_share() -> float:
    """Rank that keeps 90 % of an update's energy, in percent of n."""
    return statistics.fmean(_share(run, "rank_for_90_percent_energy") for run in _recorded()["updates"]["clinic"])


def weights_energy_share() -> float:
    return _share(_recorded()["weights"], "rank_for_90_percent_energy")


def noise_energy_share() -> float:
    return _share(_recorded()["noise"], "rank_for_90_percent_energy")


def updates_are_lower_in_every_layer() -> bool:
    """Every linear layer, every domain and seed: effective rank of ΔW below W's, and W's below noise's."""
    r = _recorded()
    runs = [run for domain in r["updates"].values() for run in domain]
    layers = [name for name in r["weights"] if ".layers." in name]
    erank = "effective_rank"
    lower = all(run[name][erank] < r["weights"][name][erank] for run in runs for name in layers)
    return lower and all(r["weights"][name][erank] < r["noise"][name][erank] for name in layers)


def _gain(domain: str, rank: int) -> float:
    """Percent of what fine-tuning gained that is left when every update is cut to ``rank``, mean of three seeds."""
    r = _recorded()
    at = r["ranks"].index(rank)
    runs = zip(r["loss"][domain], r["retained"][domain], strict=True)
    return 100 * statistics.fmean((before - kept[at]) / (before - after) for (before, after), kept in runs)


def gain_at_rank_1() -> float:
    return _gain("clinic", 1)


def gain_at_rank_4() -> float:
    return _gain("clinic", 4)


def gain_at_rank_8() -> float:
    return _gain("clinic", 8)


def gain_at_rank_16() -> float:
    return _gain("clinic", 16)


def gain_at_rank_8_legal() -> float:
    return _gain("legal", 8)


def gain_at_rank_8_sql() -> float:
    return _gain("sql", 8)


def _weights_cut_to(rank: int) -> float:
    """Nats above the floor on general text when every weight matrix is cut to ``rank``."""
    cut = _recorded()["weights_truncated"]
    return cut["loss_on_general"][cut["ranks"].index(rank)]


def weights_cut_to_16() -> float:
    return _weights_cut_to(16)


def weights_cut_to_32() -> float:
    return _weights_cut_to(32)


def weights_cut_to_64() -> float:
    return _weights_cut_to(64)


def _along(label: str, what: str, step: int) -> float:
    along = _recorded()["along_training"]
    at = along["steps"].index(step)
    return statistics.fmean(run[at] for run in along["runs"][label][what])


def adam_share_step_1() -> float:
    return 100 * _along("AdamW, lr 0.002", "share", 1)


def adam_share_step_100() -> float:
    return 100 * _along("AdamW, lr 0.002", "share", 100)


def sgd_share_step_1() -> float:
    """The first step of SGD is the gradient."""
    return 100 * _along("SGD, lr 0.3", "share", 1)


def sgd_share_step_100() -> float:
    return 100 * _along("SGD, lr 0.3", "share", 100)


def adam_loss_step_100() -> float:
    return _along("AdamW, lr 0.002", "loss", 100)


def sgd_loss_step_100() -> float:
    return _along("SGD, lr 0.3", "loss", 100)


@functools.cache
def _gemma() -> dict:
    return recorded.load("gemma_spectra")["result"]


def _gemma_share(part: str) -> float:
    """Mean effective rank of the recorded layers, in percent of n."""
    return 100 * statistics.fmean(entry["effective_rank"] / min(entry["shape"]) for entry in _gemma()[part].values())


def gemma_weights_share() -> float:
    return _gemma_share("weights")


def gemma_update_share() -> float:
    return _gemma_share("updates")


def gemma_updates_are_lower_in_every_layer() -> bool:
    g = _gemma()
    return all(g["updates"][name]["effective_rank"] < g["weights"][name]["effective_rank"] for name in g["weights"])


def _gemma_gain(rank: int) -> float:
    """Percent of the gain on held-out code that is left when the updates of all linear layers are cut to ``rank``."""
    g = _gemma()
    (loss,) = [row["loss"] for row in g["retained"] if row["rank"] == rank]
    return 100 * (g["loss_before"] - loss) / (g["loss_before"] - g["loss_after_full"])


def gemma_gain_at_rank_0() -> float:
    """What embeddings and norms alone keep."""
    return _gemma_gain(0)


def gemma_gain_at_rank_1() -> float:
    return _gemma_gain(1)


def gemma_gain_at_rank_16() -> float:
    return _gemma_gain(16)


def gemma_gain_at_rank_64() -> float:
    return _gemma_gain(64)


def tiny_parameters() -> int:
    return _recorded()["tiny"]["parameters"]


def _tiny_gain(d: int) -> float:
    return 100 * statistics.fmean(_recorded()["tiny"]["share_of_gain"][str(d)])


def tiny_gain_in_1000_dimensions() -> float:
    return _tiny_gain(1000)


def tiny_gain_in_100_dimensions() -> float:
    return _tiny_gain(100)


def tiny_d90() -> int:
    """The smallest dimension tried that reaches 90 % of the full fine-tuning's gain, mean of three seeds."""
    return min(int(d) for d in _recorded()["tiny"]["share_of_gain"] if _tiny_gain(int(d)) >= 90)


def tiny_d90_share() -> float:
    return 100 * tiny_d90() / tiny_parameters()


def _digits(width: int) -> dict:
    return _recorded()["digits"][str(width)]


def _digits_d90(width: int) -> int:
    """The smallest dimension tried that reaches 90 % of full accuracy, mean of three seeds."""
    full = statistics.fmean(_digits(width)["full"])
    return min(int(d) for d, accuracies in _digits(width)["subspace"].items() if statistics.fmean(accuracies) >= 0.9 * full)


def digits_d90_narrow() -> int:
    return _digits_d90(16)


def digits_d90_middle() -> int:
    return _digits_d90(64)


def digits_d90_wide() -> int:
    return _digits_d90(256)


def digits_parameters_narrow() -> int:
    return _digits(16)["parameters"]


def digits_parameters_middle() -> int:
    return _digits(64)["parameters"]


def digits_parameters_wide() -> int:
    return _digits(256)["parameters"]
