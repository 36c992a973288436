"""Where does a network look?

Grad-CAM of the true class, and a test of the maps: does the answer change when the hottest pixels are taken
away? On digits of 12 × 12 pixels the maps are coarse.
"""

import qtdog

SETTINGS = {"target": "75", "image_size": 12, "lr": 0.01, "steps": 300, "progress": False}
runs = [qtdog.train(quantizer="none", out="runs/float", **SETTINGS), qtdog.train(out="runs/lsq", **SETTINGS)]
found = qtdog.analyze.cam(runs, num_images=8, num_shown=4, stage=0, progress=False)
found.plot().save("attention.png")
