"""What does it help to leave out the uncertain images?

Risk is the error of the images that are answered, coverage their share. An uncertainty that is worth something
has a curve that falls to the left.
"""

import csv

import matplotlib.pyplot as plt
import numpy as np

import qtdog

SETTINGS = {"target": "75", "image_size": 12, "lr": 0.01, "steps": 300, "progress": False}
figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
for name, quantizer in (("float", "none"), ("lsq", "lsq")):
    run = qtdog.train(quantizer=quantizer, out=f"runs/{name}", **SETTINGS)
    errors = qtdog.analyze.errors(run, out=f"analyses/{name}", progress=False)
    with open(errors.folder / "points.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["domain"] == run.target]
    rows.sort(key=lambda row: -float(row["confidence"]))
    wrong = np.array([row["label"] != row["predicted"] for row in rows])
    answered = np.arange(1, len(wrong) + 1)
    axes.plot(answered / len(wrong), 100 * wrong.cumsum() / answered, label=name)
    half = len(wrong) // 2
    print(f"{name}: error of all {100 * wrong.mean():.1f} %, of the surest half {100 * wrong[:half].mean():.1f} %")
axes.set(xlabel="coverage", ylabel="risk: error (%)", ylim=(0, None))
axes.legend()
figure.savefig("risk_and_coverage.png", dpi=90)
