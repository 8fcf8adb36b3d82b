"""Several methods in one result; a run that was killed goes on; curves in one number."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ropex
from ropex.evaluation import (
    Document,
    compare_methods,
    effective_length,
    fit_loss_curve,
    perplexity_by_length,
    retrieval,
    shift_deviation,
)
from ropex.evaluation.plots import plot_perplexity
from ropex.evaluation.results import Cells, write_json
from tests.oracles import TRAINED_LENGTH, VOCABULARY, byte_tokenizer, scaled_config, tiny_model, tiny_tokens

TOKENS = tiny_tokens(700)[0]
EDGES = (0, 64, 256, 512, 700)
SCHEDULES = {"none": ropex.schedule("none"), "pi": ropex.schedule("linear", factor=2)}


def test_perplexity_of_several_methods() -> None:
    model = tiny_model("llama")
    seen: list[tuple[str, float]] = []
    result = compare_methods(
        model,
        SCHEDULES,
        documents=[TOKENS, TOKENS.flip(0)],
        bins=EDGES,
        model_name="m",
        text_name="t",
        progress=lambda name, done: seen.append((name, done)),
    )
    assert list(result) == ["model", "trained_length", "methods", "perplexity", "environment"]
    assert (result["model"], result["trained_length"]) == ("m", TRAINED_LENGTH)
    measured = result["perplexity"]
    assert (measured["protocol"], measured["text"], measured["tokens"]) == ("binned", "t", [700, 700])
    assert measured["bins"] == [[0, 64], [64, 256], [256, 512], [512, 700]]
    assert {name for name, _ in seen} == {"perplexity, none", "perplexity, pi", "perplexity, truncated"}
    shares = [done for _, done in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    docs = [TOKENS, TOKENS.flip(0)]
    alone = {"truncated": perplexity_by_length(model, docs, bins=EDGES, window=TRAINED_LENGTH)}
    for name, schedule in SCHEDULES.items():
        with ropex.patch(model, schedule):
            alone[name] = perplexity_by_length(model, docs, bins=EDGES)
        assert result["methods"][name] == schedule.to_dict()
    assert result["methods"]["truncated"] is None
    assert list(measured["results"]) == ["none", "pi", "truncated"]
    for name, each in alone.items():
        assert measured["results"][name]["nll"] == pytest.approx(each.nll, abs=1e-12)
        want = [gain for gain, _ in each.gain_over(alone["truncated"])]
        assert [gain for gain, _ in measured["results"][name]["gain"]] == pytest.approx(want, abs=1e-12)
    assert measured["results"]["truncated"]["nll"][:3] == pytest.approx(
        measured["results"]["none"]["nll"][:3], abs=1e-6
    )
    assert not ropex.inspect(model).patched
    stamp = result["environment"]
    assert torch.__version__.startswith(stamp["torch"])
    assert (stamp["dtype"], stamp["device"]) == ("float32", "cpu")


def test_retrieval_of_several_methods(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=260), byte_tokenizer()
    options: dict[str, Any] = {"lengths": [600, 900], "depths": (0.2, 0.8), "samples": 2}
    result = compare_methods(model, SCHEDULES, tokenizer=tokenizer, tasks=["passkey", "many_shot"], **options)
    assert "perplexity" not in result
    assert list(result["retrieval"]["results"]) == ["passkey", "many_shot"]
    with ropex.patch(model, SCHEDULES["pi"]):
        alone = retrieval(model, tokenizer, "many_shot", **options)
    got = result["retrieval"]["results"]["many_shot"]["pi"]
    key = lambda record: (record["number"], record["length"], record["depth"])  # noqa: E731
    assert sorted(got, key=key) == sorted(alone.to_dict()["records"], key=key)


def test_a_finished_cell_is_never_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cells = tiny_model("llama"), tmp_path / "cells.json"
    first = compare_methods(model, SCHEDULES, documents=[TOKENS], bins=EDGES, cells=cells)
    calls: list[Any] = []
    real = perplexity_by_length

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr("ropex.evaluation.compare.perplexity_by_length", counted)
    again = compare_methods(model, SCHEDULES, documents=[TOKENS], bins=EDGES, cells=cells)
    assert not calls
    assert again["perplexity"] == first["perplexity"]
    more = {**SCHEDULES, "yarn": ropex.schedule("yarn", factor=2)}
    compare_methods(model, more, documents=[TOKENS, TOKENS.flip(0)], bins=EDGES, cells=cells)
    assert len(calls) == 5, "yarn on the first document, all four on the second"
    with pytest.raises(ValueError, match=r"holds parts of another measurement \(model '.*', now '.*'\); pass another"):
        compare_methods(tiny_model("mistral"), SCHEDULES, documents=[TOKENS], bins=EDGES, cells=cells)
    other_base = tiny_model("llama", rope_theta=123_456.0)
    other_base.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"holds parts of another measurement"):
        compare_methods(other_base, SCHEDULES, documents=[TOKENS], bins=EDGES, cells=cells)
    cells.write_text("{")
    with pytest.raises(ValueError, match=r"must hold the finished parts of a measurement; remove it or pass another"):
        compare_methods(model, SCHEDULES, documents=[TOKENS], bins=EDGES, cells=cells)


def test_edited_weights_are_measured_anew(tmp_path: Path) -> None:
    """As model editing and pruning make them: a few neurons, rows of an embedding, a buffer; and back again."""
    model, cells = tiny_model("llama"), tmp_path / "cells.json"
    model.register_buffer("shift", torch.zeros(3))

    def numbers(cells: Path | None) -> Any:
        return compare_methods(model, SCHEDULES, documents=[TOKENS], bins=EDGES, cells=cells)["perplexity"]["results"]

    before = numbers(cells)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 1:9] *= 4
    edited = numbers(cells)
    assert edited["none"]["nll"] == numbers(None)["none"]["nll"] != before["none"]["nll"]
    assert numbers(cells) == edited, "seconds included"
    model.shift[1] = 1
    assert numbers(cells)["none"]["seconds"] != edited["none"]["seconds"]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 1:9] /= 4
    model.shift[1] = 0
    assert numbers(cells) == before, "nothing was lost"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_another_adapter_is_measured_anew(tmp_path: Path) -> None:
    """The weights are the same, and which of them are used is not."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tiny_model("llama", initializer_range=0.3), peft.LoraConfig(**options), "first")
    model.add_adapter("second", peft.LoraConfig(**options))
    cells = tmp_path / "cells.json"

    def numbers() -> Any:
        model.eval()
        result = compare_methods(model, SCHEDULES, documents=[TOKENS], bins=EDGES, cells=cells)
        return result["perplexity"]["results"]["none"]

    model.set_adapter("first")
    first = numbers()
    model.set_adapter("second")
    assert numbers()["nll"] != first["nll"]
    with model.disable_adapter():
        assert numbers()["nll"] != first["nll"]
    model.set_adapter("first")
    assert numbers() == first, "seconds included"


