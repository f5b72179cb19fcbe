"""The example of sharded training as a user starts it: alone, and by torchrun with a process that is killed."""

import os
import re
import subprocess
import sys
import time

import psutil
import pytest
import torch

from course import ROOT
from course.lab import models
from examples import train_sharded
from reference.adapter_format import load_adapter
from reference.lora import lora_layers

SEEN = 3  # steps after which a process is killed


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d\S+)", text)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """One process, begun, and gone on with from its state."""
    folder = tmp_path_factory.mktemp("alone")
    said = []
    for steps in (2, 4):
        words = ["--state", str(folder / "state.safetensors"), "--out", str(folder / "adapter"), "--steps", str(steps)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train_sharded", *words])
            patch.setattr("builtins.print", lambda *text, **_: said.append(" ".join(text)))
            patch.setattr(torch.cuda, "is_available", lambda: False)
            train_sharded.main()
    return {"folder": folder, "said": "\n".join(said)}


def test_it_trains_and_goes_on(alone):
    assert re.findall(r"step +(\d)", alone["said"]) == ["1", "2", "3", "4"]
    first, *_, last = losses(alone["said"])
    assert last < first - 0.5


def test_the_library_model_takes_the_adapter(alone):
    model, _ = models.load("tiny", where=torch.device("cpu"))
    load_adapter(model, alone["folder"] / "adapter")
    assert len(list(lora_layers(model))) == 28


def test_a_killed_process_ends_the_others(alone, tmp_path):
    """Two processes have the losses of one, to bfloat16's rounding, until one of them is gone."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["examples/train_sharded.py", "--steps", "100000"]
    said = tmp_path / "said"
    with said.open("w") as file:
        torchrun = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        end = time.time() + 200
        while len(losses(said.read_text())) < SEEN and torchrun.poll() is None and time.time() < end:
            time.sleep(0.2)
        workers = [child for child in psutil.Process(torchrun.pid).children() if "examples/train_sharded.py" in child.cmdline()]
        assert len(workers) == 2, said.read_text()
        workers[1].kill()
        assert torchrun.wait(60) != 0
    finally:
        torchrun.kill()
    told = said.read_text()
    assert losses(told)[:SEEN] == pytest.approx(losses(alone["said"])[:SEEN], rel=2e-3)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert "Signal 9 (SIGKILL)" in told


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="holds a gpt2"):
        train_sharded.llama(tmp_path)
