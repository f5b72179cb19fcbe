"""Progressive networks: a new column for each task, and the old ones are left alone.

Column k is a network of its own. Its layer i also hears what the earlier columns have at layer
i − 1, through lateral connections:

    h_i = f( W_i h_{i−1} + Σ_{j<k} U_{ij} h_{i−1}^{(j)} )        or    U·f(V·(a h_{i-1}^{(j)}))

Earlier columns are frozen, so what they computed stays as it was, bit for bit. Two prices: the
parameters grow with every task, the laterals with its square, and one must know which task an
input belongs to. Rusu et al. 2016, "Progressive neural networks".
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from reference.arguments import check_integer


class Adapter(nn.Module):
    """U·f(V·(a·h)): h (..., width) is scaled by a number, narrowed, and widened to ``out``."""

    def __init__(self, width: int, bottleneck: int, out: int, start: float = 0.1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(start))
        self.narrow, self.widen = (
            nn.Linear(width, bottleneck),
            nn.Linear(bottleneck, out, bias=False),
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.widen(torch.relu(self.narrow(self.scale * h)))


class ProgressiveNetwork(nn.Module):
    """Columns of blocks with lateral connections; only the newest column trains.

    Args:
        blocks: the first column: what maps h_{i−1} to h_i before the activation, in order. Linear
            layers make the network of the paper; any module that maps one tensor to one will do.
        activation: f, between blocks; the last block's output is handed on as it is.

    Attributes:
        columns: the blocks of each column. laterals: of each column, block and earlier column.

    Raises:
        ValueError: there are no blocks.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], activation: Callable[[Tensor], Tensor] = torch.relu
    ) -> None:
        super().__init__()
        if len(blocks) == 0:
            raise ValueError("blocks is empty: a column needs at least one")
        self.activation = activation
        self.columns = nn.ModuleList([nn.ModuleList(blocks)])
        self.laterals = nn.ModuleList([nn.ModuleList()])

    def add_column(
        self, blocks: Sequence[nn.Module], lateral: Callable[[int], nn.Module] | None = None
    ) -> None:
        """Freeze what is there and add a column for the next task.

        Args:
            blocks: as many as the first column has.
            lateral: ``lateral(i)`` makes the connection into block i, for i ≥ 1, from one earlier
                column: what maps its h_{i−1} to what block i puts out. None: none.

        Raises:
            ValueError: another number of blocks; nothing is changed then.
        """
        if len(blocks) != len(self.columns[0]):
            raise ValueError(
                f"blocks must be {len(self.columns[0])}, as in the first column, got {len(blocks)}"
            )
        earlier = len(self.columns)
        made = nn.ModuleList(
            nn.ModuleList(lateral(i) for _ in range(earlier)) if lateral and i else nn.ModuleList()
            for i in range(len(blocks))
        )
        self.requires_grad_(False)
        self.columns.append(nn.ModuleList(blocks))
        self.laterals.append(made)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ProgressiveNetwork":
        """Old columns stay in evaluation mode: dropout or statistics would change what they say."""
        super().train(mode)
        for column in self.columns[:-1]:
            column.eval()
        return self

    def forward(self, x: Tensor, task: int = -1) -> Tensor:
        """The output of the column of ``task``, from 0; −1 is the newest.

        Raises:
            TypeError, ValueError: there is no such column.
        """
        check_integer("task", task, -len(self.columns), len(self.columns) - 1)
        needed = range(task % len(self.columns) + 1)
        states = [x for _ in needed]  # h_{i−1} of each column
        for i in range(len(self.columns[0])):
            following = []
            for k in needed:
                h = self.columns[k][i](states[k])
                for j, lateral in enumerate(self.laterals[k][i] if k else ()):
                    h = h + lateral(states[j])
                last = i == len(self.columns[0]) - 1
                following.append(h if last else self.activation(h))
            states = following
        return states[-1]
