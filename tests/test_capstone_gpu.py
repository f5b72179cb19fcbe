"""The capstone on a GPU: the same path, and a run that goes on to the same losses up to the order of its kernels' sums."""

import dataclasses

import pytest
import torch
from capstone_helpers import assert_served_as_one_of_many

from course.capstone import base as bases
from course.capstone import data, train
from course.capstone.plan import Plan
from course.capstone.run import run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def losses(settings: Plan, stop: int | None = None) -> list[float]:
    base = bases.load(settings.base, settings.dtype, settings.path("out"))
    rows, digest = data.load(settings, base), bases.weights_hash(base.model)
    model = bases.adapt(base, settings)

    def after(step: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    folder = settings.path("out") / "checkpoints"
    return train.train(model, settings, rows, folder, digest, base.tokenizer.pad_token_id, False, after)[0]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_killed_run_goes_on(tmp_path, method):
    settings = Plan(out=str(tmp_path / "whole"), method=method, steps=8, checkpoint_every=2, ask=8)
    whole = losses(settings)
    broken = dataclasses.replace(settings, out=str(tmp_path / "broken"))
    with pytest.raises(KeyboardInterrupt):
        losses(broken, 5)
    assert losses(broken) == pytest.approx(whole, rel=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_export_answers_alike(tmp_path, dtype):
    settings = Plan(out=str(tmp_path), method="qlora", dtype=dtype, steps=20, ask=16, licence="other", exports=("adapter", "merged"))
    result = run(settings, lambda words: None, False)
    assert result["device"] != "CPU" and result["peak"] > 0
    near = 1e-3 if dtype == "float32" else 0.05
    assert all(abs(each["lost"]["estimate"]) < near for each in result["exports"] if each["lost"])


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_is_served_as_one_of_many(tmp_path, method):
    """The factors come from a file, on the CPU, and the base is on the device."""
    assert_served_as_one_of_many(Plan(out=str(tmp_path), method=method, steps=4, ask=8, new_tokens=4))
