"""The retrieval tasks: an oracle that reads the text, a guesser, exact lengths, and the reader against full passes."""

from __future__ import annotations

import csv
import functools
import itertools
import math
import random
import re
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ropex
from ropex.evaluation import RetrievalResult, Sample, retrieval, tasks
from ropex.evaluation.plots import plot_retrieval
from ropex.evaluation.reading import Continuation, Reader, encode_pair
from ropex.evaluation.retrieval import Record, _generated, score
from tests.oracles import byte_tokenizer, logits, tiny_model, tiny_tokens

LENGTH = 3000
DEPTHS = (0.1, 0.5, 0.9)
every_task = pytest.mark.parametrize("task", list(tasks()))


def last_line(prompt: str) -> str:
    return prompt.rpartition("\n")[2]


def found(pattern: str, text: str) -> str:
    """What stands there; all places must agree."""
    (value,) = set(re.findall(pattern, text))
    return str(value)


def follow(steps: dict[str, str], start: str, count: int | None = None) -> str:
    while start in steps and count != 0:
        start, count = steps[start], None if count is None else count - 1
    return start


def assigned(text: str, value: str) -> str:
    names: list[str] = []
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\n", text):
        if source == value or source in names:
            names.append(name)
    return ", ".join(names)


# What a reader answers from the text and the prompt alone.
READERS: dict[str, Callable[[str, str], str]] = {
    "passkey": lambda text, prompt: found(r"The pass key is (\d+)\.", text),
    "needle": lambda text, prompt: found(re.escape(last_line(prompt)) + r" (\d+)\.", text),
    "needle_multikey": lambda text, prompt: found(re.escape(last_line(prompt)) + r" (\d+)\.", text),
    "needle_multivalue": lambda text, prompt: ", ".join(
        re.findall(rf"numbers of {found(r'numbers of ([a-z-]+)', last_line(prompt))} is (\d+)", text)
    ),
    "lines": lambda text, prompt: found(re.escape(last_line(prompt)) + r" (\d+)\n", text),
    "key_value": lambda text, prompt: found("\n" + re.escape(last_line(prompt)) + r" (\d+)\n", text),
    "threads": lambda text, prompt: follow(
        dict(re.findall(r"(\d+) -> (\d+)\n", text)), found(r"key (\d+)", last_line(prompt)), 3
    ),
    "threads_backward": lambda text, prompt: follow(
        dict(re.findall(r"(\d+) -> (\d+)\n", text)), found(r"key (\d+)", last_line(prompt)), 3
    ),
    "variable_tracking": lambda text, prompt: assigned(text, found(r"value (\d+)", last_line(prompt))),
    "ancestral_trace": lambda text, prompt: follow(
        {child: parent for parent, child in re.findall(r"(\w+) is the parent of (\w+)\.\n", text)},
        found(r"from (\w+),", last_line(prompt)),
    ),
    "first_sentence": lambda text, prompt: text.partition("\n")[0],
    "many_shot": lambda text, prompt: found(re.escape(last_line(prompt)) + r" (\w+)\n", text),
}


def reads(sample: Sample, prompt: str, candidates: Sequence[str]) -> list[Continuation]:
    answer = f" {READERS[sample.task](sample.text, prompt)}"
    assert candidates.count(answer) == 1
    return [Continuation(0.0 if candidate == answer else -50.0, candidate == answer) for candidate in candidates]


@every_task
def test_who_reads_the_text_is_always_right(task: str) -> None:
    tokenizer = byte_tokenizer()
    asked = 0
    for number in range(8):
        for sample in tasks()[task].samples(tokenizer, LENGTH, DEPTHS, number=number, seed=3):
            for question in sample.questions:
                logprob, margin, chosen, exact = score(reads, sample, question)
                assert (logprob, margin, chosen, exact) == (0.0, 50.0, True, True)
                asked += 1
    assert asked == 8 * (1 if task == "first_sentence" else len(DEPTHS))


