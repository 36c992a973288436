"""Models measured beside one another: what is counted is true, and an interrupt or a bad file leaves nothing behind."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading

import numpy as np
import pytest

from qtdog.conversion.attach import attach
from qtdog.conversion.save import bake
from qtdog.core.errors import ConfigError, FormatError, RunError
from qtdog.export.benchmark import BenchmarkPlan, bench, choose_runtimes, file_bytes, model_file, plot_bench
from qtdog.export.benchmark_measures import Turn, count_operators, cpu_features, pareto, timing_of
from qtdog.export.benchmark_worker import WORKER, BenchmarkJob, ModelFacts, Worker, serve
from qtdog.export.export import export
from qtdog.export.packed_source import read_packed_source
from qtdog.export.parity import LabelledImages
from qtdog.export.runtimes import open_runtime
from qtdog.models.backbones import create_network, preprocessing
from qtdog.packing.ensemble_file import save_ensemble
from qtdog.packing.packed_file import PackedModel, save_packed

SIZE = 12


def packed(seed):
    network = create_network(
        "digits_cnn", n_classes=10, channels=1, image_size=SIZE, weights="none", freeze_bn=True, seed=seed
    )
    attach(network, bits=7, exclude=("classifier",)).enable()
    mean, std = preprocessing("digits_cnn", channels=1)
    baked = bake(network)
    told = {"image_size": SIZE, "channels": 1, "mean": mean, "std": std}
    metadata = {"backbone": "digits_cnn", "classes": list("0123456789"), "preprocessing": told, "pretraining": "none"}
    metadata |= {"source_domains": ["0"], "target_domain": "75", "accuracy": {}, "bits": 7, "step": seed}
    return PackedModel(baked.quantized, baked.rest, metadata | {"config_hash": "0"})


def random_images(n=40):
    pixels = np.random.default_rng(0).integers(0, 256, (n, SIZE, SIZE, 1), dtype=np.uint8)
    return LabelledImages(pixels, np.zeros(n, dtype=np.int64), ("0",))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make a packed model in a run's folder, an ensemble of three, and an ONNX file of the model."""
    folder = tmp_path_factory.mktemp("models")
    one = packed(0)
    save_packed(folder / "run" / "model.safetensors", one.quantized, one.rest, one.metadata)
    about = {"kind": "eoq", "accuracy": {}, "training_steps": 1, "training_runs": 1.0}
    save_ensemble(folder / "three.safetensors", [packed(seed) for seed in range(3)], about)
    export(read_packed_source(folder / "run" / "model.safetensors"), folder / "one.onnx", "onnx", random_images())
    return folder


def test_ratios_are_made_within_a_round():
    slow = [Turn((0.2, 0.4), 0.5), Turn((2.0,), 2.0), Turn((0.3,), 0.3)]
    fast = [Turn((0.1, 0.1), 0.1), Turn((1.0,), 1.0), Turn((0.3,), 0.1)]
    timing = timing_of(slow, fast, batch=4)
    assert (timing.ratio.low, timing.ratio.median, timing.ratio.high) == pytest.approx((1.5, 2.0, 2.5))
    assert timing.cpu_ratio.median == pytest.approx(3.0)
    assert timing.p50_s == pytest.approx(0.35)
    assert timing.images_per_s == pytest.approx(4 * 4 / 2.9)
    assert (timing.n_calls, timing.n_rounds) == (4, 3)
    assert timing_of(fast, fast, batch=1).ratio.median == 1


def test_the_pareto_front_is_what_nothing_beats():
    costs, losses = [3.0, 1.0, 2.0, 2.0, 4.0], [1.0, 5.0, 2.0, 3.0, 1.0]
    assert pareto(costs, losses) == [1, 2, 0]


def test_processor_features_of_both_families():
    assert cpu_features("processor: 0\nflags\t: fpu avx2 avx512_vnni\n") == ("avx2", "avx512_vnni")
    assert cpu_features("Features : fp asimd asimddp i8mm") == ("asimddp", "i8mm")
    assert cpu_features("") == ()


@pytest.mark.stress
def test_memory_that_is_given_back_counts_for_the_peak():
    # in a process of its own: in one that runs tests, pages come and go beside it
    lines = [
        "import numpy as np",
        "from qtdog.export.benchmark_measures import peak_memory, reset_peak_memory",
        "before = reset_peak_memory()",
        "block = np.ones(200_000_000, dtype=np.uint8)",
        "del block",
        "print(peak_memory() - before)",
    ]
    told = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True)
    assert 150_000_000 <= int(told.stdout) < 300_000_000


def ask(job, *requests):
    """Serve a job in this thread while another one asks, and return all answers."""
    here, there = multiprocessing.Pipe()
    answers = []

    def client():
        for request in (job, *requests):
            here.send(request)
            answers.append(here.recv())
        here.close()

    thread = threading.Thread(target=client)
    thread.start()
    try:
        serve(there)
    finally:
        thread.join()
    return answers


@pytest.mark.parametrize(("name", "runtime"), [("run/model.safetensors", "torch"), ("one.onnx", "onnxruntime")])
def test_a_worker_tells_times_and_answers_as_the_model_does(files, name, runtime):
    images = random_images().pixels
    opened, turn, logits = ask(BenchmarkJob(files / name, runtime, 1, 2, None), "time", images)
    assert isinstance(opened, ModelFacts)
    assert (opened.image_size, opened.info.n_members) == (SIZE, 1)
    assert opened.peak_bytes > opened.model_bytes >= 0  # 0 where a small model fits into memory that was free
    assert sum(turn.seconds) >= 0.15
    assert 0 < turn.cpu_s < 2 * sum(turn.seconds) + 0.1
    expected = open_runtime(files / "run" / "model.safetensors")(images)["logits"]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_worker_sends_what_a_user_can_mend(files, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"no model")
    assert isinstance(ask(BenchmarkJob(tmp_path / "bad.safetensors", "torch", 1, 1, None))[0], FormatError)
    error = ask(BenchmarkJob(files / "one.onnx", "onnxruntime", 1, 1, 16))[0]
    assert isinstance(error, ConfigError)
    assert "1 images of 16 pixels" in str(error)
    assert "made for 12 pixels" in str(error)


