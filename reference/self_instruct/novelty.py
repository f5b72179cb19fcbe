"""Is it new? ROUGE-L, MinHash and embeddings, and what each is blind to.

ROUGE-L compares by the longest common subsequence of words, of length l, of texts of m and n:

    precision = l / n,  recall = l / m,  F = 2 · precision · recall / (precision + recall)

Self-Instruct drops an instruction whose F with any other is above 0.7. Two blind spots. The usual
scorer keeps [a-z0-9] only, so texts in another script have no words and score 0 even when they are
the same. And a paraphrase shares few words: only an embedding sees it.

MinHash (Broder 1997) estimates the Jaccard similarity of sets of word n-grams from signatures of k
numbers: the share of places in which two signatures agree. It is what finds near-copies among
millions of rows, where comparing all pairs is out of reach.

Source: Lin 2004 (ROUGE); Wang et al. 2022; Broder 1997.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

Tokenize = Callable[[str], list[str]]
_PRIME = (1 << 61) - 1


def latin_words(text: str) -> list[str]:
    """The words of rouge-score, without stemming: runs of a–z and 0–9, in small letters."""
    return re.findall(r"[a-z0-9]+", text.lower())


def words(text: str) -> list[str]:
    """Words of any script; where a script writes no spaces, its characters."""
    found: list[str] = []
    for run in re.findall(r"[\w\u0300-\u036f]+", unicodedata.normalize("NFKC", text).casefold()):
        part = ""
        for character in run:
            if _without_spaces(character):
                found += [part] * bool(part) + [character]
                part = ""
            else:
                part += character
        found += [part] * bool(part)
    return found


def _without_spaces(character: str) -> bool:
    """Chinese, Japanese, Thai, Lao, Khmer, Burmese."""
    ranges = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF))
    ranges += ((0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
    return any(low <= ord(character) <= high for low, high in ranges)


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for a in one:
        before = 0  # the row above, one place to the left
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], before + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(one: str, other: str, tokenize: Tokenize = words) -> float:
    """ROUGE-L's F, 0 to 1. With ``latin_words`` it is rouge-score's.

    Two equal texts without any word score 1 with ``words``, and 0 as in rouge-score otherwise.
    """
    a, b = tokenize(one), tokenize(other)
    if not a or not b:
        return float(tokenize is words and one.strip() == other.strip())
    common = longest_common(a, b)
    return 2 * common / (len(a) + len(b))


def most_alike(
    text: str, pool: Iterable[str], tokenize: Tokenize = words, enough: float = 1.1
) -> tuple[float, str]:
    """The highest ROUGE-L of ``text`` with any text of the pool, and that text.

    Args:
        enough: stop at the first that scores more.
    """
    best, nearest = 0.0, None
    size = len(tokenize(text))
    for other in pool:
        count = len(tokenize(other))
        if size and count and 2 * min(size, count) / (size + count) <= best:
            continue  # cannot be higher, whatever the words
        if (score := rouge_l(text, other, tokenize)) > best or nearest is None:
            best, nearest = score, other
        if best > enough:
            break
    return best, nearest or ""


def shingles(text: str, n: int = 3, tokenize: Tokenize = words) -> set[str]:
    """Runs of ``n`` words; of a shorter text, all of it."""
    found = tokenize(text)
    return {" ".join(found[i : i + n]) for i in range(max(1, len(found) - n + 1))}


def jaccard(one: set, other: set) -> float:
    """Common items over all items."""
    return len(one & other) / len(one | other) if one | other else 1.0


def signature(items: Iterable[str], size: int = 128, seed: int = 0) -> np.ndarray:
    """MinHash: for each of ``size`` random functions the least value over all items, (size,).

    Raises:
        ValueError: there is no item.
    """
    hashes = [int.from_bytes(hashlib.blake2b(i.encode(), digest_size=7).digest()) for i in items]
    if not hashes:
        raise ValueError("items is empty: nothing to take the least of")
    rng = np.random.default_rng(seed)
    a, b = rng.integers(1, 1 << 31, size), rng.integers(0, 1 << 61, size)
    least = [min((int(x) * h + int(y)) % _PRIME for h in hashes) for x, y in zip(a, b, strict=True)]
    return np.array(least, dtype=np.int64)


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """The estimate of Jaccard's similarity; its standard error is √(J(1 − J)/size)."""
    return float((one == other).mean())


def copies(texts: Sequence[str], threshold: float = 0.8, bands: int = 32) -> list[tuple[int, int]]:
    """Near-copies (kept, copy), found without comparing all pairs.

    Signatures are cut into bands; only texts that agree in a whole band are compared.
    """
    signatures = [signature(shingles(text)) for text in texts]
    seen: dict[tuple[int, bytes], list[int]] = {}
    found = {}
    for i, mine in enumerate(signatures):
        keys = [(band, part.tobytes()) for band, part in enumerate(np.split(mine, bands))]
        for j in sorted({j for key in keys for j in seen.get(key, [])}):
            if similarity(mine, signatures[j]) >= threshold:
                found[i] = j
                break
        else:
            for key in keys:
                seen.setdefault(key, []).append(i)
    return [(j, i) for i, j in found.items()]


def alike_by_embedding(vectors: Tensor, threshold: float) -> list[tuple[int, int]]:
    """Near-copies (kept, copy) by the cosine of their embeddings, (texts, width): all pairs.

    Raises:
        ValueError: the vectors are not finite or not (texts, width).
    """
    if vectors.ndim != 2 or not torch.isfinite(vectors).all():
        raise ValueError(f"vectors must be finite, (texts, width); got {tuple(vectors.shape)}")
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    kept, found = [], []
    for i, row in enumerate(unit @ unit.T):
        near = [j for j in kept if row[j] >= threshold]
        if near:
            found.append((near[0], i))
        else:
            kept.append(i)
    return found
