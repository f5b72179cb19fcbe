"""Instruction tuning of a real language model in four bits: what it follows, what it gets right, and what English it keeps.

    python -m benchmarks.gemma_instructions --model gemma-3-270m --minutes 1.5      # one GPU
    python -m benchmarks.gemma_instructions --smoke                                 # a tiny random model on a CPU: every path, no meaning

The data is made here, offline, from Python's own library: its names, signatures and documentation give instructions whose right answers
are known. They go through the filters of ``reference.self_instruct``. Modules are split: none that the test asks for was seen in training.

Compared, on the same test: the base as it is, the base with one solved example of each kind in its prompt, LoRA over NF4, full fine-tuning,
and LoRA over bitsandbytes' NF4 with peft and the library's model, whose losses stand beside ours step by step. Learning rates are those
that unit 02's search chose for this model. As long as there is time every method is run with one seed more. The base is also tried as a
teacher: what it proposes in the loop of Self-Instruct, and what the filters say to that.
"""

import copy
import dataclasses
import gc
import importlib
import inspect
import json
import random
import re
import statistics
import time
import traceback
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.cli import failed, message, options, rounded
from benchmarks.gemma_lora import InBfloat16, stand_in
from course.lab import chat, models, probes, recorded, seed_everything, text
from course.lab.meters import peak_memory, show_bytes
from course.lab.tables import columns, wrapped
from reference import self_instruct
from reference.instruct import Conversation, Example, pad_batch, prepare, target_loss
from reference.lora import inject_lora, trainable_parameters
from reference.qlora import quantize_linears
from reference.self_instruct import Task

TRAIN = (
    "argparse ast asyncio base64 bisect codecs configparser contextlib copy csv dataclasses datetime decimal email.utils enum fractions "
    "functools gettext glob gzip hashlib hmac html http.client imaplib inspect ipaddress itertools locale logging mailbox math mimetypes "
    "numbers operator os.path pathlib pickle platform poplib pprint queue random re sched secrets selectors shelve shlex shutil socket ssl "
    "statistics string struct subprocess tarfile threading time timeit tokenize traceback types typing unittest urllib.parse uuid warnings "
    "weakref xml.dom.minidom zipfile"
).split()
TEST = (
    "calendar cmath collections difflib fileinput fnmatch heapq io json keyword smtplib tempfile textwrap token urllib.request wave".split()
)

ASK = {  # kind -> ways to ask for it; the last is kept for the test
    "parameters": (
        "List the parameters of this function.",
        "Which parameters does it take? Separate them by commas.",
        "Give me the names of its parameters.",
    ),
    "count": (
        "How many parameters does this function have?",
        "Count the parameters of the function.",
        "Give the number of its parameters.",
    ),
    "json": (
        "Write the name and the module as JSON.",
        "Return JSON with the keys name and module.",
        "As JSON with name and module, please.",
    ),
    "capitals": ("Write this name in capital letters.", "Put the name into upper case.", "Spell the name in capitals."),
    "first": ("What is the first word of this text?", "Copy only the first word of the text.", "Give the first word of it."),
    "type": (
        "Is this the name of a function or of a class?",
        "Function or class? Answer in one word.",
        "Say which it is: function or class.",
    ),
    "summary": ("Say in one line what this does.", "Describe it in a single sentence.", "What is it good for, in one sentence?"),
}
FORM = {  # what an answer of a kind looks like, right or wrong
    "parameters": r"\w+(, \w+)*",
    "count": r"\d+",
    "json": r'\{"name": "\w+", "module": "[\w.]+"\}',
    "capitals": r"[A-Z0-9_]+",
    "first": r"\S+",
    "type": r"function|class",
    "summary": r"[^\n]{8,}\.",
}
SEEDS = [
    Task("Name three rivers of Europe.", "The Danube, the Rhine and the Loire."),
    Task("Is the following review positive or negative?", "positive", "I could not put this book down.", True),
    Task("Rewrite the sentence in the past tense.", "She walked to the market.", "She walks to the market."),
    Task("Explain in one sentence why the sky is blue.", "Air scatters blue light more than red light."),
    Task("Give an antonym of the word.", "cold", "hot"),
    Task("Sort these numbers from small to large.", "2, 5, 9", "9, 2, 5"),
    Task("Write a polite reply that declines an invitation.", "Thank you for asking, but I cannot come on Friday."),
    Task("Which of these words does not belong: apple, pear, hammer?", "hammer", "apple, pear, hammer", True),
]
METHODS = {"LoRA on NF4": 5e-4, "full fine-tuning": 3e-5, "LoRA on NF4, peft + bitsandbytes": 5e-4}


