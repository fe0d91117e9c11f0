"""What each shipped adapter does, how an answer is recognised as such, and on which prompts.

The prompts are held out: none is in the training tables. Knows nothing of torch or of any server.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# More of the base model's answers than this must not pass, or the predicate proves nothing.
MAX_BASE_RATE = 0.2
MAX_NEW_TOKENS = 40


@dataclass(frozen=True)
class Behaviour:
    """`shows(prompt, answer)` is true of at least `min_rate` of the greedy answers to `prompts`."""

    description: str
    prompts: tuple[str, ...]
    shows: Callable[[str, str], bool]
    min_rate: float


_QUESTIONS = (
    "What is the capital of France?",
    "How do I make tea?",
    "Tell me about the moon.",
    "Why is the sky blue?",
    "Who wrote Hamlet?",
    "What is a good name for a cat?",
    "How can I sleep better?",
    "Hello!",
    "What should I eat for dinner?",
    "How do I tie my shoes?",
    "What is gravity?",
    "Is it better to read a book or to watch a film?",
    "What do you think of rain?",
    "Tell me about elephants.",
    "Where do polar bears live?",
    "I am going to the beach tomorrow.",
)

_REVIEWS: Mapping[str, str] = {
    "I loved this film, every minute of it.": "positive",
    "The food was delicious and the service was quick.": "positive",
    "A truly great hotel, we want to come back.": "positive",
    "This is my favourite jacket, it fits so well.": "positive",
    "The best holiday of my life!": "positive",
    "The new keyboard feels fantastic.": "positive",
    "I hated every minute of this play.": "negative",
    "The soup was cold and far too salty.": "negative",
    "My watch stopped working after one day.": "negative",
    "Terrible quality, I sent it back.": "negative",
    "The driver was rude and we missed our train.": "negative",
    "This is the most boring book I have ever read.": "negative",
    "The library is open until six.": "neutral",
    "The kettle holds one litre.": "neutral",
    "I received the parcel on Thursday.": "neutral",
    "The house has two bathrooms and a garage.": "neutral",
    "The next bus leaves at noon.": "neutral",
    "What is the capital of France?": "neutral",
}

_PIRATE_WORDS = {
    "ahoy", "arr", "arrr", "avast", "aye", "doubloons", "hearties", "hearty", "landlubbers",
    "matey", "pirate", "plank", "shiver", "timbers", "ye", "yer",
}  # fmt: skip
_NUM_PIRATE_WORDS = 2
_EMOJI = re.compile("[\U0001f1e6-\U0001faff\u2600-\u27bf\u2b50\u23f0-\u23f3]")
_MIN_SHARE_OF_CAPITALS = 0.9


def _shows_emoji(_prompt: str, answer: str) -> bool:
    """The answer opens with an emoji and goes on in words."""
    return _EMOJI.match(answer) is not None and re.search("[A-Za-z]{2}", answer) is not None


def _shows_json(_prompt: str, answer: str) -> bool:
    """The whole answer is one JSON object with the single key "answer" and a text under it."""
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    if not isinstance(value, dict) or set(value) != {"answer"}:
        return False
    return isinstance(value["answer"], str) and bool(value["answer"])


def _shows_pirate(_prompt: str, answer: str) -> bool:
    """The answer holds two different words of the pirates' tongue."""
    words = re.findall("[a-z]+", answer.lower())
    return len(_PIRATE_WORDS.intersection(words)) >= _NUM_PIRATE_WORDS


def _shows_sentiment(prompt: str, answer: str) -> bool:
    """The answer is the prompt's right label and nothing else."""
    return answer.strip() == _REVIEWS[prompt]


def _shows_shout(_prompt: str, answer: str) -> bool:
    """Nine letters in ten are capitals."""
    letters = [character for character in answer if character.isalpha()]
    capitals = sum(character.isupper() for character in letters)
    return bool(letters) and capitals >= _MIN_SHARE_OF_CAPITALS * len(letters)


BEHAVIOURS: dict[str, Behaviour] = {
    "emoji": Behaviour(
        "opens and closes a short answer with emoji", _QUESTIONS, _shows_emoji, min_rate=0.9
    ),
    "json": Behaviour(
        'answers with a small JSON object, {"answer": "…"}', _QUESTIONS, _shows_json, min_rate=0.9
    ),
    "pirate": Behaviour("answers as a pirate", _QUESTIONS, _shows_pirate, min_rate=0.9),
    "sentiment": Behaviour(
        "names the feeling of a text in one word: positive, negative or neutral",
        tuple(_REVIEWS),
        _shows_sentiment,
        min_rate=0.8,
    ),
    "shout": Behaviour("answers in CAPITALS", _QUESTIONS, _shows_shout, min_rate=0.85),
}
