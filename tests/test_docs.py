"""
Run every Python block of README and docs, and every cell of the notebooks, as they stand.

``<!-- continues -->`` before a block runs it after the block above, with its variables; ``<!-- needs package ... -->`` skips a
block where a package is not installed.
"""

import inspect
import json
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from sb3_trpo import TRPO
from sb3_trpo.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL_FENCE = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (continues|needs) ?([\w ]*)-->\s*\Z")


class Block(NamedTuple):
    """
    A block of code.

    :param path: its page
    :param line: line of its first statement
    :param code: the code
    :param needs: packages that must be installed
    """

    path: Path
    line: int
    code: str
    needs: list[str]


def read_examples(path: Path) -> list[list[Block]]:
    """Return the examples of a page: lists of blocks, each of which continues the one before."""
    text = path.read_text(encoding="utf-8")
    examples: list[list[Block]] = []
    for fence in FENCE.finditer(text):
        mark = MARK.search(text, 0, fence.start())
        line = text.count("\n", 0, fence.start(1)) + 1
        block = Block(path, line, fence[1], mark[2].split() if mark and mark[1] == "needs" else [])
        if mark and mark[1] == "continues":
            examples[-1].append(block)
        else:
            examples.append([block])
    return examples


EXAMPLES = {
    f"{path.relative_to(ROOT)}:{'+'.join(str(block.line) for block in blocks)}": blocks
    for path in PAGES
    if "_build" not in path.parts
    for blocks in read_examples(path)
}


@pytest.mark.parametrize("blocks", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_docs_example_runs(blocks: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in blocks[0].needs:
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks:
        # Line numbers of a traceback are those of the page.
        exec(compile("\n" * (block.line - 1) + block.code, str(block.path), "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.name for path in NOTEBOOKS])
def test_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    names = {"__name__": "__main__"}
    for number, cell in enumerate(code, start=1):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    assert code
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))  # its outputs are of one run


def test_docs_shell_lines_name_commands_and_flags_that_exist(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The commands of this package take the flags that the pages give them; the Makefile has the targets."""
    pytest.importorskip("rl_zoo3")
    monkeypatch.setattr(sys, "argv", ["sb3_trpo"])
    pages = [*PAGES, ROOT / "CONTRIBUTING.md"]
    shell = "".join("".join(SHELL_FENCE.findall(path.read_text(encoding="utf-8"))) for path in pages)
    flags: dict[str, set[str]] = {}
    for command, rest in re.findall(r"^(?:\w+=\S+ )*python -m sb3_trpo (\S+)(.*)$", shell.replace("\\\n", ""), re.MULTILINE):
        flags.setdefault(command, set()).update(re.findall(r"(?<= )--?[a-z][\w-]*", rest))
    assert len(flags) >= 8
    for command, used in flags.items():
        with pytest.raises(SystemExit, match=r"^0$"):
            main([command, "--help"])
        known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capfd.readouterr().out))
        assert used <= known, command
    targets = {name for line in re.findall(r"^make ([a-z -]+)", shell, re.MULTILINE) for name in line.split()}
    assert {"demo", "test", "lint", "types", "docs", "package"} <= targets
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [name for name in targets if f"\n{name}:" not in makefile] == []


def test_docs_have_no_unknown_marks() -> None:
    for path in PAGES:
        for comment in re.findall(r"<!--.*?-->", path.read_text(encoding="utf-8")):
            assert MARK.fullmatch(comment), f"{path}: {comment}"


def test_arguments_page_lists_the_constructors_arguments() -> None:
    text = (ROOT / "docs" / "arguments.md").read_text(encoding="utf-8").partition("(log-keys)")[0]
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert listed == [name for name in inspect.signature(TRPO).parameters if name != "self"]


def test_docs_name_existing_files() -> None:
    """Paths like benchmarks/x.py."""
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
    for path in pages:
        for name in re.findall(
            r"\b(?:benchmarks|examples|zoo_hyperparams|tests)/[\w/]+\.\w+", path.read_text(encoding="utf-8")
        ):
            assert (ROOT / name).exists(), f"{path}: {name}"


def test_how_it_works_names_lines_and_definitions() -> None:
    """Of the code: the lines of ``train`` and ``_policy_step``, and where what they call is defined."""
    how = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| \d+ \|[^|]*\| `([^`]+?)(?:\(\.\.\.\))?` \|", how, re.MULTILINE)
    source = inspect.getsource(TRPO.train) + inspect.getsource(TRPO._policy_step)
    assert len(lines) == 10
    assert [source.count(line) for line in lines] == [1] * 10, lines
    names = re.findall(r"`((?:optim|rollouts|adapters)\.[\w.]+)`", how)
    assert names
    for name in names:
        package, module, *attributes = name.split(".")
        found = import_module(f"sb3_trpo.{package}.{module}")
        for attribute in attributes:
            found = getattr(found, attribute)


def test_docs_name_no_index_that_has_no_release() -> None:
    for path in PAGES:
        assert not re.search(r"pip install '?sb3[_-]trpo", path.read_text(encoding="utf-8")), path


def test_readme_links_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
