"""LoRA's relatives: begin at :mod:`reference.relatives.updates`."""

from reference.relatives.inject import inject_loha, inject_lokr, inject_oft, inject_vera
from reference.relatives.starts import inject_loftq, loftq, lora_plus_groups
from reference.relatives.subsets import train_biases, train_norms
from reference.relatives.updates import OFT, LoHa, LoKr, Update, VeRA

__all__ = [
    "OFT",
    "LoHa",
    "LoKr",
    "Update",
    "VeRA",
    "inject_loftq",
    "inject_loha",
    "inject_lokr",
    "inject_oft",
    "inject_vera",
    "loftq",
    "lora_plus_groups",
    "train_biases",
    "train_norms",
]
