"""The sizes of a decoder-only language model, and how many parameters follow from them.

A decoder layer is seven matrices (six where the MLP has no gate) and a few vectors of norm weights:

    q: heads·head_dim × hidden      k, v: kv_heads·head_dim × hidden      o: hidden × heads·head_dim
    gate, up: mlp × hidden          down: hidden × mlp

around it one embedding (vocabulary × hidden), a last norm, and an output head that is a second such
matrix or the embedding itself ("tied"). heads·head_dim need not equal hidden, and kv_heads is often
smaller than heads (grouped-query attention, Ainslie et al. 2023). The totals of the named shapes
are exact: the tests build every model without its weights and count.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from reference.arguments import check_integer

ATTENTION_INPUTS, MLP_INPUTS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer; all counts, no units.

    Attributes:
        hidden: width of the residual stream.
        mlp: width inside the MLP.
        tied: the output head is the embedding matrix.
        gated: the MLP is down(act(gate(x))·up(x)), as in Llama; else down(act(up(x))), as in GPT-3.
        biases: every linear layer and every norm has a bias, as in GPT-3.
        norms: norms of width ``hidden`` in a layer.
        qk_norm: queries and keys have a norm of width ``head_dim`` each, as in Gemma 3.
        positions: rows of a learned position embedding; 0 for rotary positions.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool = False
    gated: bool = True
    biases: bool = False
    norms: int = 2
    qk_norm: bool = False
    positions: int = 0

    def __post_init__(self) -> None:
        for field in ("hidden", "layers", "heads", "kv_heads", "head_dim", "mlp", "vocab"):
            check_integer(field, getattr(self, field), 1)
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads ({self.kv_heads}), got {self.heads}: "
                "each kv head serves a group of heads"
            )

    @classmethod
    def from_config(cls, config: Any, name: str | None = None) -> "ModelShape":
        """The shape of a Llama-like model, from a configuration of the Hugging Face library.

        Raises:
            ValueError: another family than Llama and Mistral, or linear layers with biases.
        """
        if (family := getattr(config, "model_type", "llama")) not in ("llama", "mistral"):
            raise ValueError(
                f"from_config reads llama and mistral configurations, got {family!r}: "
                "write its ModelShape by hand"
            )
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            raise ValueError("from_config reads no biases: write its ModelShape with biases=True")
        heads = config.num_attention_heads
        return cls(
            name or config.model_type,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    @property
    def like_llama(self) -> bool:
        """Whether a decoder layer is made like Llama's, whatever its sizes."""
        return self.gated and not self.biases and self.norms == 2 and not self.qk_norm

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (out_features, in_features) of the linear layers in one decoder layer."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
        if self.gated:
            shapes["gate_proj"] = (self.mlp, h)
        return shapes | {"up_proj": (self.mlp, h), "down_proj": (h, self.mlp)}

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding: vocabulary × hidden."""
        return self.vocab * self.hidden

    @property
    def linear_parameters(self) -> int:
        """Weights (no biases) of all linears inside the decoder layers: what QLoRA quantizes."""
        return self.layers * sum(out * into for out, into in self.linears.values())

    @property
    def tensors(self) -> dict[str, tuple[int, int]]:
        """Kind of parameter tensor -> (elements, how many of them in the model).

        A tied head is no tensor of its own.
        """
        found = {
            "embedding": (self.embedding, 1 if self.tied else 2),
            "norm": (self.hidden, self.layers * self.norms + 1),
        }
        found |= {name: (out * into, self.layers) for name, (out, into) in self.linears.items()}
        if self.qk_norm:
            found["q and k norm"] = (self.head_dim, 2 * self.layers)
        if self.positions:
            found["positions"] = (self.positions * self.hidden, 1)
        if self.biases:
            found |= {f"{name} bias": (out, self.layers) for name, (out, _) in self.linears.items()}
            found["norm bias"] = found["norm"]
        return found

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return sum(elements * count for elements, count in self.tensors.values())

    def targets(self, target_modules: str | Iterable[str] = "all-linear") -> tuple[str, ...]:
        """Names of the adapted linears of a layer.

        Args:
            target_modules: a name or several, or "all-linear" for every one of them. The output
                head is not adapted.

        Raises:
            ValueError: a name that this shape does not have, or none at all.
        """
        names = tuple(self.linears) if target_modules == "all-linear" else target_modules
        names = (names,) if isinstance(names, str) else tuple(names)
        if unknown := [name for name in names if name not in self.linears]:
            raise ValueError(
                f"targets: {self.name} has no {', '.join(map(str, unknown))}; "
                f"choose from {', '.join(self.linears)}"
            )
        if not names:
            raise ValueError("targets is empty: name at least one linear layer, or 'all-linear'")
        return tuple(name for name in self.linears if name in names)

    def adapter_parameters(
        self, rank: int, target_modules: str | Iterable[str] = "all-linear"
    ) -> int:
        """Parameters of LoRA's factors: rank·(in + out) for every adapted linear of every layer.

        Raises:
            ValueError: ``rank`` is not an integer from 1 to min(in, out) of each target.
        """
        sizes = [self.linears[name] for name in self.targets(target_modules)]
        largest = min(min(size) for size in sizes)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
            raise ValueError(
                f"rank must be an integer from 1 to {largest} for these targets of {self.name}, "
                f"got {rank!r}"
            )
        return self.layers * sum(rank * (out + into) for out, into in sizes)


LLAMA_2_7B = ModelShape("Llama-2-7B", 4096, 32, 32, 32, 128, 11008, 32000)
LLAMA_2_13B = ModelShape("Llama-2-13B", 5120, 40, 40, 40, 128, 13824, 32000)
LLAMA_33B = ModelShape("Llama-33B", 6656, 60, 52, 52, 128, 17920, 32000)  # the first generation's
LLAMA_65B = ModelShape("LLaMA-65B", 8192, 80, 64, 64, 128, 22016, 32000)  # and this
LLAMA_2_70B = ModelShape("Llama-2-70B", 8192, 80, 64, 8, 128, 28672, 32000)
LLAMA_3_8B = ModelShape("Llama-3-8B", 4096, 32, 32, 8, 128, 14336, 128256)
LLAMA_3_70B = ModelShape("Llama-3-70B", 8192, 80, 64, 8, 128, 28672, 128256)
LLAMA_3_2_1B = ModelShape("Llama-3.2-1B", 2048, 16, 32, 8, 64, 8192, 128256, tied=True)
GPT_3 = ModelShape(
    "GPT-3 175B", 12288, 96, 96, 96, 128, 49152, 50257,
    tied=True, gated=False, biases=True, positions=2048,
)  # fmt: skip
GEMMA_3_270M = ModelShape(
    "Gemma-3-270M", 640, 18, 4, 1, 256, 2048, 262144, tied=True, norms=4, qk_norm=True
)
SHAPES = {
    shape.name: shape
    for shape in (
        GEMMA_3_270M, LLAMA_3_2_1B, LLAMA_2_7B, LLAMA_3_8B, LLAMA_2_13B, LLAMA_33B, LLAMA_65B,
        LLAMA_2_70B, LLAMA_3_70B, GPT_3,
    )
}  # fmt: skip
