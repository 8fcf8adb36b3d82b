"""What the retrieval tasks say and ask, before it is fitted to a length."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ropex._checks import require_text

__all__ = [
    "Draft",
    "Question",
    "ancestral_trace",
    "first_sentence",
    "key_value",
    "many_shot",
    "needle",
    "needle_multikey",
    "needle_multivalue",
    "passkey",
    "prose_lines",
    "register_lines",
    "threads",
    "variable_tracking",
]

_FILLER = ("The meadow is green. ", "The sky is wide. ", "The river runs to the sea. ", "Out we go, and home again. ")
_ADJECTIVES = (  # noqa: SIM905  # read more easily so
    "amber ancient bitter blunt brave bright brisk calm clever cold curious dark dusty eager early faint fierce gentle "
    "golden hidden hollow humble icy idle jolly keen late lively loud mellow misty narrow noble odd pale patient plain "
    "proud quick quiet rapid rough rusty shy silent silver sleepy smooth solid stern sturdy subtle sunny swift tidy "
    "tiny vivid warm wild wise young"
).split()
_NOUNS = (  # noqa: SIM905
    "anchor badger barrel basket beacon bridge canyon castle cedar cello comet copper cradle desert ember falcon "
    "feather fiddle forest garden glacier hammer harbor hazel island jacket kettle ladder lantern lemon magnet marble "
    "meadow mirror needle ocean orchard otter palace parrot pebble pepper piano pillow planet pocket rabbit ribbon "
    "saddle shadow spider statue summit temple thunder tiger tunnel valley velvet walnut whistle willow window"
).split()
_VERBS = ["watched", "followed", "carried", "painted", "found", "greeted", "passed", "praised"]
_LABELS = ["red", "blue", "green", "black", "white", "gold", "pink", "brown", "orange", "purple"]


@dataclass(frozen=True)
class Question:
    """What is asked after the text.

    Attributes:
        prompt: follows the text; the answer follows it.
        answer: what the text says.
        distractors: as likely without the text, and wrong.
        depth: where in the text stands what decides the answer, from 0 to 1.
    """

    prompt: str
    answer: str
    distractors: tuple[str, ...]
    depth: float


@dataclass(frozen=True)
class Draft:
    """A text to be: `facts` at their depths among as many pieces of `filler` as there is room for."""

    header: str
    facts: list[tuple[float, str]]
    filler: Iterable[str]
    questions: list[Question]


def prose_lines(prose: str | None) -> list[str]:
    if prose is None:
        from pydoc_data import topics

        prose = "\n\n".join(topics.topics.values())
    require_text("prose", prose)
    lines = [line.strip() + "\n" for line in prose.splitlines() if line.strip()]
    if not lines:
        raise ValueError("prose='': must not be empty; pass a text, or None for Python's language reference")
    return lines


def _prose(rng: random.Random, lines: Sequence[str]) -> Iterator[str]:
    """The text from some line on, and again from its beginning."""
    start = rng.randrange(len(lines))
    return itertools.islice(itertools.cycle(lines), start, None)


def _number(rng: random.Random) -> str:
    return str(rng.randint(10_000, 99_999))


def _numbers(rng: random.Random) -> Iterator[str]:
    """Five-digit numbers, none twice; longer ones when there are no more."""
    for digits in itertools.count(5):
        low = 10 ** (digits - 1)
        seen: set[int] = set()
        while len(seen) < 0.8 * 9 * low:
            number = rng.randrange(low, 10 * low)
            if number not in seen:
                seen.add(number)
                yield str(number)


def _names(rng: random.Random) -> Iterator[str]:
    """Such as quiet-falcon, none twice; of three words when there are no more of two."""
    for words in itertools.count(1):
        parts = [*[_ADJECTIVES] * words, _NOUNS]
        total = len(_NOUNS) * len(_ADJECTIVES) ** words
        for index in _shuffled(rng, total):
            chosen = []
            for part in reversed(parts):
                index, place = divmod(index, len(part))
                chosen.append(part[place])
            yield "-".join(reversed(chosen))


def _people(rng: random.Random) -> Iterator[str]:
    """Such as Belaro, none twice."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    for index in _shuffled(rng, len(syllables) ** 3):
        first, rest = divmod(index, len(syllables) ** 2)
        yield (syllables[first] + "".join(syllables[i] for i in divmod(rest, len(syllables)))).capitalize()


