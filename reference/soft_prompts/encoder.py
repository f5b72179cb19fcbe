"""P-tuning: the rows of a soft prompt come out of a small network, which is trained with them.

    prompt = network(E),    E: (P, d), trained

The rows then share numbers, and a step moves all of them together. Two networks are usual, as in
peft:

    MLP     d → h → h → d with ReLU between
    LSTM    two layers read E in *both* directions, 2h numbers a row; then 2h → 2h → d

It is needed in training only. What is kept of it is what comes out, P·d numbers: a file of them can
be used and not trained on.

Liu et al. 2021, "GPT Understands, Too" (2103.10385).
"""

import torch
from torch import Tensor, nn

from reference.arguments import check_integer


class PromptEncoder(nn.Module):
    """A prompt for :class:`reference.soft_prompts.PromptTuning`; ``forward()`` gives (P, d).

    Args:
        tokens: P.
        width: d, of the model's embedding.
        hidden: h; default: d.
        network: "mlp" or "lstm".
    """

    def __init__(self, tokens: int, width: int, hidden: int | None = None, network: str = "mlp"):
        super().__init__()
        hidden = width if hidden is None else hidden
        for name, value in (("tokens", tokens), ("width", width), ("hidden", hidden)):
            check_integer(name, value, 1)
        self.embedding = nn.Parameter(torch.randn(tokens, width))
        self.lstm = None
        if network == "mlp":
            layers = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
            layers += [nn.Linear(hidden, width)]
        elif network == "lstm":
            both = {"num_layers": 2, "bidirectional": True, "batch_first": True}
            self.lstm = nn.LSTM(width, hidden, **both)
            layers = [nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width)]
        else:
            raise ValueError(f"network must be 'mlp' or 'lstm', got {network!r}")
        self.mlp = nn.Sequential(*layers)

    def forward(self) -> Tensor:
        rows = self.embedding[None]  # (1, P, d)
        if self.lstm is not None:
            rows = self.lstm(rows)[0]  # (1, P, 2h): forward and backward side by side
        return self.mlp(rows)[0]