def test_what_changes_the_numbers_is_measured_again(tmp_path: Path) -> None:
    """Other bytes, another BOS, another tokenizer: other cells."""
    model, tokens = tiny_model("llama", vocab_size=260), TOKENS.clone()
    tokens[0] = 1
    options: dict[str, Any] = {"cells": tmp_path / "cells.json"}
    documents = (
        Document(tokens),
        Document(tokens, bytes=torch.ones_like(tokens)),
        Document(tokens, bos=1),
    )
    press: dict[str, Any] = {"protocol": "press", "bins": (0, 300), "stride": 200}
    found = [compare_methods(model, SCHEDULES, documents=[each], **press, **options) for each in documents]
    numbers = [each["perplexity"]["results"]["none"] for each in found]
    assert numbers[0]["bits_per_byte"] is None
    assert numbers[1]["bits_per_byte"] is not None
    assert numbers[2]["nll"] != numbers[0]["nll"]
    asked: dict[str, Any] = {"tasks": ["passkey"], "lengths": [600], "depths": [0.5]}
    with_and_without = [
        compare_methods(model, SCHEDULES, tokenizer=byte_tokenizer(bos), **asked, **options)["retrieval"]["results"]
        for bos in (False, True)
    ]
    first, second = (each["passkey"]["none"][0]["logprob"] for each in with_and_without)
    assert first != second


