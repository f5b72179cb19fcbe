"""Whether a layer is called: an adapter changes what a call returns, and nothing else.

A model may read a layer's weight and multiply by it itself, as Mamba does with ``dt_proj`` and
``nn.MultiheadAttention`` with ``out_proj``. An adapter in such a place learns nothing, and merging
it changes the outputs. No type and no name tells; the code that holds the layer does. In it

    self.dt_proj(x)             calls the layer
    self.dt_proj.weight @ x     reads its weight
    self.dt_proj.weight.dtype   asks something about the weight

so the functions of every class in the model are parsed for such names, and the names looked up in
the model. Where a class has no source, or reaches its layers in another way (in a loop), its layers
are taken to be called.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

from torch import nn

ABOUT = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_meta", "is_cuda"}
ABOUT |= {"data_ptr", "requires_grad", "requires_grad_", "grad"}
OF_A_LAYER = {"weight", "bias", "in_features", "out_features", "num_embeddings", "embedding_dim"}
# Methods that set a model up or hand its layers out.
NO_FORWARD = {"get_input_embeddings", "get_output_embeddings", "resize_token_embeddings"}
FUSED = ("Mamba", "Bamba", "Mixer")  # with a kernel of all of the block, on GPUs
LOOPS = {"children", "named_children", "modules", "named_modules", "_modules", "get_submodule"}
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
Chain = tuple[str, ...]  # self.attention.query.weight -> ("attention", "query", "weight")


def never_called(model: nn.Module) -> dict[nn.Module, str]:
    """Layer -> why an adapter in its place would not be seen."""
    read: dict[nn.Module, str] = {}
    fused: dict[nn.Module, str] = {}
    for holder, layer, after in weight_reads(model):
        if after and after[0] in ABOUT:
            continue
        name, own = type(holder).__name__, layer in holder.children()
        read[layer] = name if own else read.get(layer, name)
        if own and any(word in name for word in FUSED):
            fused[layer] = name
    called = _called(model, set(read))
    words = "whose fused kernel reads its weight and does not call it"
    reasons = {layer: f"belongs to {holder}, {words}" for layer, holder in fused.items()}
    words = "which reads its weight and never calls it"
    return reasons | {
        layer: f"belongs to {holder}, {words}"
        for layer, holder in read.items()
        if layer not in called
    }


def weight_reads(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, Chain]]:
    """(holder, layer, what follows) wherever the code of ``holder`` names ``layer``'s weight.

    What follows is ("dtype",) in ``self.wo.weight.dtype`` and empty in ``self.wo.weight @ x``.
    """
    for holder in model.modules():
        for chain in _chains(type(holder), "weight"):
            if "weight" in chain[1:]:
                end = chain.index("weight", 1)
                if (layer := _part(holder, chain[:end])) is not None:
                    yield holder, layer, chain[end + 1 :]


def _called(model: nn.Module, layers: set[nn.Module]) -> set[nn.Module]:
    """Those of ``layers`` that some code in the model uses other than by their weight."""
    called, names = set(), set()
    for holder in model.modules():
        own = {name: child for name, child in holder._modules.items() if child in layers}
        names |= set(own)
        if isinstance(holder, CONTAINERS) or _loops(type(holder)):
            called |= set(own.values())
    for holder in model.modules():
        for chain in {chain for name in names for chain in _chains(type(holder), name)}:
            for end in range(1, len(chain) + 1):
                layer = _part(holder, chain[:end])
                if layer in layers and (end == len(chain) or chain[end] not in OF_A_LAYER):
                    called.add(layer)
    return called


def _part(holder: nn.Module, chain: Chain) -> nn.Module | None:
    for name in chain:
        if (holder := holder._modules.get(name)) is None:
            return None
    return holder


@cache
def _functions(kind: type) -> tuple[tuple[FunctionType, frozenset[str]], ...]:
    """The functions that a forward of ``kind`` may run, with all names in them."""
    found = []
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            setup = "init" in name or "reset" in name or name in NO_FORWARD
            if isinstance(function, FunctionType) and not setup:
                found.append((function, frozenset(_names(function.__code__))))
    return tuple(found)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@cache
def _loops(kind: type) -> bool:
    """Whether a class may reach its layers without naming them."""
    names = {name for _, names in _functions(kind) for name in names}
    return bool(names & LOOPS) or "getattr" in names


@cache
def _chains(kind: type, name: str) -> frozenset[Chain]:
    """What the functions of ``kind`` in which ``name`` occurs say after ``self.``."""
    trees = (_tree(function) for function, names in _functions(kind) if name in names)
    return frozenset(chain for tree in trees if tree is not None for chain in _walk(tree))


@cache
def _tree(function: FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # typed into a shell, or built in
        return None


def _walk(node: ast.AST) -> Iterator[Chain]:
    names, inner = [], node
    while isinstance(inner, ast.Attribute):
        names.append(inner.attr)
        inner = inner.value
    if names and isinstance(inner, ast.Name) and inner.id == "self":
        if isinstance(node.ctx, ast.Load):
            yield tuple(reversed(names))
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child)
