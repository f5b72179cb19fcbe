"""The question bank covers what the notes ask, checks what they state, and each kind of question has what it needs."""

import re

import pytest
import yaml
from typer.testing import CliRunner

from course import ROOT, interview
from course.casebook import cases
from course.cli import app
from course.notebooks import read
from course.units import find, units

BANK = interview.entries()  # as written: that their claims hold is tested with the claims
SOURCES = {source for entry in BANK for source in entry["sources"]}

# Every question, challenge, scenario and checklist of the five notes, by their own numbering
NOTES = {
    "S0": ["Q1", "Q2", "Q3", "Q4", "C1", "C2", "C3", "Design", "Checklist"],
    "S1": [str(number) for number in range(1, 21)],
    "S2": ["1", "2.1", "2.2", "2.3", "C1", "C2", "Q1", "Q2", "Q3"],
    "S3": ["Q4", "Q14", "Q35", "table", "Code", "Tips"],
    "S4": [str(number) for number in range(1, 21)],
}

# What the notes state loosely -> words of the statement that the bank checks
LOOSE = {
    "double quantization saves half a bit": "about 0.5 bits per parameter",
    "NF4's bins hold equal mass": "bins hold equal shares",
    "NF4 is optimal": "optimal 4-bit code",
    "NF4 has a lower error": "lower quantization error than INT4 and FP4",
    "weights are the smallest part": "weights are the smallest part",
    "70B in full takes 600 GB": "70B needs about 600 GB",
    "10,000 times fewer parameters": "10,000 times fewer",
    "0.1 % of the parameters train": "about 0.1 % of the parameters",
    "memory falls 3 to 4 times": "cuts memory 3 to 4 times",
    "LoRA can't overfit": "cannot overfit",
    "ranks above 64 bring nothing": "Ranks above 64",
    "a high rank costs memory": "A high rank costs memory",
    "α = 2r": "α should be 2r",
    "A·B against B·A": "are different methods",
    "merging is free": "Merging is free and exact",
    "a QLoRA adapter merges like any other": "QLoRA adapter merges",
    "√N less memory": "by √N",
    "5 times the memory, 20 % slower": "5 times the memory",
    "LoRA and activations": "does not reduce activation memory",
    "paged optimizers": "paged optimizer helps",
    "70B on a 48 GB card": "one 48 GB card",
    "70B on a consumer card": "consumer GPU",
    "14 against 4, 140 against 35 GB": "14 GB with LoRA and 4 GB",
    "knowledge is preserved exactly": "preserved exactly",
    "EWC without ½, any Fisher": "EWC adds",
    "10 % replay": "10 % of old data",
    "unmerged adapters cost slightly": "only slightly",
    "adapters of 100 MB": "about 100 MB",
    "LoRA outperforms soft prompts": "outperforms soft prompts",
    "prefix against prompt tuning": "Prefix tuning is more powerful",
    "the shares of PEFT methods": "IA³ below 0.01 %",
    "q and v": "Query and value",
    "r = 8 is enough": "r = 8 is often enough",
    "the 2 % rule": "more than 2 %",
    "LoRA matches full fine-tuning": "LoRA matches full",
}


@pytest.mark.parametrize("source", [f"{note}.{item}" for note, items in NOTES.items() for item in items])
def test_every_question_of_the_notes_is_answered(source):
    assert source in SOURCES, f"no question of the bank comes from {source}"


def test_no_question_comes_from_what_is_not_there():
    known = {f"{note}.{item}" for note, items in NOTES.items() for item in items}
    assert known >= SOURCES


@pytest.mark.parametrize("words", LOOSE.values(), ids=LOOSE.keys())
def test_every_loose_statement_is_checked(words):
    statements = [statement for entry in BANK for statement in entry.get("statements", [])]
    found = [statement for statement in statements if words.casefold() in statement["said"].casefold()]
    assert len(found) == 1, f"{len(found)} statements of the bank say {words!r}"
    (statement,) = found
    assert interview.placeholders(statement["found"]) | set(statement.get("evidence", [])), "it states no number and names no claim"
    assert statement["holds"] in interview.VERDICTS