def _shuffled(rng: random.Random, count: int) -> Iterator[int]:
    """0 .. count - 1 in some order, without a list of them."""
    # A step that shares no factor with the count meets every number once.
    step = rng.randrange(1, count)
    while math.gcd(step, count) > 1:
        step = rng.randrange(1, count)
    start = rng.randrange(count)
    return ((start + i * step) % count for i in range(count))


def _one_digit_off(rng: random.Random, number: str, count: int) -> tuple[str, ...]:
    variants = [
        number[:i] + digit + number[i + 1 :]
        for i in range(len(number))
        for digit in "0123456789"
        if digit != number[i] and (i or digit != "0")
    ]
    return tuple(rng.sample(variants, count))


def passkey(rng: random.Random, depths: Sequence[float], lines: Sequence[str]) -> Draft:
    key = _number(rng)
    (depth,) = depths
    return Draft(
        "There is one important fact in a lot of text that does not matter. Find it and keep it in mind.\n",
        [(depth, f"The pass key is {key}. Keep it in mind: {key} is the pass key. ")],
        itertools.cycle(_FILLER),
        [_question("\nWhat is the pass key? The pass key is", key, _one_digit_off(rng, key, 9), depth)],
    )


def needle(rng: random.Random, depths: Sequence[float], lines: Sequence[str]) -> Draft:
    key, (name, *_) = _number(rng), itertools.islice(_names(rng), 1)
    (depth,) = depths
    return Draft(
        "A special number is hidden in the following text. Keep it in mind.\n",
        [(depth, f"The special number of {name} is {key}.\n")],
        _prose(rng, lines),
        [_question(f"\nThe special number of {name} is", key, _one_digit_off(rng, key, 9), depth)],
    )


def needle_multikey(rng: random.Random, depths: Sequence[float], lines: Sequence[str]) -> Draft:
    needles = zip(_names(rng), _numbers(rng), strict=False)
    return _lookups(
        rng,
        depths,
        "Several special numbers are hidden in the following text. Keep them in mind.\n",
        "The special number of {} is {}.\n",
        list(itertools.islice(needles, len(depths) + max(3, 8 - len(depths)))),
        _prose(rng, lines),
    )


def needle_multivalue(rng: random.Random, depths: Sequence[float], lines: Sequence[str]) -> Draft:
    (depth,) = depths
    mine, other, _ = itertools.islice(_names(rng), 3)
    keys = list(itertools.islice(_numbers(rng), 6))
    facts = []
    for name, values in ((mine, keys[:3]), (other, keys[3:])):
        for i, value in enumerate(values):
            place = depth * (i + 1) / 3 if name == mine else rng.random()
            facts.append((place, f"One of the special numbers of {name} is {value}.\n"))
    wrong = []
    for i in range(3):
        replacements = (*keys[3:5], *_one_digit_off(rng, keys[i], 1))
        wrong += [", ".join([*keys[:i], other, *keys[i + 1 : 3]]) for other in replacements]
    prompt = f"\nThe three special numbers of {mine}, in the order of the text, are"
    return Draft(
        "Several special numbers are hidden in the following text. Keep them in mind.\n",
        facts,
        _prose(rng, lines),
        [_question(prompt, ", ".join(keys[:3]), tuple(wrong), depth)],
    )


def register_lines(rng: random.Random, depths: Sequence[float], lines: Sequence[str]) -> Draft:
    return _records(
        rng,
        depths,
        "Below are lines, each with its REGISTER_CONTENT. Keep them in mind.\n",
        "line {}: REGISTER_CONTENT is {}\n",
        _names(rng),
    )


