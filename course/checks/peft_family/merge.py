"""Exercise 2: merging IA³, the bias included."""

import torch
from torch import Tensor

from course.checking import Check, Seen, but, unpacked


def scaled_rows(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale[:, None]


def scaled_columns(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale


def merge_ia3(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    feedforward: bool,
    *,
    outputs=scaled_rows,
    inputs=scaled_columns,
    bias_of_outputs=lambda bias, scale: bias * scale,
    bias_of_inputs=lambda bias, scale: bias,
) -> tuple[Tensor, Tensor | None]:
    """The worked answer: W' and b' of the plain layer that computes the same."""
    if feedforward:
        return inputs(weight, scale), None if bias is None else bias_of_inputs(bias, scale)
    return outputs(weight, scale), None if bias is None else bias_of_outputs(bias, scale)


def by_matrices(weight: Tensor, bias: Tensor | None, scale: Tensor, feedforward: bool) -> tuple[Tensor, Tensor | None]:
    diagonal = torch.diag(scale)
    if feedforward:
        return weight @ diagonal, bias
    return diagonal @ weight, bias if bias is None else diagonal @ bias


def changed_in_place(weight: Tensor, bias: Tensor | None, scale: Tensor, feedforward: bool) -> tuple[Tensor, Tensor | None]:
    if feedforward:
        return weight.mul_(scale), bias
    return weight.mul_(scale[:, None]), bias if bias is None else bias.mul_(scale)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for n_out, n_in in ((5, 5), (4, 7)):  # square first: there a wrong axis fits
        for feedforward in (False, True):
            for with_bias in (False, True):
                weight, bias = torch.randn(n_out, n_in, generator=g), torch.randn(n_out, generator=g) if with_bias else None
                scale = torch.rand(n_in if feedforward else n_out, generator=g) + 0.25
                scaled = "inputs" if feedforward else "outputs"
                what = f"of a {n_out} × {n_in} layer {'with' if with_bias else 'without'} a bias, its {scaled} scaled"
                result = answer(weight, bias, scale, feedforward)
                W, b = unpacked(result, "a pair: the weight and the bias, or None", Tensor, Tensor if with_bias else type(None))
                yield f"W' {what}", W
                yield f"b' {what}", b


check = Check(
    task="IA³ merged: rows or columns of the weight, and the bias where outputs are scaled",
    observe=observe,
    reference=merge_ia3,
    second=by_matrices,
    misconceptions={
        "the bias is not scaled: an output is l ⊙ (W·x + b), so b' = l ⊙ b (peft had this bug until 2023)": but(
            bias_of_outputs=lambda bias, scale: bias
        ),
        "the bias is scaled where inputs are: W·(l ⊙ x) + b leaves b as it is": but(bias_of_inputs=lambda bias, scale: bias * scale),
        "outputs are rows of W, and you scaled its columns: W is (out, in), so multiply by scale[:, None]": but(outputs=scaled_columns),
        "inputs are columns of W, and you scaled its rows": but(inputs=scaled_rows),
        "rows and columns are exchanged: outputs are rows of W, scale[:, None], and inputs are its columns": but(
            outputs=scaled_columns, inputs=scaled_rows
        ),
        "the scale was added to one: l starts at one, so it multiplies as it is": but(
            outputs=lambda weight, scale: scaled_rows(weight, 1 + scale),
            inputs=lambda weight, scale: scaled_columns(weight, 1 + scale),
            bias_of_outputs=lambda bias, scale: bias * (1 + scale),
        ),
        "you divided by the scale: that takes a merge out again": but(
            outputs=lambda weight, scale: scaled_rows(weight, 1 / scale),
            inputs=lambda weight, scale: scaled_columns(weight, 1 / scale),
            bias_of_outputs=lambda bias, scale: bias / scale,
        ),
        "the given weight was changed in place: return new tensors, the model's own must stay": changed_in_place,
    },
)
