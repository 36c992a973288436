"""Every command and program of the pages runs here at a small scale, in the order of its page, but those of NOT_RUN."""

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import qtdog
from qtdog.cli.main import main
from qtdog.sweep.local import run_task
from qtdog.sweep.plan import make_plan
from qtdog.sweep.study import read_study
from qtdog.training.plugins import forget_plugins
from qtdog.training.run import RunCallbacks

ROOT = Path(__file__).parents[2]
OUTPUTS = runpy.run_path(str(ROOT / "docs/make/outputs.py"))
FOUND = runpy.run_path(str(ROOT / "tests/docs/test_docs.py"))

# Commands that cannot run here, found by a pattern, and why.
NOT_RUN = {
    r"^make ": "makes environments, runs this suite",
    r"pip install|python3 -m venv|^npm |qtdog data fetch": "needs a network",
    r"--web package/dist": "needs onnxruntime-web from a network; tests/browser has the page",
    r"--backbone deit_small|model\.head=text|torchvision/resnet50": "needs pretrained weights from a network",
    r"--weights resnet18\.pth": "needs pretrained weights from a network; tests/models has such files",
    r"\.pte\b": "needs executorch; tests/export has the format where it is installed",
    r"^(?!.*--dry-run).*--gpus 1|^ray start": "needs a GPU or a cluster; tests/sweep has the engines",
    r"qtdog analyze hessian": "takes ten seconds; tests/cli/test_analyze.py runs it",
    r"^accelerate |^torchrun ": "starts several processes; tests/training has them",
    r"^qtdog bench": "starts a process for each model, half a minute in all; tests/export/test_benchmark.py has them",
    r"qtdog demo|qtdog reproduce table01 --dataset PACS --only ERM": "tests/cli/test_reproduce.py runs it",
}
# Pages whose blocks another test runs, or whose commands take hours on data that are not here.
ELSEWHERE = {
    "docs/tasks/photographs.md": "test_photographs_page.py",
    "docs/developer/extend.md": "test_the_members_of_ones_own_train_together",
    "docs/api/data.md": "test_data_pages.py",
}
HOURS = "docs/results/"  # how numbers were measured: parsed by test_docs.py

SMALLER = {
    r"steps=\d+": "steps=4",
    r'"steps": \d+': '"steps": 4',
    r"train\.steps: \d+, train\.eval_every: \d+": "train.steps: 4, train.eval_every: 1",
    r"--num \d+": "--num 160",
    r"probe_steps=\d+": "probe_steps=2",
    r"merge_every=\d+": "merge_every=2",
    r"--members 5": "--members 2",
    r"--tune \d+": "--tune 4",
    r"--preset average-then-quantize": "--preset average-then-quantize --set 'averager.params={start: 2}'",
    r"tf_efficientnet_lite2": "tf_efficientnet_lite0",
    r"list backbones convnext": "list backbones convnext_atto_ols",
    r'target: \["0", "75"\]': 'target: ["75"]',
    r"seed: 0\.\.2": "seed: 0..1",
    r'preset="pacs-lite"': 'backbone="digits_cnn", weights="none", image_size=12, batch_size=2',
    r'"init_seed": 0}': '"init_seed": 0}, "train": {"steps": 4}',
    r"flatness\(\[([^]]*)\]\)": r"flatness([\1], num_directions=4, radii=[0, 1], num_images=8)",
}
TINY = {"model.backbone": "digits_cnn", "model.weights": "none", "data.image_size": 12, "data.batch_size": 2}
TINY |= {"optimizer.lr": 0.01, "train.steps": 10}
TINY_TEXT = {"model.backbone": "distilbert-mini", "model.weights": "none", "data.max_tokens": 8, "data.batch_size": 4}
TINY_TEXT |= {"train.steps": 4}
FEW = {
    "analyze flatness": "--num-directions 4 --radii 0 --radii 1 --num-images 8",
    "analyze hessian": "--num-vectors 10 --num-eigenvalues 1 --num-probes 2 --num-images 4",
    "analyze surface": "--num-points 3 --num-images 8",
    "analyze cam": "--num-images 4 --num-shown 2",
    "analyze errors": "--num-images 4 --num-mistakes 2",
    "bits": "--candidates 7,4 --brief-steps 2 --num-directions 4 --num-vectors 2",
    "demo": "--steps 4",
}
MAY_FAIL = r"qtdog compare|qtdog data (verify|import)"  # an exit code of 1 is an answer there
# What a page takes for granted and the folder of all pages lacks.
BEFORE = {
    "docs/tasks/report.md": ["analyze stability runs/lsq"],
    "docs/tasks/text.md": [
        f"train --data amazon-reviews --target unseen --preset paper/amazon --seed {seed} -o runs/reviews-{seed}"
        for seed in (0, 1)
    ],
}


