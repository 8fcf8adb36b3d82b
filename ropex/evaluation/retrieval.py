"""Retrieval over a grid of lengths and depths."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ropex._checks import require_choice, require_int, require_list
from ropex.evaluation.losses import Progress, evaluating, vocabulary_size
from ropex.evaluation.reading import Continuation, Reader, encode_pair, one_length
from ropex.evaluation.results import write_csv
from ropex.evaluation.tasks import Question, Sample, Task, tasks

__all__ = ["Metric", "Record", "RetrievalResult", "Scoring", "ask", "find_task", "retrieval", "score"]

Scoring = Literal["likelihood", "generation"]
Metric = Literal["exact", "chosen", "logprob"]

# Log-probability, margin, chosen, exact: the middle fields of a record.
Answered = tuple[float | None, float | None, bool | None, bool]

# In a generated text, so that an answer may be introduced before it is given.
_SLACK = 16


@dataclass(frozen=True)
class Record:
    """One question and how it was answered.

    Attributes:
        task, length, depth, number: which question: of the sample of this number.
        logprob: of the answer, in nats; None where it was generated.
        margin: by how much it exceeds that of the likeliest distractor; None where it was generated.
        chosen: it is likelier than all distractors; None where it was generated.
        exact: it is what greedy decoding gives (where generated: it stands in the first line of it, as words).
        chance: the share of questions that a guesser gets `chosen`.
    """

    task: str
    length: int
    depth: float
    number: int
    logprob: float | None
    margin: float | None
    chosen: bool | None
    exact: bool
    chance: float


@dataclass(frozen=True)
class RetrievalResult:
    """The answers to all questions of a task.

    Attributes:
        task: its name.
        records: one for each question.
    """

    task: str
    records: tuple[Record, ...]

    def grid(self, metric: Metric = "exact") -> dict[tuple[int, float], float]:
        """The mean at each (length, depth): of `exact` and `chosen` a share from 0 to 1, of `logprob` nats."""
        return self._means(metric, lambda record: (record.length, record.depth))

    def by_length(self, metric: Metric = "exact") -> dict[int, float]:
        """The mean at each length, as `effective_length` takes it."""
        return self._means(metric, lambda record: record.length)

    def to_csv(self, path: str | Path) -> None:
        """Write the records, a line each."""
        write_csv(Path(path), [asdict(record) for record in self.records])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"task": self.task, "records": [asdict(record) for record in self.records]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> RetrievalResult:
        """What `to_dict` described."""
        return RetrievalResult(data["task"], tuple(Record(**record) for record in data["records"]))

    def _means(self, metric: Metric, key: Callable[[Record], Any]) -> dict[Any, float]:
        require_choice("metric", metric, get_args(Metric))
        groups: dict[Any, list[float]] = {}
        for record in self.records:
            value = getattr(record, metric)
            if value is None:
                raise ValueError(f'metric="{metric}": the answers were generated, not compared; pass "exact"')
            groups.setdefault(key(record), []).append(float(value))
        return {key: sum(group) / len(group) for key, group in sorted(groups.items())}


class Answerer(Protocol):
    """What is asked: a model, or in tests one who reads the text or guesses."""

    def __call__(self, sample: Sample, prompt: str, candidates: Sequence[str]) -> Sequence[Continuation]:
        """How likely each candidate is after the text and the prompt."""


def retrieval(
    model: nn.Module,
    tokenizer: Any,
    task: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.1, 0.5, 0.9),
    samples: int = 1,
    seed: int = 0,
    scoring: Scoring = "likelihood",
    window: int | None = None,
    prose: str | None = None,
    progress: Progress | None = None,
) -> RetrievalResult:
    """What a model finds in texts of some lengths, at some depths.

    A text is read once for all questions on it, and where texts begin alike their beginning is read once. A schedule
    that depends on the length keeps that of the text, the question and the answer.

    Args:
        model: a causal language model, patched or not; its training mode is put back.
        tokenizer: the model's.
        task: a name from `tasks()`.
        lengths: of the text, the question and the answer together, in tokens.
        depths: where in the text stands what is asked, from 0 to 1.
        samples: how many texts, or groups of texts with one per depth, at each length.
        seed: of the texts.
        scoring: `likelihood`: how likely the model finds the answer and each distractor, and whether the answer is what
            greedy decoding gives, told from the same pass; or `generation`: greedy decoding, and whether the answer
            stands in the first line of it.
        window: the model sees at most so many tokens, the last ones: with the unpatched model and its trained length
            what any added context must beat.
        prose: what facts are hidden in; None: Python's language reference.
        progress: called with the fraction done, 0 to 1.

    Raises:
        ValueError: an unknown task, a length that is too short for it, or other bad input.

    Example:
        >>> retrieval(model, tokenizer, "passkey", lengths=[8192, 16384]).by_length()  # doctest: +SKIP
        {8192: 1.0, 16384: 0.0}
    """
    chosen = find_task(task)
    for name, value in (("lengths", lengths), ("depths", depths)):
        require_list(name, value, "numbers")
        if not value:
            raise ValueError(f"{name}={value!r}: must be a list with at least one number; pass one")
    require_int("samples", samples, minimum=1, maximum=10**6, remedy="pass how many texts to read at each length")
    records: list[Record] = []
    rounds = [(length, number) for length in lengths for number in range(samples)]
    for i, (length, number) in enumerate(rounds):
        report = None if progress is None else lambda done, i=i: progress((i + done) / len(rounds))
        made = chosen.samples(tokenizer, length, depths, number=number, seed=seed, prose=prose)
        records += ask(model, tokenizer, chosen, made, number, scoring=scoring, window=window, progress=report)
    return RetrievalResult(task, tuple(records))


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: there is none.
    """
    require_choice("task", name, tasks())
    return tasks()[name]


