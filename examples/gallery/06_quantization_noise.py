"""Is rounding like uniform noise?

For every layer, (rounded − latent weight) / step size against the uniform law on [−½, ½].
"""

import qtdog

run = qtdog.train(target="75", image_size=12, lr=0.01, steps=300, out="runs/lsq", progress=False)
found = qtdog.analyze.noise(run, progress=False)
found.plot().save("quantization_noise.png")
