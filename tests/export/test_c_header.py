"""A C header holds the model: rebuilt from its arrays it gives the same logits; a compiler reads the same numbers."""

import shutil
import subprocess

import pytest
import torch

from qtdog.core.errors import FormatError, ModelError
from qtdog.export.c_header import open_header, save_header
from qtdog.export.export import export
from qtdog.export.packed_source import read_packed_source

PROGRAM = r"""
#include "model.h"
#include <stdio.h>
int main(void) {
    for (int i = 0; i < QTDOG_WEIGHTS_N; i++) {
        const qtdog_weight *w = &qtdog_weights[i];
        long size = 1, inner = 1;
        for (int d = 0; d < w->ndim; d++) size *= w->dims[d];
        for (int d = w->axis + 1; d < w->ndim; d++) inner *= w->dims[d];
        double sum = 0;
        for (long k = 0; k < size; k++) {
            long s = 0;
            if (w->axis >= 0) {
                long group = k / (size / w->groups);
                s = (w->groups > 1 ? group * w->dims[w->axis] : 0) + k / inner % w->dims[w->axis];
            }
            float unit = w->points ? w->points[w->codes[k] - w->qmin] : (float)w->codes[k];
            float value = unit * w->scale[s];
            sum += value * (double)(k % 17 + 1);
        }
        printf("%s %.17g\n", w->name, sum);
    }
    printf("%s %d %d\n", qtdog_classes[0], QTDOG_N_CLASSES, QTDOG_IMAGE_SIZE);
    return 0;
}
"""


@pytest.mark.parametrize("options", [{}, {"quantizer": "dorefa"}, {"quantizer": "inq", "stages": (1.0,), "bits": 4}])
def test_the_model_of_a_header_gives_the_same_logits_bit_for_bit(options, source, photos, tmp_path):
    made = export(source("test_resnet", accept=0.4, **options), tmp_path / "model.h", "c", photos)
    assert made.parity.agreement_frac == 1
    assert made.parity.max_difference == {"logits": 0.0, "probabilities": 0.0, "accept": 0.0}


def test_an_ensemble_stands_in_one_header(ensemble_file, photos, tmp_path):
    made = export(read_packed_source(ensemble_file), tmp_path / "model.h", "c", photos)
    assert max(made.parity.max_difference.values()) == 0


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.parametrize("options", [{}, {"granularity": "layer"}, {"quantizer": "dorefa"}])
def test_a_compiler_reads_the_weights_that_torch_has(options, source, tmp_path):
    packed = source("test_resnet", **options)
    save_header(packed, None, tmp_path / "model.h", packed.info("c"))
    (tmp_path / "main.c").write_text(PROGRAM)
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-Wno-unused-variable", "-Wno-unused-const-variable"]
    subprocess.run(["cc", *strict, "main.c", "-o", "main"], cwd=tmp_path, check=True)
    lines = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines.pop() == "bird 3 32"
    codes = packed.codes()
    assert len(lines) == len(codes) > 5
    for line in lines:
        name, total = line.split()
        values = codes[name].dequantize().contiguous().double().reshape(-1)
        expected = (values * (torch.arange(len(values)) % 17 + 1)).sum().item()
        assert float(total) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_changed_or_cut_header_is_refused(source, photos, tmp_path):
    packed = source("test_resnet")
    path = tmp_path / "model.h"
    export(packed, path, "c", photos)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(FormatError):
        open_header(path, 1)
    path.write_text(text.replace("static const int8_t qtdog_codes_0[", "static const int8_t qtdog_codes_0[1", 1))
    with pytest.raises(FormatError, match="damaged"):
        open_header(path, 1)
    path.write_text("/* nothing */\n")
    with pytest.raises(FormatError, match="does not say what it is"):
        open_header(path, 1)


def test_rounded_activations_are_refused_as_the_header_has_no_grids(source, photos, tmp_path):
    with pytest.raises(ModelError, match=r"rounded activations.*onnx-int8"):
        export(source("test_resnet", activations=8), tmp_path / "model.h", "c", photos)
    assert not list(tmp_path.glob("model*"))
