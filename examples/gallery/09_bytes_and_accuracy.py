"""Accuracy against the size of the file.

One run for each number of bits. The size is that of the file on disk, everything counted.
"""

import matplotlib.pyplot as plt

import qtdog

SETTINGS = {"target": "75", "image_size": 12, "lr": 0.01, "steps": 300, "progress": False}
runs = {f"{bits} bit": qtdog.train(bits=bits, out=f"runs/{bits}-bit", **SETTINGS) for bits in (3, 5, 7)}
runs["float"] = qtdog.train(quantizer="none", out="runs/float", **SETTINGS)

figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
for name, run in runs.items():
    kilobytes = run.summary()["bytes"] / 1000
    print(f"{name}: {kilobytes:.1f} kB, target {run.accuracy:.3f}")
    axes.plot(kilobytes, 100 * run.accuracy, "o")
    beside = {"3 bit": (-32, -3), "7 bit": (6, -13)}.get(name, (6, 5))  # points; the three lie close together
    axes.annotate(name, (kilobytes, 100 * run.accuracy), beside, textcoords="offset points")
axes.set(xscale="log", xlim=(9, 150), ylim=(75, 90), xlabel="file (kB)", ylabel="accuracy on the target (%)")
axes.set_xticks([10, 20, 50, 100], labels=["10", "20", "50", "100"])
axes.minorticks_off()
figure.savefig("bytes_and_accuracy.png", dpi=90)
