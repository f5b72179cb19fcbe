"""Real text that is there on any machine, offline: Python's own library to fine-tune on, English prose to see what was forgotten.

- **Code**: sources of the standard library, as this Python installed them. The splits share no package, so no test module is part of a
  larger piece that was trained on. The lists hold modules that Pythons 3.11 to 3.14 all have; their contents differ a little from one
  Python to the next, so a figure states which one it is from (:func:`origin`).
- **Passages**: fourteen short texts of many kinds, written for this course. The same on every machine, and new to every model.
- **Manual**: chapters of Python's reference manual, as ``help()`` shows them: English, but about the subject of the code.

A model of the last years has certainly read Python's library. Fine-tuning on it therefore teaches a *manner* (which of all the texts the
model knows is this one like?) far more than facts; that is what most fine-tuning does.
"""

import functools
import importlib
import platform
import sysconfig
import tokenize
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# package -> its modules; "" holds single files
_TRAIN = {
    "": "argparse bdb cmd code codecs compileall configparser dataclasses dis doctest enum filecmp ftplib functools gzip imaplib inspect "
    "lzma mailbox mimetypes modulefinder ntpath optparse os pdb pickle pkgutil platform posixpath profile pstats pydoc runpy sched "
    "shelve shutil smtplib socket socketserver ssl subprocess tarfile threading timeit tokenize trace traceback types typing webbrowser",
    "asyncio": "base_events base_subprocess events futures locks proactor_events queues selector_events sslproto streams subprocess tasks "
    "transports unix_events",
    "concurrent/futures": "_base process thread",
    "email": "charset contentmanager feedparser generator header headerregistry message policy utils _parseaddr",
    "http": "client cookiejar cookies server",
    "importlib": "abc util _bootstrap _bootstrap_external",
    "logging": "__init__ config handlers",
    "multiprocessing": "connection context heap managers pool process queues reduction shared_memory synchronize util",
    "unittest": "case loader main mock runner suite",
    "urllib": "parse request robotparser",
    "wsgiref": "handlers headers simple_server util validate",
    "xml": "dom/expatbuilder dom/minidom dom/pulldom etree/ElementPath etree/ElementTree sax/expatreader sax/saxutils sax/xmlreader",
    "xmlrpc": "client server",
}
_VALIDATION = {"": "base64 csv gettext heapq plistlib selectors shlex uuid weakref", "zoneinfo": "_common _tzpath _zoneinfo"}
_TEST = {
    "": "calendar contextlib difflib fileinput fractions ipaddress poplib pprint queue random statistics tempfile textwrap wave",
    "collections": "__init__",
    "html": "__init__ parser",
    "json": "__init__ decoder encoder tool",
}
SPLITS = {
    split: tuple(f"{package}/{module}.py".lstrip("/") for package, modules in packages.items() for module in modules.split())
    for split, packages in (("train", _TRAIN), ("validation", _VALIDATION), ("test", _TEST))
}
_CHAPTERS = "assignment calls class comparisons customization execmodel function import naming objects try with".split()
PROSE = ("passages", "manual")

# Beginnings to be continued before and after fine-tuning on code: two in the manner of the library, two that are not code at all.
PROMPTS = {
    "function": 'def chunked(items, size):\n    """Yield successive lists of at most size items.\n\n',
    "class": 'class TokenBucket:\n    """Limits how often something may happen.\n\n',
    "story": "The ferry to the island left at seven in the morning, and",
    "fact": "Question: Why is the sky blue?\nAnswer:",
}


@functools.cache
def code_documents(split: str = "train") -> Mapping[str, str]:
    """Path inside the standard library -> source, in a fixed order.

    Raises:
        ValueError: ``split`` is none of "train", "validation", "test".
        FileNotFoundError: this Python came without the sources of its library, as some minimal installations do.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    library = Path(sysconfig.get_path("stdlib"))
    sources = {}
    for path in SPLITS[split]:
        if not (library / path).is_file():
            raise FileNotFoundError(
                f"{library / path} is missing: Python {platform.python_version()} has no sources of its library here; "
                "use a Python 3.11 to 3.14 with its full standard library"
            )
        with tokenize.open(library / path) as file:  # honours the file's own encoding line
            sources[path] = file.read()
    return sources


@functools.cache
def prose_documents(name: str = "passages") -> Mapping[str, str]:
    """Title -> English text: "passages", written for the course, or "manual", chapters of Python's reference manual.

    Raises:
        ValueError: ``name`` is neither.
        FileNotFoundError: this Python came without its manual.
    """
    if name == "passages":
        passages = yaml.safe_load((Path(__file__).parent / "data" / "passages.yaml").read_text(encoding="utf-8"))
        return {title: text.strip() for title, text in passages.items()}
    if name != "manual":
        raise ValueError(f"name must be one of {', '.join(PROSE)}, got {name!r}")
    try:
        chapters = importlib.import_module("pydoc_data.topics").topics
        return {title: chapters[title].strip() for title in _CHAPTERS}
    except (ImportError, KeyError) as error:
        raise FileNotFoundError(f"Python {platform.python_version()} came without its manual (pydoc_data.topics): {error}") from error


def origin() -> str:
    """Where the code and the manual come from, for the provenance of a figure: "standard library of Python 3.11.7"."""
    return f"standard library of Python {platform.python_version()}"


def pack(tokenizer: PreTrainedTokenizerBase, documents: Mapping[str, str], length: int) -> Tensor:
    """All documents in one stream of tokens, cut into rows: (rows, length), without padding; what is left at the end is dropped.

    Every row starts with the tokenizer's <bos>, where it has one, since that is how pre-training showed every text; a document starts after
    a blank line, wherever in a row that is.

    Raises:
        ValueError: ``length`` is below 2, the text fills no row, or the tokenizer doesn't know this kind of text.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2 (a token and the one to predict), got {length}")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    stream = []
    for text in documents.values():
        stream += tokenizer(text.strip() + "\n\n", add_special_tokens=False, verbose=False).input_ids
    unknown = 0 if tokenizer.unk_token_id is None else stream.count(tokenizer.unk_token_id) / max(len(stream), 1)
    if unknown > 0.2:
        raise ValueError(f"{unknown:.0%} of the text is unknown to this tokenizer: real text needs a real language model's")
    each = length - len(start)
    rows = len(stream) // each
    if rows == 0:
        raise ValueError(f"the text has {len(stream)} tokens, too few for one row of {length}")
    tokens = torch.tensor(stream[: rows * each]).view(rows, each)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(rows, -1), tokens], dim=1)


def code_corpus(tokenizer: PreTrainedTokenizerBase, length: int, split: str = "train", rows: int | None = None) -> Tensor:
    """The code of a split, packed into rows (rows, length).

    Args:
        rows: at most so many, spread evenly over the split so that every module has its share; None takes all.
    """
    return _spread(pack(tokenizer, code_documents(split), length), rows)


def prose_corpus(tokenizer: PreTrainedTokenizerBase, length: int, name: str = "passages", rows: int | None = None) -> Tensor:
    """Prose packed into rows (rows, length); see :func:`prose_documents` and :func:`code_corpus`."""
    return _spread(pack(tokenizer, prose_documents(name), length), rows)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every byte, and <bos>, <eos>, <pad>: reads any text without having been trained. For tests and dry runs."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable stand-in for each of the 256 bytes
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<pad>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def _spread(corpus: Tensor, rows: int | None) -> Tensor:
    if rows is None or rows >= len(corpus):
        return corpus
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    return corpus[torch.arange(rows) * len(corpus) // rows]
