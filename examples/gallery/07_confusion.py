"""Where does a run err?

A confusion matrix with counts for every domain; the tables name the worst domain and the worst class.
"""

import qtdog

run = qtdog.train(target="75", image_size=12, lr=0.01, steps=300, out="runs/lsq", progress=False)
found = qtdog.analyze.errors(run, progress=False)
print([path.name for path in found.figures])
found.plot().save("confusion.png")
