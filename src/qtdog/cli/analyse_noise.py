"""`qtdog analyse noise`."""

from __future__ import annotations

from qtdog.cli.analyse_common import OUT, AsJson, Out, Runs, labels_of, show, stoppable


def noise(runs: Runs, *, out: Out = OUT, as_json: AsJson = False) -> None:
    """Compare what rounding does to the weights with uniform noise: divergence, symmetry, clipped share, per layer.

    Needs the checkpoint/ folder of each run, where the weights before rounding are. No image is opened.

    Examples:
      qtdog analyse noise runs/lsq

      qtdog analyse noise runs/lsq runs/lsq-4bit --json
    """
    from qtdog.analysis.quantization_noise import ALL, measure_noise
    from qtdog.cli.progress import CountingBar

    folder = out / "noise"
    with stoppable(folder) as check:
        said = measure_noise(runs, labels_of(runs), folder, progress=CountingBar("layers"), check=check)
    columns = ["run", "layer", "n", "kl", "floor", "excess", "mean", "std", "clipped_frac", "moved_frac"]
    show(said, folder, columns, as_json=as_json, shown=lambda row: row["layer"] == ALL)
