"""What containers, Binder and the job for newest versions are made of agrees with the one list of dependencies; nothing is built here."""

import json
import os
import re
import shutil
import subprocess
import tomllib

import pytest
import yaml

from course import ENVIRONMENT, ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
OLDEST = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: (RUN, what), with continued lines joined."""
    lines = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in lines.splitlines() if line.strip())]


def test_the_dockerfile_keeps_hadolints_rules():
    said = instructions()
    assert said[0] == ("FROM", "python:3.12-slim-bookworm"), "DL3006, DL3007: a tag, and not latest"
    runs = [what for name, what in said if name == "RUN"]
    for what in runs:
        assert "sudo" not in what and not re.match(r"cd ", what), "DL3003, DL3004"
        if "apt-get install" in what:
            assert "apt-get update" in what and "--no-install-recommends" in what and "rm -rf /var/lib/apt/lists" in what, "DL3009, DL3015"
            assert "--yes" in what, "DL3014"
        if "pip install" in what:
            assert "--no-cache-dir" in what and "-c constraints.txt" in what, "DL3042, DL3013"
    assert [what for name, what in said if name == "USER"] == ["1000"], "DL3002, DL3066: the last user is not root, and a number"
    assert [name for name, _ in said].count("CMD") == 1, "DL4003"
    assert dict(said)["CMD"].startswith("["), "DL3025"
    assert not {"MAINTAINER", "ADD"} & {name for name, _ in said}, "DL4000, DL3020"


@pytest.mark.skipif(not shutil.which("hadolint"), reason="there is no hadolint here")
def test_hadolint_agrees():
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_scripts_are_shell_that_can_be_parsed():
    for name in ("postBuild", "start"):
        path = ROOT / "binder" / name
        assert os.access(path, os.X_OK) and path.read_text().startswith("#!/bin/bash\n")
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    for name, what in instructions():
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", what], check=False).returncode == 0, what


def test_every_environment_counts_threads_as_the_course_does():
    for name, value in ENVIRONMENT.items():
        assert f"{name}={value}" in DOCKERFILE and f"{name}={value}" in (ROOT / "binder" / "start").read_text()


def test_binder_takes_the_same_python_and_constraints():
    binder = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text())
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert binder["dependencies"] == [f"python={OLDEST}", "pip"] == conda["dependencies"][:2]
    assert binder["channels"] == conda["channels"] == ["conda-forge", "nodefaults"]
    assert "-c constraints.txt -e ." in (ROOT / "binder" / "postBuild").read_text()


def test_the_devcontainer_is_the_dockerfile():
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / settings["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    said = dict(instructions())
    assert settings["workspaceFolder"] == said["WORKDIR"]
    assert f"useradd --create-home --uid {said['USER']} {settings['remoteUser']}" in DOCKERFILE
    assert settings["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"] == "/home/learner/.venv/bin/python"


def test_the_image_leaves_out_what_is_local_and_keeps_the_hub():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".venv", "work", "site", "build", "classroom/*", "!classroom/jupyterhub_config.py"} <= set(ignored)


def test_newest_versions_are_tested_without_constraints_and_on_the_oldest_python():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "newest.yml").read_text())["jobs"]["newest"]
    assert job["strategy"]["matrix"]["python"][0] == OLDEST
    commands = "\n".join(step.get("run", "") for step in job["steps"])
    order = [commands.index(each) for each in (": > constraints.txt", "make setup", "git checkout constraints.txt", "make test")]
    assert order == sorted(order)


# the hub


def hub_settings(tmp_path, monkeypatch):
    from traitlets.config import Config

    config = Config()
    monkeypatch.setenv("COURSE_HUB_FOLDER", str(tmp_path / "hub"))
    monkeypatch.setenv("COURSE_HUB_PASSWORD", "for the room")
    monkeypatch.setenv("COURSE_HUB_INSTRUCTOR", "x" * 32)
    path = ROOT / "classroom" / "jupyterhub_config.py"
    names = {"get_config": lambda: config}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    return config, names


class Spawner:
    class user:
        name = "ada"


def test_a_learner_of_the_hub_has_a_copy_that_is_never_replaced(tmp_path, monkeypatch):
    config, _ = hub_settings(tmp_path, monkeypatch)
    copies = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: copies.append(command) or os.makedirs(command[-1]))
    config.Spawner.pre_spawn_hook(spawner := Spawner())
    assert spawner.notebook_dir == str(tmp_path / "hub" / "homes" / "ada" / "course") == spawner.environment["PYTHONPATH"]
    assert "tornado_settings" not in str(spawner.args)
    config.Spawner.pre_spawn_hook(Spawner())
    assert len(copies) == 1, "made once"
    assert re.fullmatch(config.Authenticator.username_pattern, "ada") and not re.fullmatch(config.Authenticator.username_pattern, "../ada")


def test_only_the_instructor_is_shown_frames_and_works_in_the_course(tmp_path, monkeypatch):
    config, names = hub_settings(tmp_path, monkeypatch)
    teacher = Spawner()
    teacher.user = type("User", (), {"name": names["INSTRUCTOR"]})
    config.Spawner.pre_spawn_hook(teacher)
    assert teacher.notebook_dir == str(ROOT) and "frame-ancestors 'self'" in teacher.args[-1]
    assert config.Authenticator.admin_users == {names["INSTRUCTOR"]}


def test_the_load_of_the_hub_runs_a_check_and_says_what_failed():
    from benchmarks import hub_load

    assert hub_load.cells()[-1] == "check.forward(LoRALinear)" and "def forward" in hub_load.cells()[-2]
    row = {"server_seconds": 10.0, "notebook_seconds": 11.0, "check_seconds": 20.0, "gigabytes": 0.3, "failed": None}
    said = hub_load.table({"learners": 3, "cores": 2, "load_before": 0.1, "rows": [row, row | {"check_seconds": 40.0}, {"failed": "no"}]})
    assert "failures: 1" in said and "median    30.00 s, most    40.00 s" in said and said.endswith("no")