@pytest.mark.stress
def test_memory_of_a_model_is_counted_behind_the_libraries(files):
    with Worker(BenchmarkJob(files / "one.onnx", "onnxruntime", 1, 1, None)) as worker:
        one = worker.opened
    with Worker(BenchmarkJob(files / "one.onnx", "onnxruntime", 1, 1024, None)) as worker:
        many = worker.opened
    assert 0 <= one.model_bytes < 50e6 < one.peak_bytes
    assert many.model_bytes > one.model_bytes + 20e6  # 1,024 images: 38 MB at the first convolution alone


def test_operators_of_the_file_and_of_the_runtime(files):
    onnx = count_operators(open_runtime(files / "one.onnx"))
    assert onnx.in_file["Conv"] == 4
    assert onnx.n_in_runtime is not None
    assert onnx.n_in_runtime < onnx.n_in_file
    openvino = count_operators(open_runtime(files / "one.onnx", runtime="openvino"))
    assert openvino.in_file == onnx.in_file
    assert openvino.in_runtime
    assert "Constant" not in openvino.in_runtime
    eager = count_operators(open_runtime(files / "run" / "model.safetensors"))
    assert eager.in_file["Conv2d"] == onnx.in_file["Conv"]
    assert eager.n_in_runtime is None


@pytest.mark.stress
def test_models_beside_one_another_until_an_interrupt(files, tmp_path):
    seen = []

    def progress(done, total):
        seen.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    given = [files / "run", files / "three.safetensors"]
    plan = BenchmarkPlan(threads=1, n_rounds=100)
    found = bench(given, plan, images=lambda opened: random_images(), progress=progress)
    assert found.interrupted
    assert seen == [(1, 100), (2, 100), (3, 100)]
    one, three = found.rows
    assert [row.label for row in found.rows] == ["run", "three.safetensors"]
    assert (one.n_members, three.n_members) == (1, 3)
    assert (one.timing.n_rounds, one.timing.ratio.median) == (3, 1)
    assert 1.2 < three.timing.cpu_ratio.median < 6
    assert one.file_bytes == (files / "run" / "model.safetensors").stat().st_size
    logits = open_runtime(files / "three.safetensors")(random_images().pixels)["logits"]
    assert three.accuracy == pytest.approx((logits.argmax(1) == 0).mean())
    assert json.loads(json.dumps(found.to_json()))["machine"]["cpu"]
    plot_bench(found, tmp_path / "new" / "x.png")
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")


def failing(code):
    """Return the command of a worker that runs some code before it serves."""
    return (*WORKER[:-1], f"import os, signal, sys; {code}; {WORKER[-1]}")


DIES = "from qtdog.export.benchmark_worker import ModelUnderTest; ModelUnderTest.turn = lambda self: {}"


@pytest.mark.stress
@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("print('no luck', file=sys.stderr); sys.exit(3)", "exit code 3.* Its last lines:\n  no luck"),
        ("os.abort()", "SIGABRT. It wrote nothing"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"SIGKILL \(out of memory\?\)"),
        (DIES.format("1 / 0"), "exit code 1.*ZeroDivisionError"),
        ("signal.signal(signal.SIGPIPE, signal.SIG_IGN); os.close(int(sys.argv[1])); sys.exit(4)", "exit code 4"),
    ],
)
def test_the_death_of_a_process_is_told_with_its_last_lines(files, code, how):
    text = rf"(?s)the process that ran .*three.safetensors in torch .*{how}"
    with pytest.raises(RunError, match=text):
        bench([files / "three.safetensors"], BenchmarkPlan(threads=1, n_rounds=1), command=failing(code))


@pytest.mark.stress
def test_nothing_is_imported_from_the_current_folder(files, tmp_path, monkeypatch):
    trap = "open('CODE_WAS_RUN', 'a').close(); raise ImportError('x')"
    for name in ("timm", "multiprocessing", "safetensors", "torch", "subprocess"):
        (tmp_path / f"{name}.py").write_text(trap)
    monkeypatch.chdir(tmp_path)
    assert bench([files / "run"], BenchmarkPlan(threads=1, n_rounds=1)).rows[0].timing.n_rounds == 1
    assert not (tmp_path / "CODE_WAS_RUN").exists()


def test_paths_and_runtimes(files, tmp_path):
    assert model_file(files / "run") == files / "run" / "model.safetensors"
    with pytest.raises(FormatError, match=r"missing.onnx does not exist"):
        model_file(tmp_path / "missing.onnx")
    with pytest.raises(FormatError, match=r"model.safetensors does not exist"):
        model_file(tmp_path)
    with pytest.raises(ConfigError, match="no runtime is called 'onnx'"):
        choose_runtimes(files / "one.onnx", ["onnx"])
    assert choose_runtimes(files / "one.onnx", ["openvino", "onnxruntime"]) == ("openvino", "onnxruntime")
    (tmp_path / "a.xml").write_bytes(bytes(10))
    (tmp_path / "a.bin").write_bytes(bytes(100))
    assert file_bytes(tmp_path / "a.xml") == 110
