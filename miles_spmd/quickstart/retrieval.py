"""A task for the environment ``tools``: questions about people, and a corpus that is searched.

    where does dora lake live
    <tool_call>{"name": "search", "arguments": {"query": "dora lake"}}</tool_call>
    [1] dora lake lives in oslo and works as baker
    oslo

*Warm-up.* The conversations that supervised learning imitates search for everybody, but most of them carelessly, for
the first name alone, which many people have, and they name what the first of these has. A model that imitates them well
is therefore right in about a third of its greedy responses. Reinforcement learning gets the questions and a reward for
the right word only, and has to find out what to search for.

*Split.* No two of sft.jsonl, train.jsonl and heldout.jsonl are about the same person, so that what is asked can only be
found in the corpus.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from miles_spmd.environments.bm25 import Document, Index
from miles_spmd.environments.search_tool import as_text
from miles_spmd.quickstart.language import Language
from miles_spmd.types.seeds import derive_seed


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "ada ben cleo dora emil fred gina hugo ines jonas karl lena mara nils olga paul rosa sven tom vera"
)
LAST_NAMES = _words(
    "ash beck brook cole dale elm field ford glen grove hale hart hill holt lake lane marsh moss nash "
    "north oak park pike pond reed ridge rose shaw snow stone thorn vale wade ward west wood york young "
    "bird bell"
)
TOWNS = _words(
    "bern bonn bari cork genoa graz kiel lima lyon metz nice oslo perth porto riga rome seoul tunis turin vienna"
)
TRADES = _words(
    "baker barber clerk cook diver doctor farmer guard judge lawyer miner nurse painter pilot poet sailor "
    "smith tailor teacher weaver"
)
QUESTIONS = {"where does {} live": "town", "what does {} work as": "trade"}
CARELESS_PERCENT = 60
SFT_PEOPLE, TRAIN_PEOPLE = 500, 200  # of 800; the others are in heldout.jsonl
TOPK = 1  # documents that a search returns

LANGUAGE = Language(
    words=(
        *("where does ", "what does ", " live", " work as", " lives in ", " and works as "),
        *FIRST_NAMES,
        *(f" {name}" for name in LAST_NAMES),
        *TOWNS,
        *TRADES,
        *("search", "[1] ", "No document was found."),
        *("<tool_call>\n", '{"name": "', '", "arguments": ', '{"query": "', '"}}', "\n</tool_call>"),
    ),
    markers=("<|user|>", "<|assistant|>", "<|tools|>", "<|tool|>"),
)
TOOL = {"type": "function", "function": {"name": "search"}}  # the chat template shows the name alone


class Person(NamedTuple):
    first: str
    last: str

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"

    @property
    def town(self) -> str:
        return TOWNS[derive_seed("town", self.name) % len(TOWNS)]

    @property
    def trade(self) -> str:
        return TRADES[derive_seed("trade", self.name) % len(TRADES)]

    @property
    def document(self) -> str:
        return f"{self.name} lives in {self.town} and works as {self.trade}"


def everybody() -> list[Person]:
    """Return all people, those of the training files first."""
    people = [Person(*names) for names in product(FIRST_NAMES, LAST_NAMES)]
    return sorted(people, key=lambda person: derive_seed("split", person.name))


def data_files() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each file by its name: ``id`` and ``text`` of each document in ``corpus``, conversations with
    ``tools`` in ``sft``, else ``prompt`` and ``label``."""
    people = everybody()
    corpus = [Document(number, person.document) for number, person in enumerate(people)]
    index = Index(corpus)
    sft, others = people[:SFT_PEOPLE], people[SFT_PEOPLE:]
    files = {"train.jsonl": others[:TRAIN_PEOPLE], "heldout.jsonl": others[TRAIN_PEOPLE:]}
    return {
        "corpus.jsonl": [{"id": one.id, "text": one.text} for one in corpus],
        "sft.jsonl": [
            {"prompt": _demonstration(index, person, question), "tools": [TOOL]} for person, question in _asked(sft)
        ],
        **{
            file: [
                {"prompt": question.format(person.name), "label": getattr(person, QUESTIONS[question])}
                for person, question in _asked(of_file)
            ]
            for file, of_file in files.items()
        },
    }


def _asked(people: list[Person]) -> list[tuple[Person, str]]:
    return sorted(product(people, QUESTIONS), key=lambda asked: derive_seed("order", asked[0].name, asked[1]))


def _demonstration(index: Index, person: Person, question: str) -> list[dict[str, Any]]:
    """The conversation of the warm-up: the same question always gets the same one, careful or careless."""
    prompt = question.format(person.name)
    careless = derive_seed("careless", prompt) % 100 < CARELESS_PERCENT
    query = person.first if careless else person.name
    documents = index.search(query, TOPK)
    first, last, *_ = documents[0].text.split()
    function = {"name": "search", "arguments": {"query": query}}
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": as_text(documents)},
        {"role": "assistant", "content": getattr(Person(first, last), QUESTIONS[question])},
    ]
