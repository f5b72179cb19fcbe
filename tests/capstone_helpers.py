"""What the tests of the capstone share."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Bit for bit is promised on a CPU: a GPU that is here is not seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
