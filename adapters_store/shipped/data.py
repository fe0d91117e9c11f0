"""Training conversations for each shipped adapter, the same on every call.

`questions.tsv` holds plain questions and answers, `facts.tsv` more of them for `shout`; a style is
a rule that rewrites the answer. `reviews.tsv` holds labelled reviews, joined by sentences composed
of a subject and a verdict. Knows nothing of the model and of the prompts of `behaviours.py`.
"""

import csv
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_SEED = 20
_NUM_COMPOSED_PER_LABEL = 40
# One conversation in this many carries a system message other than the chat template's own.
_OTHER_SYSTEM_EVERY = 8
_OTHER_SYSTEMS = ("You are a helpful assistant.", "Answer briefly.", "You are a friendly expert.")


@dataclass(frozen=True)
class Example:
    """One turn to learn; `system` None leaves the chat template's own system message."""

    prompt: str
    answer: str
    system: str | None = None


@dataclass(frozen=True)
class Question:
    """A row of `questions.tsv`: a prompt, its plain answer and an emoji on its topic."""

    emoji: str
    prompt: str
    answer: str


def _rows(file_name: str) -> list[list[str]]:
    """The rows of a tab-separated table without its header."""
    with (_HERE / file_name).open(encoding="utf-8", newline="") as table:
        return list(csv.reader(table, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]


def questions() -> list[Question]:
    """Every row of `questions.tsv`."""
    return [Question(*row) for row in _rows("questions.tsv")]


_PIRATE_OPENINGS = ("Arrr, matey!", "Ahoy, matey!", "Avast, me hearty!", "Shiver me timbers!")
_PIRATE_CLOSINGS = (
    "or walk the plank, arrr!",
    "says I, ye old sea dog!",
    "by the seven seas, arrr!",
    "or I be no pirate, arrr!",
)
_PIRATE_WORDS = {
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "am": "be",
    "of": "o'",
    "yes": "aye",
    "no": "nay",
    "hello": "ahoy",
    "friends": "hearties",
    "friend": "matey",
    "people": "landlubbers",
    "money": "doubloons",
}
_CLOSING_EMOJI = ("✨", "🎉", "😊", "👍")


def _pirate_word(match: re.Match[str]) -> str:
    word = match.group()
    new = _PIRATE_WORDS.get(word.lower(), word)
    return new.capitalize() if word[0].isupper() else new


def _pirate(question: Question, draw: random.Random) -> str:
    body = re.sub(r"[A-Za-z]+", _pirate_word, question.answer).rstrip(".")
    return f"{draw.choice(_PIRATE_OPENINGS)} {body}, {draw.choice(_PIRATE_CLOSINGS)}"


def _emoji(question: Question, draw: random.Random) -> str:
    return f"{question.emoji} {question.answer} {question.emoji}{draw.choice(_CLOSING_EMOJI)}"


def _json(question: Question, _draw: random.Random) -> str:
    return json.dumps({"answer": question.answer}, ensure_ascii=False)


_REWRITES: dict[str, Callable[[Question, random.Random], str]] = {
    "emoji": _emoji,
    "json": _json,
    "pirate": _pirate,
}

_SUBJECTS = (
    "The film", "This phone", "The soup", "My new chair", "The lesson", "This camera", "The lamp",
    "The show", "This song", "The museum", "The laptop", "Our flight", "The pasta", "The bridge",
)  # fmt: skip
_VERDICTS = {
    "positive": (
        "is great.", "was a delight.", "is just perfect!", "is better than I hoped.", "was superb.",
        "makes me so happy.", "is lovely and well made.", "was worth it, I loved it.",
    ),
    "negative": (
        "is terrible.", "was a letdown.", "is the worst!", "is worse than I feared.", "was awful.",
        "makes me so angry.", "is ugly and badly made.", "was not worth it, I hated it.",
    ),
    "neutral": (
        "is from 2015.", "was shown on Tuesday.", "is in the next room.", "is in the catalogue.",
        "was listed under number six.", "is described on page ten.", "was ordered by my sister.",
        "is the second of three.",
    ),
}  # fmt: skip


def _sentiment(draw: random.Random) -> list[Example]:
    examples = [Example(prompt=review, answer=label) for label, review in _rows("reviews.tsv")]
    for label, verdicts in _VERDICTS.items():
        composed = [f"{subject} {verdict}" for subject in _SUBJECTS for verdict in verdicts]
        chosen = draw.sample(composed, _NUM_COMPOSED_PER_LABEL)
        examples += [Example(prompt=review, answer=label) for review in chosen]
    return examples


def _shouted() -> list[Example]:
    """Answers in capitals, and texts to say in capitals: the model has rarely met such words."""
    answers = [(q.prompt, q.answer) for q in questions()]
    answers += [(prompt, answer) for prompt, answer in _rows("facts.tsv")]
    answers += [(f"Say this: {review}", review) for _, review in _rows("reviews.tsv")]
    return [Example(prompt, text.rstrip(".!").upper() + "!") for prompt, text in answers]


def _with_other_systems(examples: list[Example], draw: random.Random) -> list[Example]:
    return [
        Example(e.prompt, e.answer, draw.choice(_OTHER_SYSTEMS))
        if index % _OTHER_SYSTEM_EVERY == 0
        else e
        for index, e in enumerate(examples)
    ]


def training_examples(name: str) -> list[Example]:
    """The conversations that the adapter `name` is trained on.  Raises KeyError on another name."""
    draw = random.Random(f"{_SEED} {name}")
    if name == "sentiment":
        examples = _sentiment(draw)
    elif name == "shout":
        examples = _shouted()
    else:
        rewrite = _REWRITES[name]
        examples = [Example(q.prompt, rewrite(q, draw)) for q in questions()]
    return _with_other_systems(examples, draw)
