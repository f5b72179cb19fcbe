"""Tests in whose process Triton must interpret kernels: the judges of unit 13 do, and a process interprets all or compiles all.

With a GPU the other tests have them compiled. Then these are skipped, and tests/test_interpreted.py runs them in a process without one.
"""

import pytest
import torch

COMPILES = torch.cuda.is_available()
interpreted = pytest.mark.skipif(COMPILES, reason="kernels are compiled in this process: tests/test_interpreted.py runs this in another")
