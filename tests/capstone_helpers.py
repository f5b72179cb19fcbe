"""What the tests of the capstone share."""

import dataclasses

import pytest
import torch

from course.capstone import base as bases
from course.capstone import data, export, train
from course.capstone.plan import Plan


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Bit for bit is promised on a CPU: a GPU that is here is not seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def assert_served_as_one_of_many(settings: Plan) -> None:
    """A short run over linear layers only: the server of many adapters answers as what was trained, and the base alone does not."""
    base = dataclasses.replace(bases.load(settings.base, settings.dtype, settings.path("out")), new=())  # no rows of the embedding train
    rows, model = data.load(settings, base), bases.adapt(base, settings)
    train.train(model, settings, rows, settings.path("out") / "checkpoints", "base", base.tokenizer.pad_token_id, False)
    wanted = export.trained(model, base, rows, settings.new_tokens)
    folder = export.write_adapter(model, base, settings.path("out") / "adapter", {}, "card")
    served = export.check_served(folder, base, settings, rows, wanted)
    assert served.changed == 0 and served.logits < 1e-3 and served.lost.high < 1e-4
    alone = export.load_base(base.name, settings.method, settings.dtype)
    plain = export.compare("none", folder, alone, base, rows, settings.new_tokens, wanted)
    assert plain.logits > 0.1  # the adapter does something