# What pages read and add to, but do not change: 900 files, which each page would else write and remove again.
ONLY_READ = ("photos", "new-sites", "other-things", "runs/pacs", "runs/search", "old")


def copy_of(template: Path, folder: Path) -> None:
    """Copy the folder of all pages; large parts that pages do not change are linked file by file."""

    def copy_file(source: str, to: str) -> str:
        linked = Path(source).relative_to(template).as_posix().startswith(ONLY_READ)
        return os.link(source, to) or to if linked else shutil.copy2(source, to)

    shutil.copytree(template, folder, symlinks=True, copy_function=copy_file)


def smaller(block: str) -> str:
    for pattern, text in SMALLER.items():
        block = re.sub(pattern, text, block)
    return block


def assignments(values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def small(words: list[str]) -> list[str]:
    """Return the arguments of qtdog with those that make its work small."""
    name = " ".join(words[: 2 if words[0] in ("analyze", "sweep", "data") else 1])
    more = FEW.get(name, "").split()
    trains = name in ("train", "distill", "dart", "bits", "reproduce") and len(words) > 1
    if trains and "--resume" in words and "--data" not in words:
        return words  # as the saved configuration says
    if trains and ("--data" in words or name != "train"):
        tiny = TINY_TEXT if "amazon-reviews" in words else TINY
        left_out = "model.weights" if "--weights" in words and "none" not in words else ""
        more += assignments({key: value for key, value in tiny.items() if key != left_out})
        if name == "reproduce" or re.search("paper/|domainbed", " ".join(words)):
            more += ["--set", "quantizer.start_step=2"]
    elif trains:
        more += ["--steps", "4"]
    if name == "reproduce" and len(words) > 1:
        more += ["--data", "photos/"]
    return [*words, *more]


def do_here(words: list[str]) -> None:
    """Make the runs of a sweep in this process: the command then finds them finished, and starts no other."""
    study = read_study(Path(words[1]))
    data = words[words.index("--data") + 1] if "--data" in words else None
    plan = make_plan(study, data)
    for task in plan.tasks:
        assert run_task(task, Path("runs") / study.name, plan.dataset, RunCallbacks()).status == "done"


def run_qtdog(words: list[str]) -> int:
    if words[0] == "sweep" and Path(words[1]).is_file() and "--dry-run" not in words:
        do_here(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qtdog", *small(words)])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def in_this_process(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Return a shell that knows qtdog, python FILE and ls, without starting a process for each."""

    prepared = {str(path) for path in Path("runs").glob("*")}

    def shell(block: str) -> str:
        capsys.readouterr()
        for line in lines_of(block):
            if reason_not_to_run(line):
                continue
            program, *words = shlex.split(line, comments=True)
            end = next((i for i, word in enumerate(words) if re.match(r"\d?>", word)), len(words))
            arguments = words[:end]
            if program == "qtdog":
                arguments = [path for word in arguments for path in expanded(word)]
                make_room(arguments, prepared)
                code = run_qtdog(arguments)
                assert code in ((0, 1) if re.search(MAY_FAIL, line) else (0,)), f"{line}\n{capsys.readouterr().err}"
            elif program == "python":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", [*arguments])
                    runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
            else:
                assert program == "ls", line
                assert all(list(Path().glob(word)) for word in arguments), line
        return capsys.readouterr().out

    return shell


def expanded(word: str) -> list[str]:
    return sorted(map(str, Path().glob(word))) or [word] if re.search(r"\w/.*\*", word) else [word]


def make_room(words: list[str], prepared: set[str]) -> None:
    """Remove a run folder of other pages that this page makes itself."""
    if words[0] == "train" and "-o" in words and "--resume" not in words:
        folder = words[words.index("-o") + 1]
        if folder in prepared:
            prepared.remove(folder)
            shutil.rmtree(folder)


def lines_of(block: str) -> list[str]:
    lines = (line.strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def reason_not_to_run(line: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, line)), None)


@pytest.fixture
def no_plugins() -> Any:
    forget_plugins()
    yield
    forget_plugins()


def photograph(path: Path, *, seed: int, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(level, level + 90, (14, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def make_photos(folder: Path, sites: list[str], *, n: int, seed: int) -> list[str]:
    """Write n photographs of each of two classes at each site, and return the rows of a list of them."""
    rows = []
    for site in sites:
        for label, name in enumerate(("benign", "malignant")):
            for k in range(n):
                seed += 1
                photograph(folder / site / name / f"{k}.png", seed=seed, level=110 * label)
                camera = ("phone", "scanner", "microscope")[k % 3]
                rows.append(f"{site}/{name}/{k}.png,{name},{site},{camera}")
    return rows


def make_reviews(folder: Path) -> None:
    """Write reviews of six authors, two of them unseen, in the format of WILDS."""
    (folder / "splits").mkdir(parents=True)
    rows = [(author, review % 5 + 1, review) for author in range(6) for review in range(6)]
    reviews = [f"U{author},{stars}.0,{stars} stars for this box" for author, stars, _ in rows]
    splits = [str(3 if author > 3 else (0, 0, 0, 0, 2, 4)[review]) for author, _, review in rows]
    (folder / "reviews.csv").write_text("\n".join(["reviewerID,overall,reviewText", *reviews]) + "\n")
    (folder / "splits/user.csv").write_text("\n".join(["split", *splits]) + "\n")


STUDY = """\
name: {name}
data: {data}
base:
  presets: [digits]
  set: {{data.image_size: 8, data.batch_size: 2, train.steps: 4}}
methods:
  float: {{presets: [float]}}
  lsq: {{presets: [lsq]}}
grid: {{target: ["{target}"], seed: 0..1}}
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, study: Path, domainbed: Path) -> Path:
    """Return a folder with what the pages speak of: photographs, studies, runs of other pages; not to be changed."""
    folder = tmp_path_factory.mktemp("pages")
    rows = make_photos(folder / "photos", [f"hospital_{letter}" for letter in "abcd"], n=6, seed=0)
    (folder / "photos/list.csv").write_text("\n".join(["path,class,domain,camera", *rows]) + "\n")
    make_photos(folder / "new-sites", ["hospital_e", "hospital_f"], n=3, seed=1000)
    make_photos(folder / "other-things", ["chairs"], n=3, seed=2000)
    for k, name in enumerate(("photo.jpg", "a.jpg", "new-site/a.png", "new-site/b.png")):
        photograph(folder / name, seed=3000 + k, level=40)
    (folder / "studies").mkdir()
    (folder / "studies/digits.yaml").write_text(STUDY.format(name="digits", data="rotated-digits", target="75"))
    (folder / "studies/pacs.yaml").write_text(STUDY.format(name="pacs-study", data="photos/", target="hospital_c"))
    shutil.copytree(study, folder / "runs/pacs")
    shutil.copytree(study, folder / "runs/search")
    (folder / "old/sweep").mkdir(parents=True)
    shutil.copy(domainbed, folder / "old/sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train = "train --data photos/ --target hospital_c"
        for more in ("-o runs/photos-c", "-o runs/lsq", "--quantizer none -o runs/float", "--members 3 -o runs/five"):
            assert run_qtdog([*train.split(), *more.split()]) == 0
        for name, seed in (("a", 0), ("b", 1), ("c", 2)):
            shutil.copytree(f"runs/five/hospital_c-seed{seed}", f"runs/{name}")
        do_here(["sweep", "studies/digits.yaml"])
        shutil.copytree("runs/digits", "other/runs/digits")
    row = {"path": "runs/pacs/lsq-photo-0/model.onnx", "runtime": "onnxruntime", "timing": {"p50_s": 0.004}}
    bench = {"rows": [row], "batch": 1, "threads": 1, "machine": {"cpu": "a processor"}}
    (folder / "bench").mkdir()
    (folder / "bench/bench.json").write_text(json.dumps(bench))
    make_reviews(folder / "data/amazon-reviews")
    make_photos(folder / "old/PACS/kfold", ["art_painting", "cartoon"], n=3, seed=4000)
    return folder


def check_after_training(names: dict[str, Any]) -> None:
    saved = qtdog.load_into("model.safetensors", timm.create_model("mobilenetv3_small_050", num_classes=7))
    images = names["batches"][0]
    assert torch.equal(saved(images), names["model"].eval()(images))


def check_own_loop(names: dict[str, Any]) -> None:
    images = names["batches"][0][0]
    saved = qtdog.load_into("model.safetensors", timm.create_model("resnet18", num_classes=7))
    assert torch.equal(names["saved"](images), saved(images))
    assert Path("model.safetensors").stat().st_size < 0.3 * 4 * 11_180_103  # parameters of ResNet-18, 7 classes


def check_quantizers(names: dict[str, Any]) -> None:
    assert {quantizer.spec.bits for quantizer in names["quantizers"].layers.values()} == {5, 8}


CHECKS = {
    "docs/tasks/after-training.md": check_after_training,
    "docs/tasks/own-loop.md": check_own_loop,
    "docs/tasks/quantizers.md": check_quantizers,
}
N_OUTPUTS = {
    "README.md": 2,
    "docs/quickstart.md": 6,
    "docs/tutorials/engineer.md": 7,
    "docs/tutorials/researcher.md": 5,
}
PAGES = [
    FOUND["name_of"](page)
    for page in FOUND["PAGES"]
    if re.search(r"^```(bash|python)", page.read_text(), re.MULTILINE)
    and FOUND["name_of"](page) not in ELSEWHERE
    and not FOUND["name_of"](page).startswith(HOURS)
]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("no_plugins", "one_registry")
@pytest.mark.filterwarnings("ignore")  # of so short runs
def test_a_page_runs(
    page: str, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "page"
    copy_of(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("QTDOG_DATA", str(folder / "data"))
    if page == "docs/tutorials/engineer.md":
        shutil.rmtree("photos")  # it makes its own
    if page == "docs/tasks/clusters.md":
        Path("data/pacs").symlink_to("../photos")
    if page == "docs/tasks/python.md":
        Path("runs/c").rename("runs/d")
    for command in BEFORE.get(page, []):
        assert run_qtdog(command.split()) == 0, capsys.readouterr().err
    if page == "docs/tasks/text.md":
        shutil.copytree("runs/reviews-0", "runs/reviews")
        Path("today.txt").write_text("five stars\none star\n")
    names: dict[str, Any] = {}
    text = (ROOT / page).read_text()
    made = OUTPUTS["run_page"](text, in_this_process(capsys), smaller, every=True, names=names)
    if page in CHECKS:
        CHECKS[page](names)
    blocks = re.findall(r"^```text\n(.*?)^```", made, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= N_OUTPUTS.get(page, 0)
    assert all(block.strip() for block in blocks), "write the outputs: python docs/make/outputs.py PAGE"


def test_most_commands_run_and_the_others_are_named():
    commands = {
        FOUND["name_of"](page): [
            line for block in FOUND["blocks"](page.read_text(), "bash") for line in lines_of(block)
        ]
        for page in FOUND["PAGES"]
    }
    here = [line for page, lines in commands.items() if not page.startswith(HOURS) for line in lines]
    not_run = [line for line in here if reason_not_to_run(line)]
    hours = sum(len(lines) for page, lines in commands.items() if page.startswith(HOURS))
    said = f"{len(here) - len(not_run)} commands run, {len(not_run)} cannot here, {hours} take hours ({HOURS})"
    print(said)
    assert len(not_run) < len(here) / 4, said
    for pattern in NOT_RUN:
        assert any(re.search(pattern, line) for line in not_run), pattern
    for page in (*ELSEWHERE, *N_OUTPUTS, *CHECKS, *BEFORE):
        assert (ROOT / page).is_file(), page


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