def key_value(rng: random.Random, depths: Sequence[float], lines: Sequence[str]) -> Draft:
    header = "Below are keys, each with its value. Keep them in mind.\n"
    return _records(rng, depths, header, "{} = {}\n", (name.lower() for name in _people(rng)))


def _records(rng: random.Random, depths: Sequence[float], header: str, form: str, names: Iterator[str]) -> Draft:
    """A text of nothing but records, each of a name and a number."""
    records = zip(names, _numbers(rng), strict=False)
    known = list(itertools.islice(records, len(depths) + 8))
    return _lookups(rng, depths, header, form, known, (form.format(*record) for record in records))


def _lookups(
    rng: random.Random,
    depths: Sequence[float],
    header: str,
    form: str,
    records: Sequence[tuple[str, str]],
    filler: Iterable[str],
) -> Draft:
    """Records in a text, the first ones at the depths asked, the others anywhere; the question is one, less its number.

    It follows on three of the others, said once more: without instructions a small model then knows what is wanted,
    which was worth 4 nats an answer on SmolLM2-135M.
    """
    others = records[len(depths) :]
    facts = [(depth, form.format(*record)) for depth, record in zip(depths, records, strict=False)]
    facts += [(rng.random(), form.format(*record)) for record in others]
    again = "".join(form.format(*record) for record in others[:3])
    numbers = [number for _, number in records if number not in again]
    before = form[: form.rindex(" {}")]
    questions = [
        _question(f"\nOnce more:\n{again}{before.format(name)}", number, _mixed(rng, number, numbers), depth)
        for depth, (name, number) in zip(depths, records, strict=False)
    ]
    return Draft(header, facts, filler, questions)


def threads(backward: bool) -> Callable[[random.Random, Sequence[float], Sequence[str]], Draft]:
    hops = 3

    def draft(rng: random.Random, depths: Sequence[float], lines: Sequence[str]) -> Draft:
        (depth,) = depths
        numbers = _numbers(rng)
        chain = list(itertools.islice(numbers, hops + 1))
        ends = list(itertools.islice(numbers, 6))
        facts = []
        for i in reversed(range(hops)) if backward else range(hops):  # in the order of the text
            place = depth + (1 - depth) * (hops - 1 - i) / hops if backward else depth * (i + 1) / hops
            facts.append((place, f"{chain[i]} -> {chain[i + 1]}\n"))
        filler = (f"{next(numbers)} -> {value}\n" for value in itertools.chain(ends, numbers))
        wrong = (*chain[1:-1], *ends, *_one_digit_off(rng, chain[-1], 1))
        return Draft(
            "Each line has a key and its value. A value may be the key of another line.\n",
            facts,
            filler,
            [
                _question(
                    f"\nFrom the key {chain[0]}, {hops} steps from key to value lead to the value",
                    chain[-1],
                    wrong,
                    depth,
                )
            ],
        )

    return draft