def test_a_model_that_carries_a_scaling() -> None:
    """Its own scaling, dynamic too, is what the truncated row has; methods replace it if asked to."""
    config = scaled_config("llama", rope_type="dynamic", factor=4.0)
    config.vocab_size = 260
    model = AutoModelForCausalLM.from_config(config).eval()
    asked: dict[str, Any] = {"tasks": ["passkey"], "lengths": [600], "depths": [0.5], "tokenizer": byte_tokenizer()}
    with pytest.raises(ValueError, match=r"already carries a scaling of the type \"dynamic\""):
        compare_methods(model, SCHEDULES, **asked)
    result = compare_methods(model, SCHEDULES, on_scaled="replace", **asked)
    assert set(result["retrieval"]["results"]["passkey"]) == {"none", "pi", "truncated"}
    assert not ropex.inspect(model).patched


def test_a_killed_run_goes_on_and_gives_the_same_numbers(tmp_path: Path) -> None:
    """SIGKILL in the middle of a real process, as soon as some cells are on disk."""
    model_dir, text = tmp_path / "model", tmp_path / "text"
    tiny_model("llama", vocab_size=260, num_hidden_layers=4).save_pretrained(model_dir)
    byte_tokenizer().save_pretrained(model_dir)
    text.write_text("the meadow is green, and the sky is wide; " * 800, encoding="utf-8")
    config = tmp_path / "compare.yaml"
    config.write_text(
        f"model: {model_dir}\ntext: {text}\nmethods: [none, yarn]\nlength: 800\ndocuments: 10\nbins: 4\n"
        "tasks: [passkey]\nlengths: [600]\nsamples: 2\ndepths: [0.1, 0.9]\ndevice: cpu\n"
    )

    def command(out: str) -> list[str]:
        return [sys.executable, "-m", "ropex", "compare", str(config), "--out", str(tmp_path / out)]

    cells = tmp_path / "killed" / "cells.json"
    process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not cells.exists() or len(json.loads(cells.read_text())["cells"]) < 4:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads(cells.read_text())["cells"]
    assert 4 <= len(before) < 36
    assert not (tmp_path / "killed" / "compare.json").exists()
    for out in ("killed", "whole"):
        subprocess.run(command(out), check=True, capture_output=True)
    after = json.loads(cells.read_text())["cells"]
    assert len(after) == 36
    assert {key: after[key] for key in before} == before, "seconds included: nothing was measured again"
    killed, whole = (json.loads((tmp_path / out / "compare.json").read_text()) for out in ("killed", "whole"))
    for name in ("none", "yarn", "truncated"):
        for value in ("nll", "tallies", "interval", "gain", "bits_per_byte"):
            assert killed["perplexity"]["results"][name][value] == whole["perplexity"]["results"][name][value]
    assert killed["retrieval"] == whole["retrieval"]
    for file in ("perplexity.png", "passkey.png", "retrieval.csv"):
        assert (tmp_path / "killed" / file).is_file()
    assert not list((tmp_path / "killed").glob(".ropex*"))


def test_a_result_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    write_json(file, {"a": 1})

    def fail(self: Path, *args: Any, **kwargs: Any) -> None:
        with self.open("w") as half:
            half.write('{"a"')
        raise OSError("no space left")

    store = Cells(file.with_name("cells.json"), {})
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        write_json(file, {"a": 2})
    with pytest.raises(OSError, match="no space left"):
        store.get("x", lambda: 1)
    with pytest.raises(OSError, match="no space left"):
        Cells(tmp_path / "other.json", {})
    assert json.loads(file.read_text()) == {"a": 1}
    assert json.loads((tmp_path / "cells.json").read_text()) == {"about": {}, "cells": {}}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cells.json", "result.json"]


