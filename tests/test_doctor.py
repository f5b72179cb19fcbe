"""What the doctor finds: each probe looks at the machine itself, and says how to mend what is missing. (The command: test_cli.py.)"""

import sys

import pytest

from course import doctor


def found(findings: list[doctor.Finding], what: str) -> doctor.Finding:
    (finding,) = [finding for finding in findings if finding.what == what]
    return finding


@pytest.fixture
def versions(monkeypatch):
    """What is installed, as far as the doctor sees."""
    from importlib import metadata

    real, changed = metadata.version, {}

    def version(name: str) -> str:
        answer = changed.get(name) or real(name)
        if answer == "missing":
            raise metadata.PackageNotFoundError(name)
        return answer

    monkeypatch.setattr(metadata, "version", version)
    return changed


@pytest.mark.parametrize(
    "name, version, state, words",
    [
        ("scipy", "missing", doctor.BROKEN, "scipy is missing"),
        ("torch", "2.0.1", doctor.BROKEN, "torch 2.0.1, needed >=2.11"),
        ("scipy", "99.1", doctor.NOTE, "scipy 99.1 (tested: "),
    ],
)
def test_packages_are_held_against_both_lists(versions, name, version, state, words):
    versions[name] = version
    finding = doctor.packages()
    assert finding.state == state and words in finding.found and finding.mend


def test_a_local_build_of_the_tested_version_is_as_tested(versions):
    versions["torch"] = doctor.tested_versions()["torch"] + "+cu130"
    assert "torch" not in doctor.packages().found


def test_a_wrong_gradient_is_noticed(monkeypatch):
    import torch

    assert doctor.step("cpu").state == doctor.OK
    right = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: right(self, x) + 0.1 * (self.weight.sum() - self.weight.sum().detach()))
    finding = doctor.step("cpu")
    assert finding.state == doctor.BROKEN and "wrong by" in finding.found


def test_a_missing_tiny_model_says_how_to_make_it(monkeypatch, tmp_path):
    from course.lab import models

    monkeypatch.setattr(models, "TINY", tmp_path / "absent")
    finding = doctor.tiny_model("cpu")
    assert finding.state == doctor.BROKEN and "course train-tiny" in finding.mend


def test_bitsandbytes_that_fails_is_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    finding = doctor.four_bits("cpu")
    assert finding.state == doctor.NOTE and "ModuleNotFoundError" in finding.found


def test_little_memory_and_little_disk_are_notes(monkeypatch):
    monkeypatch.setattr(doctor, "MEMORY_BYTES", 1e18)
    monkeypatch.setattr(doctor, "DISK_BYTES", 1e18)
    assert (doctor.memory().state, doctor.disk().state) == (doctor.NOTE, doctor.NOTE)


def test_the_hub_is_asked_only_when_told(monkeypatch):
    import huggingface_hub

    class Hub:
        def model_info(self, name, timeout):
            raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert doctor.hub(ask=False).found == "not asked"
    assert doctor.hub(ask=True).found == "not reached (TimeoutError)"
    Hub.model_info = lambda self, name, timeout: None
    assert doctor.hub(ask=True).found == "reached"


def test_a_probe_that_fails_otherwise_is_a_finding_too(monkeypatch):
    monkeypatch.setattr(doctor, "cpu", lambda: 1 / 0)
    monkeypatch.setattr(doctor, "tiny_model", lambda where: doctor.Finding(f"Tiny model, {where}", "skipped here"))
    finding = found(doctor.examine(), "CPU")
    assert finding.state == doctor.BROKEN and "ZeroDivisionError" in finding.found


@pytest.mark.gpu
def test_doctor_examines_the_gpu():
    findings = doctor.examine()
    assert found(findings, "GPU").state == doctor.OK
    for what in ("Training step, cuda", "Tiny model, cuda"):
        assert found(findings, what).state == doctor.OK