@every_task
def test_who_guesses_is_right_by_chance(task: str) -> None:
    """One in ten, also for a guesser with a liking for a place among the candidates."""
    tokenizer, rng = byte_tokenizer(), random.Random(0)
    samples = [
        sample
        for number in range(60)
        for sample in tasks()[task].samples(tokenizer, LENGTH, DEPTHS, number=number, seed=5)
    ]

    def guesses(prefers: str, sample: Sample, prompt: str, candidates: Sequence[str]) -> list[Continuation]:
        pick = {
            "random": rng.choice(candidates),
            "first": candidates[0],
            "last": candidates[-1],
            "smallest": min(candidates),
            "longest": max(candidates, key=len),
        }[prefers]
        return [Continuation(float(candidate == pick), False) for candidate in candidates]

    for prefers in ("random", "first", "last", "smallest", "longest"):
        outcomes = []
        for sample in samples:
            for question in sample.questions:
                assert len({question.answer, *question.distractors}) == 10
                outcomes.append(score(functools.partial(guesses, prefers), sample, question)[2])
        chance = tasks()[task].chance
        assert chance == 0.1
        spread = math.sqrt(chance * (1 - chance) / len(outcomes))
        assert abs(sum(outcomes) / len(outcomes) - chance) < 4.5 * spread


