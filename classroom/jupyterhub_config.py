"""One machine for a room: a JupyterLab for each learner, with a copy of the course of their own.

    export COURSE_HUB_PASSWORD=…            # that you tell the room; 8 characters or more
    export COURSE_HUB_INSTRUCTOR=…          # your own, for the name "instructor"; 32 characters or more
    jupyterhub -f classroom/jupyterhub_config.py --port 8000

It takes `pip install jupyterhub` in the course's environment, and configurable-http-proxy on the path. Learners choose a name and give the
room's password. Their copies are in classroom/hub/homes/NAME/course and are never replaced; `git pull` in one of them updates it.

All servers run under the account that starts the hub ("simple" spawner): right for a workshop among people who trust each other, and nothing
keeps one learner's code from another's files. For points that matter take accounts of the system (LocalProcessSpawner) or containers.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from course import ENVIRONMENT, ROOT

FOLDER = Path(os.environ.get("COURSE_HUB_FOLDER", ROOT / "classroom" / "hub")).resolve()
INSTRUCTOR = "instructor"
FRAMES = "{'headers': {'Content-Security-Policy': \"frame-ancestors 'self'\"}}"  # JupyterHub forbids frames, and Formgrader is shown in one


def own_copy(name: str) -> Path:
    """The learner's copy of the course, made once. The instructor works in the course itself, where Formgrader finds the classroom."""
    if name == INSTRUCTOR:
        return ROOT
    copy = FOLDER / "homes" / name / "course"
    if not copy.exists():
        beside = copy.with_name("being copied")
        shutil.rmtree(beside, ignore_errors=True)
        beside.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(beside)], check=True)
        beside.rename(copy)  # at once: a copy is whole or not there
    return copy


def before_start(spawner) -> None:
    copy = own_copy(spawner.user.name)
    spawner.notebook_dir = str(copy)
    settings = [str(copy / "course" / "jupyter")]  # as in `make lab`: lessons open as they read, nobody is asked about news
    if spawner.user.name == INSTRUCTOR:
        settings.append(str(copy))  # nbgrader_config.py: servers start in folders of their own, where nbgrader would not find it
    spawner.environment = {
        **ENVIRONMENT,
        "PYTHONPATH": str(copy),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "JUPYTER_CONFIG_PATH": os.pathsep.join(settings),
    }
    spawner.args = ["--allow-root"] * (os.geteuid() == 0)  # in a container
    if spawner.user.name == INSTRUCTOR:
        spawner.args = [*spawner.args, f"--ServerApp.tornado_settings={FRAMES}"]


FOLDER.mkdir(parents=True, exist_ok=True)
c = get_config()  # noqa: F821 (JupyterHub provides it)
c.JupyterHub.authenticator_class = "shared-password"
c.SharedPasswordAuthenticator.user_password = os.environ["COURSE_HUB_PASSWORD"]
c.SharedPasswordAuthenticator.admin_password = os.environ["COURSE_HUB_INSTRUCTOR"]
c.Authenticator.allow_all = True
c.Authenticator.admin_users = {INSTRUCTOR}
c.Authenticator.username_pattern = r"[a-z][a-z0-9_-]{0,30}"  # it becomes the name of a folder

c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = str(FOLDER / "homes" / "{username}")
c.Spawner.cmd = [sys.executable, "-m", "jupyterhub.singleuser"]
c.Spawner.default_url = "/lab/tree/notebooks/00_memory_budget.ipynb"
c.Spawner.pre_spawn_hook = before_start
c.Spawner.start_timeout = c.Spawner.http_timeout = 300  # thirty at once on two cores take their time
c.JupyterHub.concurrent_spawn_limit = 100
c.JupyterHub.cleanup_servers = True

c.JupyterHub.db_url = f"sqlite:///{FOLDER / 'jupyterhub.sqlite'}"
c.JupyterHub.cookie_secret_file = str(FOLDER / "cookie_secret")
c.ConfigurableHTTPProxy.pid_file = str(FOLDER / "proxy.pid")