@dataclasses.dataclass(frozen=True)
class Settings:
    each: int = 150  # instructions of each kind to train on
    asked: int = 20  # of each kind in the test
    steps: int = 90
    rows: int = 16
    length: int = 160
    r: int = 16
    seeds: tuple[int, ...] = (0, 1, 2)
    new_tokens: int = 40
    probe_step: int = 1
    proposals: int = 4  # calls of the base as a teacher


QUICK = Settings(6, 1, 2, 2, 900, 2, (0, 1), 4, 60, 2)


# The data


def documented(modules: Sequence[str]) -> list[dict]:
    """Public functions and classes with a signature and a first sentence of documentation."""
    found = []
    for module in modules:
        for name, value in inspect.getmembers(importlib.import_module(module)):
            if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
                continue
            if value.__module__ != module or not (line := (inspect.getdoc(value) or "").split("\n\n")[0].strip()):
                continue
            line = " ".join(line.split())
            try:
                parameters = [p for p in inspect.signature(value).parameters if p != "self"]
            except (ValueError, TypeError):
                continue
            kind = "class" if inspect.isclass(value) else "function"
            found.append({"name": name, "module": module, "line": line, "parameters": parameters, "kind": kind})
    return found


def instance(kind: str, item: dict, instruction: str) -> Task | None:
    """One task of a kind about a documented name; None where it makes none."""
    full, several = f"{item['module']}.{item['name']}", item["parameters"]
    signature = f"def {item['name']}({', '.join(several)})"
    match kind:
        case "parameters" if 1 <= len(several) <= 6 and item["kind"] == "function":
            return Task(instruction, ", ".join(several), signature)
        case "count" if 1 <= len(several) <= 6 and item["kind"] == "function":
            return Task(instruction, str(len(several)), signature)
        case "json":
            return Task(instruction, json.dumps({"name": item["name"], "module": item["module"]}), full)
        case "capitals":
            return Task(instruction, item["name"].upper(), item["name"])
        case "first" if 20 < len(item["line"]) < 160:
            return Task(instruction, item["line"].split()[0], item["line"])
        case "type":
            return Task(instruction, item["kind"], full, True)
        case "summary" if 20 < len(item["line"]) < 160 and item["line"].endswith("."):
            return Task(instruction, item["line"], full)
    return None


def generated(modules: Sequence[str], count: int, seed: int, test: bool) -> tuple[list[tuple[str, Task]], dict[str, int]]:
    """(kind, task) pairs after the filters, and what was dropped for which reason."""
    rng, made, dropped = random.Random(seed), [], {}
    items = documented(modules)
    for kind, ways in ASK.items():
        rng.shuffle(items)
        of_kind: list[Task] = []
        for item in items:
            each = instance(kind, item, ways[-1] if test else rng.choice(ways[:-1]))
            if each is None or len(of_kind) == count:
                continue
            if faults := self_instruct.instruction_faults(each.instruction) + self_instruct.task_faults(each):
                dropped[faults[0]] = dropped.get(faults[0], 0) + 1
            else:
                of_kind.append(each)
        made += [(kind, each) for each in of_kind]
    twice = {i for _, i in self_instruct.copies([f"{each.input} {kind} {each.output}" for kind, each in made])}
    dropped["near-copy of another"] = len(twice)
    return [pair for i, pair in enumerate(made) if i not in twice], dropped


def plain(task: Task, answered: bool = False) -> str:
    """A prompt for a model that knows no template."""
    return f"Instruction: {task.instruction}\nInput: {task.input}\nAnswer:" + (f" {task.output}\n\n" if answered else "")