RANKS = """
import sys
from pathlib import Path
import torch, torch.distributed as distributed
from ropex.evaluation import compare_methods
from ropex.evaluation.results import Cells
from tests.test_compare import SCHEDULES, TOKENS, EDGES, tiny_model
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
model, written, write = tiny_model("llama"), [], Cells._write
Cells._write = lambda self, path: (written.append(path), write(self, path))
for _ in range(2):
    result = compare_methods(model, SCHEDULES, documents=[TOKENS], bins=EDGES, cells=folder / "cells.json")
print(len(written), result["perplexity"]["results"]["pi"]["seconds"])
(folder / "cells.json").write_text("{")
distributed.barrier()
try:
    compare_methods(model, SCHEDULES, documents=[TOKENS], bins=EDGES, cells=folder / "cells.json")
except ValueError as error:
    print(error)
"""


def test_one_rank_writes_and_the_others_wait(tmp_path: Path) -> None:
    """What one has finished, or could not, is the same on all."""
    root = Path(__file__).parents[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root
        )
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=120)[0].splitlines() for process in ranks)
    assert [line.split()[0] for line in (first[0], second[0])] == ["5", "0"], "twice at the start, and three parts"
    assert first[0].split()[1] == second[0].split()[1]
    assert "must hold the finished parts of a measurement" in first[1]
    assert first[1] == second[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"nothing to measure: must have documents or tasks"),
        ({"tasks": ["passkey"]}, r"tasks without a tokenizer and lengths: must have both"),
        ({"documents": [TOKENS], "schedules": {"truncated": ropex.schedule("none")}}, r"the name 'truncated': it is"),
        ({"tasks": ["x"], "tokenizer": 1, "lengths": [9]}, r"task='x': must be one of"),
        ({"documents": [TOKENS], "samples": 0}, r"samples=0: must be an int >= 1"),
        (
            {"documents": [TOKENS], "tasks": ["passkey"], "tokenizer": byte_tokenizer(), "lengths": [90]},
            r"length=90: too short for the task passkey",
        ),
    ],
)
def test_bad_comparisons(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_methods(tiny_model("llama"), options.pop("schedules", SCHEDULES), **options)


def test_the_picture_shows_every_method(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for protocol in ("binned", "press"):
        result = compare_methods(
            model,
            SCHEDULES,
            documents=[TOKENS],
            protocol=protocol,  # type: ignore[arg-type]
            bins=(0, 512, 700),
        )
        plot_perplexity(tmp_path / f"{protocol}.png", result)
        assert (tmp_path / f"{protocol}.png").read_bytes().startswith(b"\x89PNG")


# --- one number ---------------------------------------------------------------------------------------------------


def test_effective_length() -> None:
    scores = {4096: 0.9, 8192: 0.8, 16384: 0.4, 32768: 0.9}
    assert effective_length(scores, 0.75) == 8192
    assert effective_length(scores, 0.8) == 8192
    assert effective_length(scores, 0.4) == 32768
    assert effective_length(scores, 0.95) is None
    assert effective_length({8192: -3.0, 4096: -1.0}, -2.0) == 4096, "log-probabilities too, in any order"
    with pytest.raises(ValueError, match=r"results=\{\}: must hold a score"):
        effective_length({}, 0.5)
    with pytest.raises(ValueError, match=r"results\[4096\]=nan: must be a finite number"):
        effective_length({4096: math.nan}, 0.5)


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma"), [(900.0, 0.4, 2.0), (20.0, 0.05, 0.5), (3000.0, 2.0, 3.1), (1.0, 0.3, 0.0)]
)
def test_the_loss_curve_is_found_again(alpha: float, beta: float, gamma: float) -> None:
    lengths = [256, 512, 1024, 2048, 4096, 8192]
    losses = [(alpha / length) ** beta + gamma for length in lengths]
    curve = fit_loss_curve(lengths, losses)
    assert curve(100_000) == pytest.approx((alpha / 100_000) ** beta + gamma, rel=1e-3)
    assert curve.beta == pytest.approx(beta, rel=1e-3)
    assert curve.gamma == pytest.approx(gamma, abs=2e-3)
    assert curve.r_squared == pytest.approx(1, abs=1e-9)


def test_the_loss_curve_is_the_best_one() -> None:
    """Against a coarse search over all three numbers."""
    lengths = [256, 512, 1024, 2048, 4096, 8192]
    noise = torch.randn(6, generator=torch.Generator().manual_seed(0)) * 0.02
    losses = [((900 / c) ** 0.4 + 2 + e) for c, e in zip(lengths, noise.tolist(), strict=True)]
    curve = fit_loss_curve(lengths, losses)
    mean = sum(losses) / 6
    spread = sum((y - mean) ** 2 for y in losses)
    error = sum((curve(c) - y) ** 2 for c, y in zip(lengths, losses, strict=True))
    assert curve.r_squared == pytest.approx(1 - error / spread)
    for alpha in (100, 500, 900, 1500, 4000):
        for beta in (0.2, 0.3, 0.4, 0.5, 0.7):
            for gamma in (1.5, 1.8, 2.0, 2.2):
                other = sum(((alpha / c) ** beta + gamma - y) ** 2 for c, y in zip(lengths, losses, strict=True))
                assert other >= error - 1e-12


@pytest.mark.parametrize(
    ("lengths", "losses", "message"),
    [
        ([1, 2, 3], [3, 2, 1], r"3 lengths and 3 losses: must be as many, at least four"),
        ([1, 2, 3, 3], [4, 3, 2, 1], r"no length twice"),
        ([1, 2, 3, 4], [1, 2, 3, 4], r"must fall for a power law"),
        ([0, 2, 3, 4], [4, 3, 2, 1], r"length=0: must be a finite number > 0"),
        ([1, 2, 3, 4], [4, 3, 2, math.inf], r"loss=inf: must be a finite number"),
        (
            [1024, 2048, 3072, 4096],
            [3.0, 2.9, 2.8, 2.75],
            r"an exponent of 0\.01 or beyond: no power law fits them best",
        ),
        ([1024, 2048, 4096, 8192], [3.0, 2.9, 2.8, 2.7], r"an exponent of 0\.01 or beyond: no power law fits them"),
    ],
)
def test_bad_curves(lengths: list[float], losses: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_loss_curve(lengths, losses)


# --- precision ------------------------------------------------------------------------------------------------------


def test_exact_angles_hold_a_text_that_moves() -> None:
    model = tiny_model("llama", hidden_size=256, initializer_range=0.3)
    rows = shift_deviation(model, TOKENS[:200], [4, 1_000_000])
    found = {(row.way, row.shift): row for row in rows}
    assert len(found) == len(rows) == 6
    far, near = found["transformers", 1_000_000], found["exact angles", 1_000_000]
    assert near.rms < 2e-4
    assert far.rms > 30 * near.rms, "float32 angles are off by 0.03 there"
    assert far.largest >= far.rms
    assert not ropex.inspect(model).patched
    alone = perplexity_by_length(model, TOKENS[:200], bins=1).nll[0]
    assert near.nll == pytest.approx(alone, abs=1e-4)
    with ropex.patch(model, "yarn", factor=2), pytest.raises(ValueError, match=r"is patched: must not be"):
        shift_deviation(model, TOKENS[:200])
    with pytest.raises(ValueError, match=r"shift=0: must be an int >= 1"):
        shift_deviation(model, TOKENS[:200], [0])
    with pytest.raises(ValueError, match=r"tokens of 2 documents: must be of one"):
        shift_deviation(model, [TOKENS, TOKENS])
    with pytest.raises(ValueError, match=r"shifts=\[\]: must hold at least one"):
        shift_deviation(model, TOKENS[:200], [])
    assert model.config.vocab_size == VOCABULARY
