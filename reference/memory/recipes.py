"""Ways to fine-tune, as far as memory is concerned: the numbers kept for a parameter, in bytes.

    full fp32             4 weight + 4 gradient + 4 + 4 Adam's moments                     = 16
    full mixed precision  2 weight + 2 gradient + 4 float32 master weight + 4 + 4 moments  = 16
    full bf16             2 weight + 2 gradient + 2 + 2 moments                            =  8
    8-bit Adam            2 weight + 2 gradient + 1 + 1 moments and their scales           =  6.03
    LoRA                  2 frozen weight
    QLoRA                 about 0.52 frozen weight in a linear layer, 2 elsewhere

LoRA and QLoRA have 16 bytes besides, for each parameter of the adapters alone. "Mixed precision"
names several things. Here it is a bf16 model whose optimizer holds float32 master weights; under
``torch.autocast`` the float32 weights are the model's own and bf16 copies of them live during each
step (unit 08). (8-bit Adam: Dettmers et al. 2021. NF4 and double quantization: Dettmers et al.
2023, units 04 and 05.)
"""

from dataclasses import dataclass

from reference.model_shapes import ModelShape


@dataclass(frozen=True)
class Line:
    """One kind of tensor: ``bytes`` when all of it is there, and the ``formula`` for them."""

    bytes: int
    formula: str

    @classmethod
    def of(cls, each: int, count: int, note: str = "") -> "Line":
        """``count`` numbers of ``each`` bytes."""
        return cls(each * count, f"{each} B × {count:,}{note}")


@dataclass(frozen=True)
class Recipe:
    """Which numbers are kept, and how wide.

    Attributes:
        weight_bytes: of a base weight, and of an activation.
        gradient_bytes, master_bytes: of a trained parameter's gradient, and of its float32 copy
            (0: none).
        moment_bytes: of each of Adam's two moments; 1 means blocks of 256 with a float32 scale.
        adapter_bytes: of a number in LoRA's A and B; 0: no adapters, all base weights are trained.
        quantized: linear layers of the frozen base are NF4 with double quantization.
        input_copies: each adapter keeps its input in its own dtype, as peft's layer does, instead
            of sharing it with its neighbours.
        step_buffer: what the optimizer's step needs for a moment. "all": one more moment of every
            trained parameter (torch's AdamW on a GPU, unless ``fused=True``); "largest": two
            float32 copies of the largest tensor; "none".
    """

    name: str
    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    master_bytes: int = 0
    adapter_bytes: int = 0
    quantized: bool = False
    input_copies: bool = False
    step_buffer: str = "all"

    def __post_init__(self) -> None:
        allowed = {
            "weight_bytes": (2, 4),
            "gradient_bytes": (2, 4),
            "moment_bytes": (1, 2, 4),
            "master_bytes": (0, 4),
            "adapter_bytes": (0, 2, 4),
            "step_buffer": ("all", "largest", "none"),
        }
        for field, values in allowed.items():
            if (value := getattr(self, field)) not in values:
                raise ValueError(f"{field} must be one of {values}, got {value!r}")
        if self.quantized and not self.adapter_bytes:
            raise ValueError("quantized weights can't be trained: give adapter_bytes as well")

    @property
    def trains_base(self) -> bool:
        return self.adapter_bytes == 0


FULL_FP32 = Recipe("full fp32", 4, 4, 4)
FULL_MIXED = Recipe("full mixed precision", 2, 2, 4, master_bytes=4, step_buffer="largest")
FULL_BF16 = Recipe("full bf16", 2, 2, 2)
ADAM_8BIT = Recipe("8-bit Adam", 2, 2, 1, step_buffer="none")
LORA = Recipe("LoRA", 2, 4, 4, adapter_bytes=4)
LORA_PEFT = Recipe("LoRA, peft's layer", 2, 4, 4, adapter_bytes=4, input_copies=True)
QLORA = Recipe("QLoRA", 2, 4, 4, adapter_bytes=4, quantized=True)
RECIPES = {
    recipe.name: recipe
    for recipe in (FULL_FP32, FULL_MIXED, FULL_BF16, ADAM_8BIT, LORA, LORA_PEFT, QLORA)
}


def nf4_bytes(elements: int) -> int:
    """Bytes of one matrix in NF4 with double quantization.

    Half a byte a weight, one byte for the scale of each block of 64, a float32 for each 256 scales;
    then an offset and two code books.
    """
    scales = -(-elements // 64)
    return -(-elements // 2) + scales + 4 * -(-scales // 256) + 4 + 4 * (16 + 256)


def adam_8bit_bytes(elements: int) -> int:
    """Bytes of both 8-bit moments of one tensor, as bitsandbytes keeps them.

    Below 4,096 elements they stay in float32.
    """
    return 8 * elements if elements < 4096 else 2 * (elements + 4 * -(-elements // 256))


def weights(shape: ModelShape, recipe: Recipe) -> Line:
    """The base model's weights."""
    each = recipe.weight_bytes
    if not recipe.quantized:
        return Line.of(each, shape.parameters)
    packed = shape.layers * sum(nf4_bytes(out * into) for out, into in shape.linears.values())
    linear = shape.linear_parameters
    rest = shape.parameters - linear
    formula = f"{packed / linear:.4f} B × {linear:,} in linears + {each} B × {rest:,}"
    return Line(packed + each * rest, formula)


def trained_tensors(
    shape: ModelShape, recipe: Recipe, rank: int, targets: tuple[str, ...]
) -> list[tuple[int, int]]:
    """(elements, how many) of the trained tensors: the model's own, or each adapter's A and B."""
    if recipe.trains_base:
        return list(shape.tensors.values())
    return [(rank * width, shape.layers) for name in targets for width in shape.linears[name]]


def total(tensors: list[tuple[int, int]]) -> int:
    """Elements of all ``tensors``, each given as (elements, how many)."""
    return sum(elements * count for elements, count in tensors)


def optimizer_states(recipe: Recipe, tensors: list[tuple[int, int]]) -> Line:
    """Adam's two moments of the trained tensors."""
    trained, each = total(tensors), recipe.moment_bytes
    if each == 1:
        states = sum(adam_8bit_bytes(elements) * count for elements, count in tensors)
        formula = f"(1 + 1) B × {trained:,} + 4 B for each 256 of them; small tensors in float32"
        return Line(states, formula)
    return Line(2 * each * trained, f"({each} + {each}) B × {trained:,}")


def step_buffer(recipe: Recipe, tensors: list[tuple[int, int]]) -> Line:
    """What the optimizer allocates during its step and frees again."""
    if recipe.step_buffer == "none":
        return Line(0, "0: updated in place")
    if recipe.step_buffer == "largest":
        largest = max(elements for elements, _ in tensors)
        return Line(8 * largest, f"(4 + 4) B × {largest:,}, the largest tensor")
    return Line.of(recipe.moment_bytes, total(tensors), ": √v of every trained tensor at once")
