"""reference.tensor_file against the safetensors library, both ways; and files that are something else."""

import json
import pickle

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.tensor_file import DTYPES, read_tensors, write_tensors


def random_tensor(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(list(DTYPES.values())), st.integers(0, 999)),
        max_size=5,
    )
)
@settings(max_examples=40)
def test_the_library_reads_what_is_written_here_and_the_other_way_round(tmp_path_factory, cases):
    folder = tmp_path_factory.getbasetemp()
    tensors = {name: random_tensor(tuple(shape), dtype, seed) for name, (shape, dtype, seed) in cases.items()}
    write_tensors(folder / "ours", tensors, metadata={"format": "pt"})
    safetensors.torch.save_file(tensors, folder / "theirs")
    assert int.from_bytes((folder / "ours").read_bytes()[:8], "little") % 8 == 0  # the data begins where any dtype may be read in place
    for found in (safetensors.torch.load_file(folder / "ours"), read_tensors(folder / "theirs"), read_tensors(folder / "ours")):
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))  # NaN included


def test_views_are_written_as_what_they_show(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "file", {"transposed": whole.T, "column": whole[:, 1]})
    assert torch.equal(read_tensors(tmp_path / "file")["transposed"], whole.T)
    assert torch.equal(read_tensors(tmp_path / "file")["column"], whole[:, 1])


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not a safetensors file"),
        (b"short", "not a safetensors file"),
        (b"This is a text file with another name.", "not a safetensors file"),
        (pickle.dumps({"a": [1.0, 2.0]}), "not a safetensors file"),
        (file_of(b"no JSON"), "header can't be read"),
        (file_of([1, 2]), "header can't be read"),
        (file_of({"a": 5}), "header can't be read"),
        (file_of({"a": {"dtype": "F32"}}), "header can't be read"),
        (file_of({"a": ENTRY | {"dtype": "F1"}}, bytes(8)), "header can't be read"),
        (file_of({"a": ENTRY | {"shape": [3]}}, bytes(8)), "a does not fill its place"),
        (file_of({"a": ENTRY | {"shape": [-2]}}, bytes(8)), "does not fill its place"),
        (file_of({"a": ENTRY | {"shape": [-1, -2]}}, bytes(8)), "does not fill its place"),
        (file_of({"a": ENTRY | {"shape": [2.0]}}, bytes(8)), "does not fill its place"),
        (file_of({"a": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)), "does not fill its place"),
        (file_of({"a": ENTRY | {"data_offsets": [0, 4, 8]}}, bytes(8)), "header can't be read"),
        (file_of({"a": ENTRY, "b": ENTRY}, bytes(8)), "b does not fill its place"),
        (file_of({"a": ENTRY}, bytes(7)), "cut off"),
        (file_of({"a": ENTRY}, bytes(9)), "too long"),
    ],
)
def test_other_files_are_refused_in_words(tmp_path, content, words):
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_tensors(tmp_path / "file.safetensors")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write_tensors(tmp_path / "file", {"a": torch.randn(3), "b": torch.ones(2, dtype=torch.int64)})
    whole = (tmp_path / "file").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "part").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"safetensors|cut off"):
            read_tensors(tmp_path / "part")


def test_what_is_not_a_tensor_is_not_written(tmp_path):
    for value in ([1.0], torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="weight must be a tensor"):
            write_tensors(tmp_path / "file", {"weight": value})
    assert not (tmp_path / "file").exists()
