"""Records what the library ``adapters`` gives on tiny models, for tests/test_bottleneck.py.

It wants an older transformers, so an environment of its own:

    pip install torch safetensors adapters==1.3.0 transformers==4.57.1
    python tests/data/adapters_library.py
"""

from pathlib import Path

import adapters
import torch
from adapters import DoubleSeqBnConfig, Fuse, SeqBnConfig
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.4)
OURS = (".adapters.a.", ".adapters.b.", "adapter_fusion_layer")


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=32))


def bert():
    return BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=32, num_labels=3))


def fresh(make, state):
    model = make().eval()
    model.load_state_dict(state)
    adapters.init(model)
    return model


@torch.no_grad()
def record(model, prefix: str, ids: torch.Tensor) -> dict:
    """Adapters drawn at random, and the logits."""
    model.eval()
    named = {name: p for name, p in model.named_parameters() if any(part in name for part in OURS)}
    for parameter in named.values():
        parameter.copy_(0.5 * torch.randn(parameter.shape))
    tensors = {f"{prefix}.{name}": parameter.clone() for name, parameter in named.items()}
    return tensors | {f"{prefix}.logits": model(input_ids=ids).logits.clone()}


def main() -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    found = {"input_ids": ids}
    for kind, make in (("llama", llama), ("bert", bert)):
        base = make().eval()
        state = base.state_dict()
        found |= {f"{kind}.base.{name}": tensor.clone() for name, tensor in state.items()}
        found[f"{kind}.logits"] = base(input_ids=ids).logits.detach().clone()
        for name, config in (("houlsby", DoubleSeqBnConfig(reduction_factor=4)), ("pfeiffer", SeqBnConfig(reduction_factor=4))):
            model = fresh(make, state)
            model.add_adapter("a", config=config)
            model.train_adapter("a")
            found |= record(model, f"{kind}.{name}", ids)
        model = fresh(make, state)
        for name in "ab":
            model.add_adapter(name, config=SeqBnConfig(reduction_factor=4))
        model.add_adapter_fusion(Fuse("a", "b"))
        model.train_adapter_fusion(Fuse("a", "b"))
        found |= record(model, f"{kind}.fusion", ids)
    versions = f"adapters {adapters.__version__}, torch {torch.__version__}"
    tensors = {name: tensor.contiguous() for name, tensor in found.items()}
    save_file(tensors, Path(__file__).with_suffix(".safetensors"), metadata={"written by": versions})


if __name__ == "__main__":
    main()