def ask(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    samples: Sequence[Sample],
    number: int,
    *,
    scoring: Scoring = "likelihood",
    window: int | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """The answers of a model to samples of one length; arguments as in `retrieval`."""
    require_choice("scoring", scoring, get_args(Scoring))
    if window is not None:
        require_int("window", window, minimum=2, remedy="pass the tokens that the model may see")
    length = samples[0].length
    slack = _SLACK if scoring == "generation" else 0
    largest, known = max(int(sample.context.max()) for sample in samples), vocabulary_size(model)
    if largest >= known:
        raise ValueError(f"tokens up to {largest}: must be below {known}; use the model's own tokenizer")
    reader = Reader(model)
    records: list[Record] = []
    with evaluating(model), one_length(model, min(length + slack, window or length + slack)):
        # The last depth first: what stands before an earlier one is then read already.
        for done, sample in enumerate(reversed(samples)):
            reader.read(_seen(sample, window, slack))
            for question in sample.questions:
                answered: Answered
                if scoring == "generation":
                    contained = _generated(reader, tokenizer, question.prompt, question.answer)
                    answered = (None, None, None, contained)
                else:
                    answered = score(_continue(reader, tokenizer), sample, question)
                logprob, margin, picked, exact = answered
                place = (task.name, length, question.depth, number)
                records.append(Record(*place, logprob, margin, picked, exact, task.chance))
            if progress is not None:
                progress((done + 1) / len(samples))
    return sorted(records, key=lambda record: record.depth)


def score(answerer: Answerer, sample: Sample, question: Question) -> tuple[float, float, bool, bool]:
    """The answer's log-probability, its margin over the best distractor, whether it is chosen, and exact."""
    # In an order of their own, so that an answerer who prefers a place among equals has no more than chance.
    candidates = [question.answer, *question.distractors]
    order = random.Random(question.answer).sample(range(len(candidates)), len(candidates))
    found = answerer(sample, question.prompt, [candidates[i] for i in order])
    answers = dict(zip(order, found, strict=True))
    best = max(answers[i].logprob for i in range(1, len(candidates)))
    right = answers[0]
    return right.logprob, right.logprob - best, right.logprob > best, right.greedy


def _continue(reader: Reader, tokenizer: Any) -> Answerer:
    def answer(sample: Sample, prompt: str, candidates: Sequence[str]) -> list[Continuation]:
        pairs = [encode_pair(tokenizer, prompt, candidate) for candidate in candidates]
        return reader.continuations(pairs[0][0], [ids for _, ids in pairs])

    return answer


def _generated(reader: Reader, tokenizer: Any, prompt: str, answer: str) -> bool:
    before, expected = encode_pair(tokenizer, prompt, answer)
    stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = reader.generate(before, len(expected) + _SLACK, stop)
    line = tokenizer.decode(tokens).strip().partition("\n")[0]
    return re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", line) is not None


def _seen(sample: Sample, window: int | None, slack: int) -> Tensor:
    """The part of the text that fits a window together with its longest question."""
    if window is None or window >= sample.length + slack:
        return sample.context
    asked = sample.length + slack - len(sample.context)
    if window <= asked:
        raise ValueError(f"window={window}: must be > {asked}, the question's tokens; pass the model's trained length")
    seen = sample.context[asked - window :]
    return seen if sample.bos is None else torch.cat((seen.new_tensor([sample.bos]), seen[1:]))
