"""What is raised through `qtdog.train` and its like speaks of arguments, whatever room the message comes from."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import qtdog
from qtdog.api.python_words import COMMAND, python_words
from qtdog.cli.main import app
from qtdog.core.errors import ConfigError, RunError

PACKAGE = Path(qtdog.__file__).parent
# Values that messages give to options.
VALUES = {"none", "package", "sources", "greedy", "init", "eoq", "mlflow", "tensorboard", "wandb", "ray", "slurm"}
VALUES |= {"different", "linear", "context", "onnx-int8", "sgd", "log", "eval"}
ROOMS = ["core", "runs", "data", "models", "quantizers", "objectives", "packing", "conversion", "training", "ensemble"]
ROOMS += ["analysis", "export", "sweep", "report", "api"]


def messages() -> Iterator[str]:
    """Yield every text below the command line that has an option in it, 7 in the place of what is put in."""
    for file in (file for room in ROOMS for file in (PACKAGE / room).rglob("*.py")):
        if file.name in ("bundle_predict.py", "python_words.py"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                documented |= {id(part) for part in node.values}
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "7" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
                text = node.value
            else:
                continue
            if re.search(r"--[a-z]", text):
                yield text


def test_every_message_below_the_command_line_can_be_said_in_python():
    texts = list(messages())
    assert len(texts) > 80
    for text in texts:
        said = python_words(text)
        own = re.sub(COMMAND, "", said)
        assert not re.search(r"--(?!num_processes|logdir)[a-z]", own), said
        assert set(re.findall(r"=\['?([a-z-]+)'?\]|='([a-z-]+)'", own)) <= {("", value) for value in VALUES}, said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("choose another --output", "choose another out="),
        ("--fork-at takes 'start' or a step, not '7'", "fork_at= takes 'start' or a step, not '7'"),
        ("add --resume to go on, or choose another --output", "add resume=True to go on, or choose another out="),
        ("go on with: qtdog train --resume --output a/b", "go on with: qtdog train --resume --output a/b"),
        ("(--set quantizer.exclude=[classifier, LAYER]).", "(quantizer={'exclude': ['classifier', 'LAYER']})."),
        ("a lower learning rate (--lr 1e-05; it was", "a lower learning rate (lr=1e-05; it was"),
        ("go on with --resume (in Python resume=True)", "go on with resume=True"),
        ("name it: --plugin FILE.py (in Python qtdog.load_plugins)", "name it: qtdog.load_plugins"),
        ("or with --num_processes 1", "or with --num_processes 1"),
        ("use --weights none, or a file", "use weights='none', or a file"),
        ("the --backbone that (and its --image-size).", "the backbone= that (and its image_size=)."),
        ("trainings with --skip-unreadable goes on", "trainings with skip_unreadable=True goes on"),
        ("column: --data 'a.csv:site'.", "column: data='a.csv:site'."),
    ],
)
def test_options_become_arguments(text: str, said: str):
    assert python_words(text) == said
    assert python_words(said) == said


def test_a_python_user_reads_the_names_of_arguments(tmp_path: Path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "letter.txt").touch()
    with pytest.raises(RunError, match=r"choose another out=$"):
        qtdog.train(target="75", steps=2, out=occupied, progress=False)
    with pytest.raises(ConfigError, match=r"fork_at= and member_splits= are for several members: add members=5"):
        qtdog.train(target="75", fork_at=3, progress=False)
    with pytest.raises(ConfigError, match="num_directions="):
        qtdog.analyze.flatness([occupied], num_directions=3)
    study = tmp_path / "study.yaml"
    study.write_text("name: a\nmethods: {erm: {}}\ngrid: {target: ['75']}\n")
    with pytest.raises(ConfigError, match=r"only='nothing' means no run"):
        qtdog.sweep(study, only="nothing", out=tmp_path / "runs", progress=False)


def test_the_command_line_keeps_its_options(tmp_path: Path):
    found = CliRunner().invoke(app, ["analyze", "flatness", str(tmp_path), "--num-directions", "3"])
    assert isinstance(found.exception, ConfigError)
    assert "--num-directions" in str(found.exception)
