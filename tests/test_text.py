"""Real text: the splits, the packing, and errors where there is no text."""

import sysconfig

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course.lab import text
from course.lab.world import World


@pytest.fixture(scope="module")
def tokenizer():
    return text.byte_tokenizer()


def test_splits_share_no_module_and_no_package():
    owners = {}
    for split, paths in text.SPLITS.items():
        assert len(set(paths)) == len(paths)
        for path in paths:
            assert owners.setdefault(path.split("/")[0], split) == split
    assert set(text.SPLITS) == {"train", "validation", "test"}


@pytest.mark.parametrize("split, megabytes", [("train", 4.0), ("validation", 0.2), ("test", 0.5)])
def test_every_source_is_there_and_is_python(split, megabytes):
    documents = text.code_documents(split)
    assert tuple(documents) == text.SPLITS[split]
    assert sum(map(len, documents.values())) > 1e6 * megabytes
    for path, source in documents.items():
        compile(source, path, "exec")


def test_the_text_is_the_interpreters_own():
    assert "def dataclass(" in text.code_documents("train")["dataclasses.py"]
    assert text.origin().startswith("standard library of Python 3.")


@pytest.mark.parametrize("name, characters, documents", [("passages", 9_000, 14), ("manual", 90_000, 12)])
def test_prose_is_english(name, characters, documents):
    prose = text.prose_documents(name)
    assert len(prose) == documents and sum(map(len, prose.values())) > characters
    words = " ".join(prose.values()).split()
    assert 0.03 < sum(word.lower() == "the" for word in words) / len(words) < 0.12


def test_passages_fill_lines_and_hold_no_markup():
    for passage in text.prose_documents("passages").values():
        assert "\n" not in passage and "  " not in passage and passage[-1] in '."'
        assert 100 < len(passage.split()) < 160


def test_packing_keeps_every_token_in_order_and_starts_rows_with_bos(tokenizer):
    documents = {"one": "abc\n", "two": "äöü", "three": "the end"}
    rows = text.pack(tokenizer, documents, 6)
    assert (rows[:, 0] == tokenizer.bos_token_id).all() and rows.dtype == torch.long
    whole = "abc\n\näöü\n\nthe end\n\n"
    assert whole.startswith(tokenizer.decode(rows[:, 1:].flatten().tolist()))
    assert rows.shape == (len(whole.encode()) // 5, 6)  # what does not fill a row is dropped


def test_packing_without_bos():
    bare = text.byte_tokenizer()
    bare.bos_token = None
    assert bare.decode(text.pack(bare, {"x": "abcdefgh"}, 4).flatten().tolist()) == "abcdefgh"


def test_fewer_rows_are_spread_over_the_split(tokenizer):
    everything, some = (text.code_corpus(tokenizer, 64, "validation", rows=rows) for rows in (None, 10))
    assert some.shape == (10, 64)
    at = [int((everything == row).all(1).nonzero()[0]) for row in some]
    assert at == [i * len(everything) // 10 for i in range(10)]
    assert torch.equal(text.code_corpus(tokenizer, 64, "validation", rows=10**6), everything)


def test_prompts_begin_what_is_not_in_the_splits():
    sources = "".join("".join(text.code_documents(split).values()) for split in text.SPLITS)
    assert not any(prompt in sources for prompt in text.PROMPTS.values())


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=50)
def test_the_byte_tokenizer_keeps_any_text(string):
    tokenizer = text.byte_tokenizer()
    ids = tokenizer(string).input_ids
    assert len(ids) == len(string.encode()) and tokenizer.decode(ids) == string


def test_bad_arguments_are_named(tokenizer):
    with pytest.raises(ValueError, match="'dev'"):
        text.code_documents("dev")
    with pytest.raises(ValueError, match="'novels'"):
        text.prose_documents("novels")
    with pytest.raises(ValueError, match="got 1"):
        text.pack(tokenizer, {"x": "abc"}, 1)
    with pytest.raises(ValueError, match="too few for one row of 64"):
        text.pack(tokenizer, {"x": "abc"}, 64)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        text.prose_corpus(tokenizer, 64, rows=0)


def test_a_tokenizer_of_another_world_is_refused():
    with pytest.raises(ValueError, match="unknown to this tokenizer"):
        text.prose_corpus(World(0).tokenizer, 32)


def test_a_python_without_its_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no sources of its library"):
        text.code_documents.__wrapped__("test")


def test_a_python_without_its_manual_is_explained(monkeypatch):
    import pydoc_data.topics

    monkeypatch.setattr(pydoc_data.topics, "topics", {})
    with pytest.raises(FileNotFoundError, match="without its manual"):
        text.prose_documents.__wrapped__("manual")