class Benchmark:
    def __init__(self, model: nn.Module, tokenizer, settings: Settings, minutes: float):
        self.base, self.tokenizer, self.settings = model.eval().requires_grad_(False), tokenizer, settings
        self.where, self.deadline = next(model.parameters()).device, time.monotonic() + 60 * minutes
        s = settings
        self.pairs, self.dropped = generated(TRAIN, s.each, 0, False)
        self.asked, _ = generated(TEST, s.asked, 1, True)
        conversations = [Conversation(n, tuple(task.messages)) for n, (_, task) in enumerate(self.pairs, 1)]
        self.rows, self.report = prepare(tokenizer, conversations, s.length, on_error="drop")
        self.facts, self.sentences = probes.cloze_facts()[:: s.probe_step], probes.minimal_pairs()[:: s.probe_step]
        self.passages = list(text.prose_documents("passages").values())[:: s.probe_step]
        self.runs: list[dict] = []
        self.longest = 0.0

    # What is measured

    @torch.no_grad()
    def said(self, model: nn.Module, prompts: Sequence[str], stop: str | None = None, new: int | None = None) -> list[tuple[str, bool]]:
        """Greedy answers in batches padded on the left, and whether each came to an end."""
        side, self.tokenizer.padding_side = self.tokenizer.padding_side, "left"
        end = self.tokenizer.eos_token_id
        found = []
        for start in range(0, len(prompts), 70):
            part = list(prompts[start : start + 70])
            given = self.tokenizer(part, add_special_tokens=False, padding=True, return_tensors="pt").to(self.where)
            out = model.generate(
                input_ids=given.input_ids,
                attention_mask=given.attention_mask,
                max_new_tokens=new or self.settings.new_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            for row in out[:, given.input_ids.shape[1] :]:
                ended = bool((row == end).any())
                words = self.tokenizer.decode(row[: (row == end).nonzero()[0, 0]] if ended else row, skip_special_tokens=True)
                if stop and stop in words:
                    words, ended = words.split(stop)[0], True
                found.append((words.strip(), ended))
        self.tokenizer.padding_side = side
        return found

    def followed(self, said: Sequence[tuple[str, bool]]) -> dict:
        """Shares by kind: "form", "right" and "stops"; of summaries, which have no one right answer, ROUGE-L in the place of right."""
        kinds: dict[str, dict[str, list[float]]] = {}
        for (words, ended), (kind, task) in zip(said, self.asked, strict=True):
            right = self_instruct.rouge_l(words, task.output) if kind == "summary" else float(words == task.output)
            row = kinds.setdefault(kind, {"form": [], "right": [], "stops": []})
            row["form"].append(float(bool(re.fullmatch(FORM[kind], words))))
            row["right"].append(right)
            row["stops"].append(float(ended))
        by_kind = {kind: {name: sum(v) / len(v) for name, v in row.items()} for kind, row in kinds.items()}
        all_kinds = {name: sum(row[name] for row in by_kind.values()) / len(by_kind) for name in ("form", "right", "stops")}
        return {"all": all_kinds, "by_kind": by_kind, "questions": len(said)}

    def english(self, model: nn.Module) -> dict:
        tokens = 8192
        cloze = probes.cloze_accuracy(model, self.tokenizer, self.facts, batch_tokens=tokens)
        pairs = probes.minimal_pair_accuracy(model, self.tokenizer, self.sentences, batch_tokens=tokens)
        prose = probes.perplexity(model, self.tokenizer, self.passages, batch_tokens=tokens).nats_per_token
        return {"cloze": cloze.accuracy, "pairs": pairs.accuracy, "passages": prose}

    def chat_prompts(self) -> list[str]:
        apply = self.tokenizer.apply_chat_template
        return [apply(task.messages[:1], tokenize=False, add_generation_prompt=True) for _, task in self.asked]

    def prompted(self, shots: int) -> dict:
        """The base with ``shots`` solved examples of each kind in front of the question, none of them of the test's modules."""
        bos = self.tokenizer.bos_token or ""
        shown = [next(task for k, task in self.pairs[i:] if k == kind) for i in range(shots) for kind in ASK]
        front = bos + "".join(plain(task, True) for task in shown)
        said = self.said(self.base, [front + plain(task) for _, task in self.asked], "\n")
        return {"method": f"base, {len(shown)} examples in the prompt", "followed": self.followed(said), "samples": self.samples(said)}

    def samples(self, said: Sequence[tuple[str, bool]]) -> list[dict]:
        """Two of each kind."""
        chosen = [i for kind in ASK for i in [j for j, (k, _) in enumerate(self.asked) if k == kind][:2]]
        tasks = [(i, *self.asked[i]) for i in chosen]
        return [
            {"kind": kind, "asked": task.messages[0]["content"], "right": task.output, "said": said[i][0][:160]} for i, kind, task in tasks
        ]

    # Runs

    def adapted(self, method: str) -> nn.Module:
        """A copy of the base, ready to train: bfloat16 under an adapter, float32 in full."""
        s = self.settings
        model = copy.deepcopy(self.base)
        if method == "full fine-tuning":
            return model.requires_grad_(True)
        model = model.to(torch.bfloat16)
        if method == "LoRA on NF4":
            quantize_linears(model)
            inject_lora(model, s.r, 2 * s.r)
            return model
        import bitsandbytes
        from peft import LoraConfig, get_peft_model

        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear and name != "lm_head":
                four = bitsandbytes.nn.Linear4bit(
                    layer.in_features, layer.out_features, False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
                )
                four.weight = bitsandbytes.nn.Params4bit(
                    layer.weight.detach().cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, four.to(self.where))
        config = LoraConfig(r=s.r, lora_alpha=2 * s.r, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, config)

    def train(self, model: nn.Module, lr: float, seed: int) -> list[float]:
        s, losses = self.settings, []
        trained = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=self.where.type == "cuda")
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed)).tolist()
        wrapped = InBfloat16(model).train()
        for step in range(s.steps):
            chosen: list[Example] = [self.rows[order[i % len(order)]] for i in range(step * s.rows, (step + 1) * s.rows)]
            batch = {key: value.to(self.where) for key, value in pad_batch(chosen, self.tokenizer.pad_token_id).items()}
            for group in adam.param_groups:
                group["lr"] = lr * min((step + 1) / 5, 1 - 0.9 * step / s.steps)
            loss: Tensor = target_loss(wrapped(batch["input_ids"]).logits, batch["labels"])  # padding is on the right: nothing sees it
            adam.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            adam.step()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    def run(self, method: str, seed: int) -> dict:
        began, lr = time.monotonic(), METHODS[method]
        seed_everything(seed)
        gc.collect()
        with peak_memory(self.where) as peak:
            model = self.adapted(method)
            count = trainable_parameters(model)[0]
            started = time.monotonic()
            losses = self.train(model, lr, seed)
            seconds = time.monotonic() - started
        model.eval()
        row = {
            "method": method,
            "seed": seed,
            "lr": lr,
            "parameters": count,
            "seconds": seconds,
            "peak_bytes": peak.bytes,
            "losses": losses,
        }
        said = self.said(model, self.chat_prompts())
        row |= {"followed": self.followed(said), "english": self.english(model)}
        if seed == self.settings.seeds[0]:
            row["samples"] = self.samples(said)
        self.longest = max(self.longest, time.monotonic() - began)
        return row

    def as_teacher(self) -> dict:
        """What the loop of Self-Instruct makes of the base's words."""

        def teacher(prompt: str) -> str:
            return self.said(self.base, [(self.tokenizer.bos_token or "") + prompt], "\n\n", new=60)[0][0]

        grown = self_instruct.bootstrap(SEEDS, teacher, 20, most_calls=self.settings.proposals)
        kept = [dataclasses.asdict(task) for task in grown.new[:6]]
        return {"calls": grown.asked, "kept": len(grown.new), "counts": grown.counts, "tasks": kept, "dropped": grown.dropped[:8]}

    def attempt(self, what: Callable[[], dict], label: str) -> dict:
        """A part that fails must not take the others with it."""
        try:
            return what()
        except Exception as error:
            traceback.print_exc()
            return {"method": label, "error": message(error)}

    def execute(self, save: Callable[[dict], None], name: str) -> dict:
        s = self.settings
        result = {
            "model": name,
            "text": text.origin(),
            "settings": dataclasses.asdict(s),
            "instructions": {
                "kept": len(self.pairs),
                "dropped": self.dropped,
                "rows": self.report.kept,
                "rows_dropped": self.report.counts,
            },
            "units": {"losses, passages": "nats per token", "form, right, stops": "share of the test's instructions"},
            "prompted": [],
            "runs": self.runs,
        }
        result["base"] = self.attempt(lambda: self.english(self.base), "base")
        for shots in (0, 1):
            result["prompted"].append(self.attempt(lambda shots=shots: self.prompted(shots), f"{shots} shots"))
        plan = [(method, seed) for seed in s.seeds for method in METHODS if seed == s.seeds[0] or "peft" not in method]
        for i, (method, seed) in enumerate(plan):
            if time.monotonic() + 1.15 * self.longest > self.deadline:
                result["stopped_early"] = True
                break
            row = self.attempt(lambda method=method, seed=seed: self.run(method, seed), method)
            self.runs.append(row)
            print(line(row), flush=True)
            if i == len(METHODS) - 1:
                result["teacher"] = self.attempt(self.as_teacher, "teacher")
            save(rounded(result))
        return rounded(result)


