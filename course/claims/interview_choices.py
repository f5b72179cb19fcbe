"""What the multiple-choice questions state beside the bank: figures that a wrong answer comes to."""

from reference.memory import SHAPES


def bytes_gb(model: str, each: float) -> float:
    """Gigabytes at ``each`` bytes per parameter."""
    return SHAPES[model].parameters * each / 1e9
