"""Pre-train the tiny model on the small world's general domain; the result ships with the course, and this makes it again.

    course train-tiny

takes a few minutes on two cores. Saved in Hugging Face's own format, so plain ``AutoModelForCausalLM.from_pretrained`` loads it.
"""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from course.lab import seed_everything
from course.lab.training import above_floor, cross_entropy, fact_accuracy, train, warmup_cosine
from course.lab.world import World

FOLDER = Path(__file__).parent / "data" / "tiny"
ROWS, LENGTH, STEPS, LR = 32, 48, 2000, 4e-3


def tiny_config(world: World) -> LlamaConfig:
    """A Llama of about a million parameters: every feature of the large ones (grouped queries, gated MLP, rotary positions), small."""
    return LlamaConfig(
        vocab_size=len(world.vocabulary),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=world.ids["<pad>"],
        bos_token_id=world.ids["<bos>"],
        eos_token_id=[world.ids["."], world.ids[";"]],  # a sentence is a whole answer
    )


def main(folder: Path = FOLDER, steps: int = STEPS, seed: int = 0) -> None:
    """Train from nothing, save to ``folder``, and print how far from the floor it came."""
    world = World()
    seed_everything(seed)
    model = LlamaForCausalLM(tiny_config(world))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of {ROWS} × {LENGTH} tokens")
    history = train(model, lambda step: world.sample("general", ROWS, LENGTH, seed=step), steps, LR, schedule=warmup_cosine())
    held_out = world.sample("general", 256, LENGTH, seed=10**9)  # seeds of the training batches are below `steps`
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": steps * ROWS * LENGTH,
        "seconds": round(history.seconds),
        "threads": torch.get_num_threads(),
        "loss": round(cross_entropy(model, held_out), 4),
        "above_floor": round(above_floor(model, world, "general", rows=256, length=LENGTH, seed=10**9), 4),
        "fact_accuracy": round(fact_accuracy(model, world), 4),
    }
    folder = Path(folder)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    world.tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(f"{name:>14}: {value}" for name, value in report.items()))


if __name__ == "__main__":
    main()
