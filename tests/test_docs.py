"""README and docs say what is true."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import ropex
from benchmarks import report
from ropex.scaling.base import option_names
from tests.oracles import TRAINED_LENGTH, tiny_model, tiny_tokens

REPOSITORY = Path(ropex.__file__).parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])


METHOD_PAGES = sorted((REPOSITORY / "docs" / "methods").glob("*.md"))


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


def test_tables_are_those_of_the_results() -> None:
    for path, text in report.pages().items():
        assert path.read_text() == text, "run `python -m benchmarks.report`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_in_pages_compiles(page: Path) -> None:
    for block in code_blocks(page):
        compile(block, page.name, "exec")


def test_the_schedule_of_the_extending_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = code_blocks(REPOSITORY / "docs" / "extending.md")
    (tmp_path / "extending_page.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    schedule = importlib.import_module("extending_page").SlowHalf(factor=2)
    with ropex.patch(tiny_model("llama"), schedule) as patch:
        assert patch.model.config.max_position_embeddings == 2 * TRAINED_LENGTH


def test_the_examples_of_the_kernels_page_run() -> None:
    names: dict[str, object] = {}
    for block in code_blocks(REPOSITORY / "docs" / "kernels.md"):
        exec(compile(block, "kernels.md", "exec"), names)


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_a_methods_page_has_its_picture_and_an_example_that_runs(page: Path) -> None:
    text = page.read_text()
    assert text.startswith(f"# {page.stem}\n")
    assert f"]({page.stem}.png)" in text
    assert f"`help(ropex.scaling.{ropex.methods()[page.stem].__name__})`" in text
    (block,) = code_blocks(page)
    exec(compile(block, page.name, "exec"), {"model": tiny_model("llama"), "input_ids": tiny_tokens(40)})


def test_every_method_has_its_page_and_place_in_the_choice() -> None:
    assert {page.stem for page in METHOD_PAGES} == set(ropex.methods())
    choosing = (REPOSITORY / "docs" / "choosing.md").read_text()
    for name in ropex.methods():
        assert f"| [{name}](methods/{name}.md) |" in choosing


def test_readme_lists_every_method_with_its_options() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for name, cls in ropex.methods().items():
        (row,) = re.findall(rf"^\| \[`{name}`\]\(docs/methods/{name}.md\).*$", readme, flags=re.M)
        for option in option_names(cls):
            assert f"`{option}`" in row
