"""Quickstart, tutorials, the README and the page of own members run, at a small scale."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from qtdog.cli.main import main
from qtdog.training.plugins import forget_plugins

ROOT = Path(__file__).parents[2]
OUTPUTS = runpy.run_path(str(ROOT / "docs/make/outputs.py"))
SMALLER = {
    r"--steps \d+": "--steps 4",
    r"steps=\d+": "steps=4",
    r'"steps": \d+': '"steps": 4',
    r"train\.steps: \d+, train\.eval_every: \d+": "train.steps: 4, train.eval_every: 1",
    r"--num \d+": "--num 160",
    r'target: \["0", "75"\]': 'target: ["75"]',
    r"seed: 0\.\.2": "seed: 0..1",
}


def smaller(block: str) -> str:
    for pattern, text in SMALLER.items():
        block = re.sub(pattern, text, block)
    return block


def in_this_process(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a shell that knows qtdog, python FILE and ls, without starting a process for each."""

    def shell(block: str) -> str:
        capsys.readouterr()
        for line in block.splitlines():
            program, *words = shlex.split(line, comments=True)
            end = next((i for i, word in enumerate(words) if re.match(r"\d?>", word)), len(words))
            arguments = words[:end]
            if program == "qtdog":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", ["qtdog", *arguments])
                    with pytest.raises(SystemExit) as ended:
                        main()
                    assert ended.value.code in (0, None), (line, capsys.readouterr())
            elif program == "python":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", [*arguments])
                    runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
            else:
                assert program == "ls", line
                assert all(list(Path().glob(word)) for word in arguments), line
        return capsys.readouterr().out

    return shell


@pytest.fixture
def no_plugins() -> Any:
    forget_plugins()
    yield
    forget_plugins()


@pytest.mark.parametrize(
    ("page", "n_outputs"),
    [
        ("README.md", 2),
        ("docs/quickstart.md", 6),
        ("docs/tutorials/engineer.md", 7),
    ],
)
@pytest.mark.usefixtures("no_plugins", "one_registry")
def test_a_page_runs(
    page: str, n_outputs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    made = OUTPUTS["run_page"](text, in_this_process(capsys), smaller)
    blocks = re.findall(r"^```text\n(.*?)^```", made, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= n_outputs
    assert all(block.strip() for block in blocks)
    kept = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert all(block.strip() for block in kept), "write the outputs: python docs/make/outputs.py PAGE"


@pytest.mark.usefixtures("no_plugins")
def test_the_members_of_ones_own_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/developer/extend.md").read_text()
    programs = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for program in programs:
        assert len(program.splitlines()) <= 26
        exec(compile(program, "extend.md", "exec"), names)
    assert "loss at the end" in capsys.readouterr().out
    registered = set(re.findall(r'register\("([\w-]+)"', page))
    assert registered == {
        "augmentation", "averager", "backbone", "dataset", "feature-layer", "objective", "quantizer", "step-rule",
    }  # fmt: skip


def test_the_output_of_a_block_is_written_below_it():
    page = "```python\nprint(1 + 1)\n```\n\n```text\nold\n```\n\n```bash\nls\n```\nno output wanted\n"
    made = OUTPUTS["run_page"](page, lambda command: pytest.fail(command))
    assert made == page.replace("old", "2")
