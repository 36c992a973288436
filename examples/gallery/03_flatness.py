"""Flatness: how fast does the loss rise away from the weights?

All weights move together by γ in a random direction. A flat minimum has a low curve (QT-DoG, Eq. 5).
"""

import qtdog

SETTINGS = {"target": "75", "image_size": 12, "lr": 0.01, "steps": 300, "progress": False}
runs = [qtdog.train(quantizer="none", out="runs/float", **SETTINGS), qtdog.train(out="runs/lsq", **SETTINGS)]
found = qtdog.analyze.flatness(
    runs, num_directions=6, radii=[0, 1, 2, 3, 4], filter_radii=[], num_images=60, progress=False
)
found.plot().save("flatness.png")
