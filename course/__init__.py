"""The machinery of the course: lab, checks, interview questions, and the ``course`` command."""

import logging
from pathlib import Path

# One thread by default, for the command and the kernels that it starts. Two are faster on an idle machine, but OpenMP's threads wait by
# spinning: as soon as anything else runs they take the cores from those they wait for, and small steps become many times slower. With one
# thread, sums also come out in the same order whatever the number of cores. What the user has set stands.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

ROOT = Path(__file__).resolve().parent.parent  # the checkout; the course is installed in place (pip install -e .)

# On some processors bitsandbytes says, whenever it is imported, that a faster kernel for the CPU could be downloaded. We compare numbers.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
