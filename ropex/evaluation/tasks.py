"""Retrieval tasks, generated: texts of an exact length, questions on them, and wrong answers that look right."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ropex._checks import require_int, require_length, require_list, require_number, require_tokenizer
from ropex.evaluation import drafts
from ropex.evaluation.documents import bos_of
from ropex.evaluation.drafts import Draft, Question

__all__ = ["Question", "Sample", "Task", "tasks"]


@dataclass(frozen=True, eq=False)
class Sample:
    """A text and the questions on it.

    Attributes:
        task: the task's name.
        length: of the text, the longest prompt and its longest answer, right or wrong, together, in tokens.
        context: the text's ids, int64 [n], with BOS where the tokenizer puts it.
        bos: that id, or None.
        text: what they say.
        questions: all on this text, one for each depth.
    """

    task: str
    length: int
    context: Tensor
    bos: int | None
    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Task:
    """A kind of sample; `tasks` lists them.

    Attributes:
        name: what the command calls it.
        summary: what is asked, in a line.
        scope: how much of the text decides the answer.
        diffusion: how hard it is to tell from the rest.
        chance: the share of right guesses among the answer and its distractors.
        shared: one text answers for all depths.
        source: the paper whose task it is.

    Reference of scope and diffusion: Goldman et al., Is It Really Long Context if All You Need Is Retrieval?, 2024,
    arXiv:2407.00402.
    """

    name: str
    summary: str
    scope: Literal["low", "high"]
    diffusion: Literal["low", "high"]
    chance: float
    shared: bool
    source: str
    draft: Callable[[random.Random, Sequence[float], Sequence[str]], Draft]

    def samples(
        self,
        tokenizer: Any,
        length: int,
        depths: Sequence[float] = (0.1, 0.5, 0.9),
        *,
        number: int = 0,
        seed: int = 0,
        prose: str | None = None,
    ) -> list[Sample]:
        """The texts that ask at each depth: a single one where the task can ask all of it.

        Those of one number and seed differ between depths in the place of their facts alone, so that what stands
        before them is the same.

        Args:
            tokenizer: of transformers.
            length: tokens of the text, the prompt and the answer together: exact for the longest question and its
                longest answer, right or wrong.
            depths: from 0, the text's beginning, to 1. (`first_sentence` has depth 0 alone.)
            number: which sample.
            seed: of all samples.
            prose: what the facts are hidden in, where they are not hidden among their like; None: Python's language
                reference.

        Raises:
            ValueError: a length that does not hold the facts and the question, a depth beyond 0 .. 1.
        """
        require_tokenizer(tokenizer)
        require_length("length", length, minimum=2)
        require_int("seed", seed, minimum=0, remedy="pass a number for the texts")
        require_list("depths", depths, "shares of the text")
        for depth in depths:
            require_number("depth", depth, minimum=0, maximum=1, remedy="pass a share of the text")
        require_int("number", number, minimum=0, remedy="pass which sample to make")
        if self.name == "first_sentence":
            depths = (0.0,)
        if not depths or len(set(depths)) < len(depths):
            raise ValueError(f"depths={depths!r}: must hold at least one depth, and each once; pass such as (0.1, 0.9)")
        lines = drafts.prose_lines(prose)
        groups = [list(depths)] if self.shared else [[depth] for depth in depths]
        made = []
        for group in groups:
            rng = random.Random(f"{self.name}-{seed}-{number}-{length}")
            made.append(_sample(self.name, self.draft(rng, group, lines), tokenizer, length))
        return made


def tasks() -> dict[str, Task]:
    """The retrieval tasks by name.

    Example:
        >>> "passkey" in tasks()
        True
    """
    return dict(_TASKS)


def _sample(name: str, draft: Draft, tokenizer: Any, length: int) -> Sample:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    bos = bos_of(tokenizer)
    head = ([] if bos is None else [bos]) + ids(draft.header)
    facts = [(depth, ids(text)) for depth, text in sorted(draft.facts, key=lambda fact: fact[0])]
    asked = max(len(ids(each.prompt + last)) for each in draft.questions for last in (each.answer, *each.distractors))
    room = length - len(head) - sum(len(fact) for _, fact in facts) - asked
    if room < 1:
        raise ValueError(
            f"length={length}: too short for the task {name}, whose facts and question alone take {length - room} "
            "tokens; pass a greater length"
        )
    known: dict[str, list[int]] = {}
    body: list[int] = []
    used = 0
    for text in draft.filler:
        if text not in known:
            known[text] = ids(text)
        piece = known[text]
        # A fact never follows the last piece, which may be cut.
        while facts and (used + len(piece) >= room or facts[0][0] * room <= used + len(piece) / 2):
            body += facts.pop(0)[1]
        body += piece[: room - used]
        used += len(piece)
        if used >= room:
            break
    context = torch.tensor(head + body, dtype=torch.int64)
    return Sample(name, length, context, bos, tokenizer.decode(context), tuple(draft.questions))


_TASKS = {
    task.name: task
    for task in (
        Task(
            "passkey",
            "one five-digit number in repeated filler",
            "low",
            "low",
            0.1,
            False,
            "Mohtashami and Jaggi, Landmark Attention, 2023, arXiv:2305.16300",
            drafts.passkey,
        ),
        Task(
            "needle",
            "the number of one name, in prose",
            "low",
            "low",
            0.1,
            False,
            "Kamradt, Needle In A Haystack, 2023; Hsieh et al., RULER, 2024, arXiv:2404.06654",
            drafts.needle,
        ),
        Task(
            "needle_multikey",
            "the number of one name among several, in prose",
            "low",
            "high",
            0.1,
            True,
            "Hsieh et al., RULER, 2024, arXiv:2404.06654",
            drafts.needle_multikey,
        ),
        Task(
            "needle_multivalue",
            "the three numbers of one name, in prose",
            "high",
            "high",
            0.1,
            False,
            "Hsieh et al., RULER, 2024, arXiv:2404.06654",
            drafts.needle_multivalue,
        ),
        Task(
            "lines",
            "the number of one line, in a text of such lines",
            "low",
            "high",
            0.1,
            True,
            "Li et al., LongChat-Lines, 2023",
            drafts.register_lines,
        ),
        Task(
            "key_value",
            "the number of one key, in a text of keys and numbers",
            "low",
            "high",
            0.1,
            True,
            "Liu et al., Lost in the Middle, 2023, arXiv:2307.03172",
            drafts.key_value,
        ),
        Task(
            "threads",
            "three steps from key to value, each further on in a text of such lines",
            "high",
            "high",
            0.1,
            False,
            "Roberts et al., Needle Threading, 2024, arXiv:2411.05000",
            drafts.threads(backward=False),
        ),
        Task(
            "threads_backward",
            "the same, each step further back",
            "high",
            "high",
            0.1,
            False,
            "Roberts et al., Needle Threading, 2024, arXiv:2411.05000",
            drafts.threads(backward=True),
        ),
        Task(
            "variable_tracking",
            "all variables that have a value, one assigned from the other, in repeated filler",
            "high",
            "low",
            0.1,
            False,
            "Hsieh et al., RULER, 2024, arXiv:2404.06654",
            drafts.variable_tracking,
        ),
        Task(
            "ancestral_trace",
            "the oldest ancestor, four steps back, in a text of parents and children",
            "high",
            "high",
            0.1,
            False,
            "Li et al., NeedleBench, 2024, arXiv:2407.11963",
            drafts.ancestral_trace,
        ),
        Task(
            "first_sentence",
            "the first sentence, word for word, before prose",
            "low",
            "low",
            0.1,
            False,
            "Xiong et al., Effective Long-Context Scaling, 2023, arXiv:2309.16039",
            drafts.first_sentence,
        ),
        Task(
            "many_shot",
            "the label of one item, in a text of items and labels",
            "low",
            "high",
            0.1,
            True,
            "Agarwal et al., Many-Shot In-Context Learning, 2024, arXiv:2404.11018",
            drafts.many_shot,
        ),
    )
}