@every_task
@pytest.mark.parametrize("bos", [False, True])
def test_a_sample_has_exactly_its_length(task: str, bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    for length in (LENGTH, 2 * LENGTH + 7):
        for sample in tasks()[task].samples(tokenizer, length, DEPTHS, seed=1):
            longest = max(
                sum(map(len, encode_pair(tokenizer, question.prompt, answer)))
                for question in sample.questions
                for answer in (question.answer, *question.distractors)
            )
            assert len(sample.context) + longest == length == sample.length
            assert (int(sample.context[0]) == tokenizer.bos_token_id) == bos
            assert tokenizer.decode(sample.context) == sample.text


@pytest.mark.parametrize("task", ["passkey", "needle", "needle_multikey", "lines", "key_value", "many_shot"])
def test_the_answer_stands_at_its_depth(task: str) -> None:
    for sample in tasks()[task].samples(byte_tokenizer(), 6000, DEPTHS, number=2):
        for question in sample.questions:
            fact = last_line(question.prompt).removeprefix("What is the pass key? ") + question.answer
            assert sample.text.index(fact) / len(sample.text) == pytest.approx(question.depth, abs=0.04)


@every_task
def test_samples_differ_by_seed_and_number_and_agree_between_depths(task: str) -> None:
    made = tasks()[task]
    tokenizer = byte_tokenizer()

    def texts(**which: int) -> list[str]:
        return [sample.text for sample in made.samples(tokenizer, LENGTH, DEPTHS, **which)]

    assert texts() == texts()
    assert len({texts()[0], texts(seed=1)[0], texts(number=1)[0]}) == 3
    early, late = (made.samples(tokenizer, LENGTH, (depth,))[0] for depth in (0.5, 0.9))
    if task not in ("first_sentence", "threads_backward", "ancestral_trace", "needle_multivalue"):
        common = next(
            (i for i, (a, b) in enumerate(zip(early.context, late.context, strict=False)) if a != b), len(early.context)
        )
        assert early.questions[0].answer == late.questions[0].answer
        if task in ("passkey", "needle"):
            assert common > 0.4 * LENGTH, "read once for both"


def test_tags() -> None:
    assert {task.scope for task in tasks().values()} == {task.diffusion for task in tasks().values()} == {"low", "high"}
    for name, task in tasks().items():
        assert task.name == name
        assert task.summary
        assert task.source


# --- a model that answers ---------------------------------------------------------------------------------------------

VOCABULARY = 260


def byte_model(family: str, **options: Any) -> nn.Module:
    return tiny_model(family, vocab_size=VOCABULARY, **options)


def slow_answer(
    model: nn.Module, tokenizer: Any, context: torch.Tensor, prompt: str, answer: str
) -> tuple[float, bool]:
    """Log-probability and greedy match, by one full pass without a cache."""
    before, after = encode_pair(tokenizer, prompt, answer)
    ids = torch.cat((context, torch.tensor(before + after)))
    every = logits(model, ids[None])[0, -len(after) - 1 : -1]
    logprob = -F.cross_entropy(every, torch.tensor(after), reduction="sum").item()
    return logprob, every.argmax(-1).tolist() == after


@pytest.mark.parametrize(
    ("family", "options", "method"),
    [
        pytest.param("llama", {}, "yarn", marks=pytest.mark.slow),
        ("llama", {}, "dynamic_ntk"),
        pytest.param("gpt_neox", {}, "none", marks=pytest.mark.slow),
        ("mistral", {"sliding_window": 700}, "none"),
    ],
)
def test_what_is_read_once_is_a_full_pass(family: str, options: dict[str, Any], method: str) -> None:
    model, tokenizer = byte_model(family, **options), byte_tokenizer(bos=True)
    length = 1100
    factor = {} if method == "none" else {"factor": 4}
    with ropex.patch(model, method, sliding="scale", **factor) as patch:
        measured = retrieval(model, tokenizer, "passkey", lengths=[length], depths=(0.2, 0.8), samples=1)
        with patch.pin_length(length):
            want = []
            for sample in tasks()["passkey"].samples(tokenizer, length, (0.2, 0.8), number=0):
                (question,) = sample.questions
                right = slow_answer(model, tokenizer, sample.context, question.prompt, question.answer)
                wrong = [
                    slow_answer(model, tokenizer, sample.context, question.prompt, d)[0] for d in question.distractors
                ]
                want.append((right[0], right[0] - max(wrong), right[1]))
    assert [record.depth for record in measured.records] == [0.2, 0.8]
    for record, (logprob, margin, exact) in zip(measured.records, want, strict=True):
        assert record.logprob == pytest.approx(logprob, abs=1e-4)
        assert record.margin == pytest.approx(margin, abs=2e-4)
        assert (record.chosen, record.exact) == (margin > 0, exact)


def test_several_questions_on_one_text_do_not_meet() -> None:
    model, tokenizer = byte_model("llama"), byte_tokenizer()
    passes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    measured = retrieval(model, tokenizer, "key_value", lengths=[1500], depths=DEPTHS)
    hook.remove()
    assert len([tokens for tokens in passes if tokens > 500]) == 1, "one text, read once"
    (sample,) = tasks()["key_value"].samples(tokenizer, 1500, DEPTHS)
    for record, question in zip(measured.records, sample.questions, strict=True):
        want, _ = slow_answer(model, tokenizer, sample.context, question.prompt, question.answer)
        assert record.logprob == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("bos", [False, True])
def test_a_window_sees_the_last_tokens_only(bos: bool) -> None:
    model, tokenizer = byte_model("llama"), byte_tokenizer(bos)
    (record,) = retrieval(model, tokenizer, "passkey", lengths=[1200], depths=(0.1,), window=400).records
    (sample,) = tasks()["passkey"].samples(tokenizer, 1200, (0.1,))
    (question,) = sample.questions
    seen = sample.context[-(400 - (1200 - len(sample.context))) :].clone()
    if bos:
        seen[0] = tokenizer.bos_token_id
    want, _ = slow_answer(model, tokenizer, seen, question.prompt, question.answer)
    assert record.logprob == pytest.approx(want, abs=1e-4)


def test_generation() -> None:
    model, tokenizer = byte_model("llama"), byte_tokenizer()
    measured = retrieval(model, tokenizer, "needle", lengths=[900], depths=(0.5,), scoring="generation")
    (record,) = measured.records
    assert (record.logprob, record.margin, record.chosen, record.exact) == (None, None, None, False)
    with pytest.raises(ValueError, match=r'metric="logprob": the answers were generated, not compared; pass "exact"'):
        measured.by_length("logprob")
    ids = tiny_tokens(60)[0]
    reader = Reader(model)
    with torch.no_grad():
        reader.read(ids)
        first = reader.generate([5, 6], 6)
        again = reader.generate([5, 6], 6)
        want = ids.tolist() + [5, 6]
        for _ in range(6):
            want.append(int(logits(model, torch.tensor([want]))[0, -1].argmax()))
    assert first == again == want[-6:]
    stop = first[2]
    with torch.no_grad():
        assert reader.generate([5, 6], 6, stop=[stop]) == first[: first.index(stop)]


@pytest.mark.parametrize(
    ("continuation", "right"),
    [
        (" 12345. And so on", True),
        (" is 12345\n", True),
        (" 912345", False),
        (" 54321\nThe number of another is 12345", False),
    ],
)
def test_a_generated_answer_stands_in_the_first_line(continuation: str, right: bool) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(continuation)["input_ids"]
    reader: Any = types.SimpleNamespace(generate=lambda prompt, count, stop: ids)
    assert _generated(reader, tokenizer, "The number is", " 12345") == right


def test_a_model_that_overflows_and_one_of_another_vocabulary() -> None:
    model = byte_model("llama")
    model.lm_head.weight.data[48] = math.nan
    with pytest.raises(ValueError, match=r"the log-probability of an answer after \d+ tokens is nan: must be finite"):
        retrieval(model, byte_tokenizer(), "passkey", lengths=[900])
    with pytest.raises(ValueError, match=r"tokens up to \d+: must be below 128; use the model's own tokenizer"):
        retrieval(tiny_model("llama"), byte_tokenizer(), "passkey", lengths=[900])


def test_a_backward_thread_is_one_at_every_depth() -> None:
    for depth in (0.0, 0.5, 1.0):
        (sample,) = tasks()["threads_backward"].samples(byte_tokenizer(), LENGTH, (depth,))
        steps = dict(re.findall(r"(\d+) -> (\d+)\n", sample.text))
        key = found(r"key (\d+)", last_line(sample.questions[0].prompt))
        places = []
        for _ in range(3):
            places.append(sample.text.index(f"{key} -> "))
            key = steps[key]
        assert places == sorted(places, reverse=True)


def test_transformers_own_dynamic_scaling_cannot_be_asked_twice() -> None:
    from transformers import AutoModelForCausalLM

    from tests.oracles import scaled_config

    config = scaled_config("llama", rope_type="dynamic", factor=4.0)
    config.vocab_size = VOCABULARY
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"changes the frequencies while a cache grows.*on_scaled=\"keep\""):
        retrieval(model, byte_tokenizer(), "passkey", lengths=[900])


