"""The licenses and the citation are there, whole, and say what pyproject.toml says."""

import datetime
import tomllib

import pytest
import yaml
from packaging.licenses import canonicalize_license_expression

from course import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_license_is_an_expression_and_its_files_exist():
    assert canonicalize_license_expression(PROJECT["license"]) == PROJECT["license"]
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])
    assert "LICENSE" in PROJECT["license-files"]


def test_code_is_under_mit():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n") and "Copyright (c) 2026 The authors of this course" in text


def test_texts_are_under_cc_by_and_the_photograph_is_attributed():
    text = (ROOT / "LICENSE-texts.md").read_text()
    assert "https://creativecommons.org/licenses/by/4.0/" in text
    assert "danielbuechele" in text and "https://creativecommons.org/licenses/by/2.0/" in text


def test_the_citation_has_what_the_format_requires():
    """Version 1.2.0 of the Citation File Format: four keys are required, and strings where YAML would guess a date."""
    assert set(CITATION) >= {"cff-version", "message", "title", "authors"}
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    assert all(author["name"] for author in CITATION["authors"])
    assert datetime.date.fromisoformat(CITATION["date-released"])


@pytest.mark.parametrize(
    "cited, project",
    [
        (CITATION["version"], PROJECT["version"]),
        (CITATION["abstract"], PROJECT["description"]),
        (CITATION["license"], PROJECT["license"].split(" AND ")),
    ],
    ids=["version", "description", "license"],
)
def test_the_citation_agrees_with_pyproject(cited, project):
    assert cited == project
