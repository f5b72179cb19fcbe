"""For classes: nbgrader on the course's own solutions, one assignment a unit, in the folder classroom/.

nbgrader generate_assignment 02_lora
nbgrader autograde 02_lora
nbgrader export

Submissions go to classroom/submitted/STUDENT/02_lora/02_lora.ipynb. The layout that nbgrader needs is written from solutions/ by each
command.
"""

import os
import sys
from pathlib import Path

from course import ROOT, build

os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader calls alembic by name
c = get_config()  # noqa: F821 (nbgrader provides it)
if "nbgrader" in sys.argv[0]:  # JupyterLab reads this file too, for learners
    build.lay_out_classroom(ROOT / "classroom")
c.CourseDirectory.root = str(ROOT / "classroom")
c.CourseDirectory.course_id = "peft-course"
c.ClearSolutions.code_stub = {"python": build.STUB}
c.Execute.timeout = 300