def records(task: str = "passkey") -> RetrievalResult:
    return RetrievalResult(
        task,
        tuple(
            Record(task, length, depth, number, -float(length * number), 1.0, True, length == 10 or number == 0, 0.1)
            for length, depth, number in itertools.product((10, 20), (0.1, 0.9), (0, 1))
        ),
    )


def test_grids_and_files(tmp_path: Path) -> None:
    result = records()
    assert result.by_length() == {10: 1.0, 20: 0.5}
    assert result.by_length("logprob") == {10: -5.0, 20: -10.0}
    assert result.grid() == {(10, 0.1): 1.0, (10, 0.9): 1.0, (20, 0.1): 0.5, (20, 0.9): 0.5}
    assert RetrievalResult.from_dict(result.to_dict()) == result
    result.to_csv(tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert rows[1]["logprob"] == "-10.0"
    plot_retrieval(tmp_path / "r.png", {"a": result.grid(), "b": records().grid()}, title="t")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("pass_key", {}, r"task='pass_key': must be one of \"passkey\", \"needle\""),
        ("passkey", {"lengths": []}, r"lengths=\[\]: must be a list with at least one number"),
        ("passkey", {"lengths": [100]}, r"length=100: too short for the task passkey, whose facts and question alone"),
        ("passkey", {"depths": (0.5, 0.5)}, r"depths=\(0\.5, 0\.5\): must hold at least one depth, and each once"),
        ("passkey", {"depths": (1.5,)}, r"depth=1\.5: must be a finite number >= 0 and <= 1"),
        ("passkey", {"samples": 0}, r"samples=0: must be an int >= 1"),
        ("passkey", {"window": 20}, r"window=20: must be > \d+, the question's tokens"),
        ("passkey", {"scoring": "guess"}, r"scoring='guess': must be one of \"likelihood\", \"generation\""),
        ("needle", {"prose": " \n"}, r"prose='': must not be empty"),
    ],
)
def test_bad_input(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval(byte_model("llama"), byte_tokenizer(), task, **({"lengths": [900]} | options))