def line(row: dict) -> str:
    if "error" in row:
        return f"{row['method']:<34} {row['error']}"
    shares = row["followed"]["all"]
    words = f"{row['method']:<34} form {shares['form']:.2f}  right {shares['right']:.2f}  stops {shares['stops']:.2f}"
    if "english" in row:
        e = row["english"]
        words += f"  loss {row['losses'][0]:.2f} → {row['losses'][-1]:.2f}"
        words += f"  cloze {e['cloze']:.3f}  pairs {e['pairs']:.3f}  prose {e['passages']:.3f}"
        words += f"  {row['seconds']:.1f} s  {row['peak_bytes'] / 1e9:.2f} GB"
    return words


def table(result: dict) -> str:
    shares, english = ("form", "right", "stops"), ("cloze", "pairs", "passages")
    good = [row for row in (*result["prompted"], *result["runs"]) if "error" not in row]
    rows = [("base", *[""] * 3, *(result["base"][key] for key in english), "", "")]
    for method in dict.fromkeys(row["method"] for row in good):
        runs = [row for row in good if row["method"] == method]
        followed = (statistics.fmean(row["followed"]["all"][key] for row in runs) for key in shares)
        if "english" not in runs[0]:  # only asked
            rows.append((method, *followed, *[""] * 5))
            continue
        kept = (statistics.fmean(row["english"][key] for row in runs) for key in english)
        seconds = f"{statistics.fmean(row['seconds'] for row in runs):.1f}"
        rows.append((method, *followed, *kept, seconds, show_bytes(max(row["peak_bytes"] for row in runs))))
    names = {row[0]: row[0].replace("bitsandbytes", "bnb").replace(" in the prompt", "") for row in rows}
    lines = [columns(("", *shares, "cloze", "pairs", "prose", "s", "peak"), [(names[row[0]], *row[1:]) for row in rows])]
    lines += [failed(row["method"], row["error"]) for row in (*result["prompted"], *result["runs"]) if "error" in row]
    if "kept" in (teacher := result.get("teacher", {})):
        counts = ", ".join(f"{why}: {count}" for why, count in teacher["counts"].items())
        lines.append(wrapped(f"as a teacher, in {teacher['calls']} calls: {teacher['kept']} tasks kept; dropped: {counts or 'none'}"))
    about = "form, right, stops: shares of the instructions; means of the seeds; prose in nats per token; bnb: bitsandbytes"
    return "\n".join([*lines, wrapped(about)])


def main() -> None:
    given = options(
        "gemma_instructions", __doc__, model={"default": "gemma-3-270m"}, minutes={"type": float, "default": 3.0, "help": "after loading"}
    )
    seed_everything(0)
    if given.smoke:
        (model, tokenizer), settings = stand_in(), QUICK
        model.config.intermediate_size = 128  # bitsandbytes wants whole blocks on a CPU
        model = type(model)(model.config)
    else:
        model, tokenizer = models.load(given.model, where=given.device)
        settings = Settings()
    tokenizer.chat_template = chat.template("Gemma")
    if "<end_of_turn>" in tokenizer.get_vocab():
        tokenizer.eos_token = "<end_of_turn>"
    else:  # of bytes
        tokenizer.chat_template = tokenizer.chat_template.replace("<end_of_turn>", "<eos>")
    benchmark = Benchmark(model, tokenizer, settings, given.minutes)

    def save(result: dict) -> None:
        recorded.save("gemma_instructions", result, given.out, given.device)

    name = "a tiny random model" if given.smoke else given.model.rpartition("/")[2]
    result = benchmark.execute(save, name)
    print(table(result))
    save(result)


if __name__ == "__main__":
    main()