def test_the_bank_is_large_and_mixed():
    assert len(BANK) >= 190
    least = {"concept": 90, "derivation": 15, "estimate": 20, "debugging": 25, "coding": 10, "design": 6}
    for kind, count in least.items():
        assert sum(entry["kind"] == kind for entry in BANK) >= count, kind
    for role in interview.ROLES:
        assert sum(role in entry["role"] for entry in BANK) >= 50, role
    shares = {frequency: sum(entry["frequency"] == frequency for entry in BANK) / len(BANK) for frequency in interview.FREQUENCIES}
    assert 0.2 < shares["often"] < 0.5 and shares["rare"] > 0.1, f"{shares}: if all is asked often, nothing is"


@pytest.mark.parametrize("entry", [entry for entry in BANK if entry["kind"] == "design"], ids=lambda entry: entry["id"])
def test_designs_have_a_rubric_and_sums(entry):
    assert 4 <= len(entry["rubric"]) <= 10 and all(len(line.split()) >= 4 for line in entry["rubric"])
    assert entry["claims"], "a design states sizes"
    assert entry["minutes"] >= 5 and entry["follow_ups"]


@pytest.mark.parametrize("entry", [entry for entry in BANK if entry["kind"] == "coding"], ids=lambda entry: entry["id"])
def test_coding_questions_point_at_an_exercise(entry):
    number, _, place = entry["case"].partition(".")
    assert number == entry["unit"]
    headings = [cell.source for cell in read(find(number).exercise).cells if cell.cell_type == "markdown"]
    assert any(re.search(rf"^## {place}\. ", text, re.M) for text in headings), f"unit {number} has no exercise {place}"


def test_debugging_questions_point_at_cases_and_every_case_is_asked_for():
    named = {entry["case"] for entry in BANK if entry.get("case") and entry["kind"] == "debugging"}
    assert named == {case.name for case in cases()}


def test_cases_belong_to_debugging_and_coding_alone():
    assert {entry["kind"] for entry in BANK if entry.get("case")} == {"debugging", "coding"}
    assert {entry["kind"] for entry in BANK if entry.get("rubric")} == {"design"}


def test_the_page_on_interviews_is_short():
    text = re.sub(r"<!--.*?-->", "", (ROOT / "lessons" / "15_interview.md").read_text(encoding="utf-8"))
    assert len(text.split()) <= 1000
    assert "15" in {unit.number for unit in units()}


# statements: how they are read, and the command that shows them


def entry_with(statement: str) -> dict:
    text = f"""
id: small
question: Why?
kind: concept
frequency: often
role: [applied]
difficulty: 1
minutes: 1
unit: "00"
sources: []
short: So.
deep: "So it is: {{bits:.1f}}."
follow_ups: ["And? (No.)"]
wrong: {{answer: A., why: B.}}
claims: {{bits: double_quantization:saved_bits, sure: interview:gradients_are_products}}
statements: [{statement}]
"""
    return yaml.safe_load(text)


def test_a_statement_has_its_numbers_and_its_evidence():
    question = interview._read(entry_with("{said: Half a bit., found: '{bits:.2f} bits.', holds: 'no', evidence: [sure]}"), "x")
    assert question.statements == (
        interview.Statement("Half a bit.", "0.37 bits.", "no", ("double_quantization:saved_bits", "interview:gradients_are_products")),
    )


@pytest.mark.parametrize(
    "statement",
    [
        "{said: Half a bit., found: Less., holds: 'no'}",
        "{said: Half a bit., found: '{bits:.2f} bits.', holds: never}",
        "{said: Half a bit., found: Less., holds: 'no', evidence: [absent]}",
    ],
)
def test_a_statement_without_evidence_is_refused(statement):
    with pytest.raises(ValueError, match=r"'Half a bit\.' needs a number or a named claim"):
        interview._read(entry_with(statement), "x")


def test_a_unit_without_statements_is_said_instead_of_an_empty_table():
    result = CliRunner().invoke(app, ["claims", "--unit", "01"], env={"COLUMNS": "150"})
    assert result.exit_code == 0
    assert "unit 01 examine no such statement" in result.output and "Of 0" not in result.output


def test_the_command_prints_statements_of_a_unit():
    result = CliRunner().invoke(app, ["claims", "--unit", "05"], env={"COLUMNS": "150"})
    assert result.exit_code == 0
    assert "0.373 bits" in result.output and "Of 1 statement: 0 hold, 0 under conditions, 1 is wrong." in result.output
