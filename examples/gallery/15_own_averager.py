"""A moving average of your own.

An averager watches the weights and may keep others than those of training. This one forgets: an exponential
moving average.
"""

import qtdog
from qtdog.training.averagers import snapshot


@qtdog.register("averager", "ema-of-the-gallery")
class ExponentialAverage(qtdog.Averager):
    """mean ← decay · mean + (1 − decay) · weights, from the start step on."""

    HYPERPARAMETERS = {"decay": qtdog.HyperParameter(0.95, "share of the mean that is kept", low=0.0, high=1.0)}
    mean = None

    def after_step(self, step, network):
        if step < self.begin:
            return
        now = snapshot(network)
        decay = self.params["decay"]
        self.mean = self.mean or now
        for name, value in now.items():
            if value.is_floating_point():
                self.mean[name] = decay * self.mean[name] + (1 - decay) * value

    def evaluated(self):
        return self.mean


SETTINGS = {"target": "75", "image_size": 12, "lr": 0.01, "steps": 300, "progress": False}
run = qtdog.train(averager="ema-of-the-gallery", quantizer="none", out="runs/ema", **SETTINGS)
print(f"target {run.accuracy:.3f}")
run.plot("own_averager.png")