def variable_tracking(rng: random.Random, depths: Sequence[float], lines: Sequence[str]) -> Draft:
    (depth,) = depths
    hops = 3
    values = list(itertools.islice(_numbers(rng), 3))
    letters = rng.sample([a + b + c for a in "BCDFGHJK" for b in "LMNPQR" for c in "STVWXZ"], 3 * (hops + 1))
    chains = [letters[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(3)]
    facts = []
    for number, (chain, value) in enumerate(zip(chains, values, strict=True)):
        reach = depth if number == 0 else 1.0
        for i, name in enumerate(chain):
            source = value if i == 0 else f"VAR {chain[i - 1]}"
            facts.append((reach * (i + 1) / len(chain), f"VAR {name} = {source}\n"))
    mine, others = chains[0], chains[1] + chains[2]
    wrong = []
    for i in range(len(mine)):
        replacements = rng.sample(others, 3 if i == 0 else 2)
        wrong += [", ".join([*mine[:i], name, *mine[i + 1 :]]) for name in replacements]
    prompt = f"\nThe variables with the value {values[0]}, in the order in which they were assigned, are"
    return Draft(
        "Keep track of the variables that are assigned in the following text.\n",
        facts,
        (" ".join(sentence.strip() for sentence in _FILLER) + "\n" for _ in itertools.count()),
        [_question(prompt, ", ".join(mine), tuple(wrong), depth)],
    )


def ancestral_trace(rng: random.Random, depths: Sequence[float], lines: Sequence[str]) -> Draft:
    (depth,) = depths
    people = _people(rng)
    line = list(itertools.islice(people, 5))  # the youngest first
    others = list(itertools.islice(people, 6))

    def fact(child: str, parent: str) -> str:
        return f"{parent} is the parent of {child}.\n"

    facts = [(rng.random(), fact(*pair)) for pair in itertools.pairwise(line[:-1])]
    facts.append((depth, fact(line[-2], line[-1])))
    filler = (fact(next(people), parent) for parent in itertools.chain(others, people))
    return Draft(
        "Each line tells of a parent and a child.\n",
        facts,
        filler,
        [
            _question(
                f"\nGoing back from {line[0]}, from child to parent as far as the lines tell, the oldest ancestor is",
                line[-1],
                (*line[1:-1], *others),
                depth,
            )
        ],
    )


def first_sentence(rng: random.Random, depths: Sequence[float], lines: Sequence[str]) -> Draft:
    words = [rng.choice(_ADJECTIVES), rng.choice(_NOUNS), rng.choice(_VERBS), rng.choice(_ADJECTIVES)]
    words += [rng.choice(_NOUNS), rng.choice(_NOUNS)]

    def sentence(words: Sequence[str]) -> str:
        adjective, noun, verb, other, thing, place = words
        return f"The {adjective} {noun} {verb} the {other} {thing} behind the {place}."

    pools = (_ADJECTIVES, _NOUNS, _VERBS, _ADJECTIVES, _NOUNS, _NOUNS)
    wrong: list[str] = []
    for i in (*range(6), *rng.sample(range(6), 3)):
        choices = [word for word in pools[i] if word != words[i]]
        # None twice: a sentence is known by which word was replaced and by what.
        fresh = (sentence([*words[:i], word, *words[i + 1 :]]) for word in rng.sample(choices, len(choices)))
        wrong.append(next(candidate for candidate in fresh if candidate not in wrong))
    right = sentence(words)
    prompt = "\nThe very first sentence of the text above is:"
    return Draft("", [(0.0, right + "\n")], _prose(rng, lines), [_question(prompt, right, tuple(wrong), 0.0)])


def many_shot(rng: random.Random, depths: Sequence[float], lines: Sequence[str]) -> Draft:
    names = _names(rng)
    asked = [(name, rng.choice(_LABELS)) for name in itertools.islice(names, len(depths))]

    def shot(name: str, label: str) -> str:
        return f"item: {name} label: {label}\n"

    return Draft(
        "Each item has a label.\n",
        [(depth, shot(*pair)) for depth, pair in zip(depths, asked, strict=True)],
        (shot(name, rng.choice(_LABELS)) for name in names),
        [
            _question(f"\nitem: {name} label:", label, tuple(other for other in _LABELS if other != label), depth)
            for depth, (name, label) in zip(depths, asked, strict=True)
        ],
    )


def _mixed(rng: random.Random, key: str, others: Sequence[str]) -> tuple[str, ...]:
    """Nine wrong numbers: up to five that stand in the text for something else, the rest one digit off."""
    present = [other for other in others if other != key]
    present = rng.sample(present, min(5, len(present)))
    off = [number for number in _one_digit_off(rng, key, 9) if number not in present]
    return (*present, *off[: 9 - len(present)])


def _question(prompt: str, answer: str, distractors: tuple[str, ...], depth: float) -> Question:
    """With a space between the prompt and what follows it."""
    return Question(prompt, f" {answer}", tuple(f" {other}" for other in distractors), depth)
