"""A BM25 index in memory, for the tool ``search`` over some hundred thousand documents.

Suffixes: P postings (one per term and document in which it occurs), D documents, T terms, W words of the corpus.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from pathlib import Path

import msgspec
import numpy as np

_K1, _B = 1.2, 0.75  # as in Lucene
# a word, or one character of a script that is written without blanks between words
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


class CorpusError(ValueError):
    """A corpus that cannot be indexed. The message names file and line."""


class Document(msgspec.Struct, frozen=True):
    id: str | int
    text: str
    title: str = ""


class Index:
    """Documents by the words that they share with a query: Lucene's BM25, without stop words and without stemming."""

    def __init__(self, documents: list[Document]) -> None:
        # a position is then a rank among ids, by which ties are decided
        self._documents = sorted(documents, key=lambda document: str(document.id))
        count = len(self._documents)
        self._terms: defaultdict[str, int] = defaultdict()
        self._terms.default_factory = self._terms.__len__  # a new word gets the next number
        terms_W, lengths_D = array("q"), np.empty(count, np.int64)
        for position, document in enumerate(self._documents):
            before = len(terms_W)
            terms_W.extend(map(self._terms.__getitem__, words(f"{document.title} {document.text}")))
            lengths_D[position] = len(terms_W) - before
        self._terms.default_factory = None
        occurrences_W = np.frombuffer(terms_W, np.int64) * count + np.repeat(np.arange(count), lengths_D)
        postings_P, counts_P = np.unique(occurrences_W, return_counts=True)
        terms_P, documents_P = np.divmod(postings_P, count)
        self._starts_T = np.searchsorted(terms_P, np.arange(len(self._terms) + 1))
        self._documents_P = documents_P.astype(np.int32)
        found_in_T = np.diff(self._starts_T)
        idf_T = np.log1p((count - found_in_T + 0.5) / (found_in_T + 0.5))
        norms_D = _K1 * (1 - _B + _B * lengths_D / max(lengths_D.mean(), 1))
        self._scores_P = (idf_T[terms_P] * counts_P / (counts_P + norms_D[documents_P])).astype(np.float32)

    def search(self, query: str, count: int) -> list[Document]:
        """Return the ``count`` best documents, best first, by their ids where scores are equal; fewer where fewer
        share a word with the query."""
        scores_D = np.zeros(len(self._documents))
        for word, times in sorted(Counter(words(query)).items()):
            if (term := self._terms.get(word)) is not None:
                postings = slice(self._starts_T[term], self._starts_T[term + 1])
                scores_D[self._documents_P[postings]] += times * self._scores_P[postings].astype(float)
        found = np.flatnonzero(scores_D)
        if len(found) > count:
            least = np.partition(scores_D[found], -count)[-count]
            found = found[scores_D[found] >= least]
        best = found[np.argsort(-scores_D[found], kind="stable")][:count]
        return [self._documents[position] for position in best]


def words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


class _Row(msgspec.Struct):
    id: str | int
    text: str | None = None
    contents: str | None = None  # as the corpora of Search-R1 call the text
    title: str | None = None

    def document(self) -> Document:
        text = self.contents if self.text is None else self.text
        if text is None:
            raise msgspec.ValidationError("Object missing required field `text`, or `contents`")
        return Document(self.id, text, self.title or "")


def read_corpus(path: str | Path) -> list[Document]:
    """Return the documents of a JSON-lines file with ``id``, ``text`` (or ``contents``) and an optional ``title``.
    Raises CorpusError."""
    number, decoder, documents = 0, msgspec.json.Decoder(_Row), list[Document]()
    try:
        with Path(path).expanduser().open("rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    documents.append(decoder.decode(line).document())
    except OSError as error:
        raise CorpusError(f"the corpus {path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise CorpusError(f'{path}:{number}: {error}; a line is {{"id": ..., "text": ..., "title": ...}}') from error
    if not documents:
        raise CorpusError(f"the corpus {path} is empty")
    (identity, times), *_ = Counter(str(document.id) for document in documents).most_common(1)
    if times > 1:
        raise CorpusError(f"{path}: {times} documents have the id {identity!r}")
    return documents
