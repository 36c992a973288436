import pytest


@pytest.mark.parametrize("target", ["75", "none"])
def test_the_command_line_quantizes_after_training_and_says_what_it_cost(qtdog, tmp_path, target):
    flags = ["--target", target, "--batch-size", 4, "--image-size", 12, "--steps", 2, "--out", tmp_path / "run"]
    presets = ["--preset", "digits", "--preset", "gptq", "--set", "quantizer.calibration_images=20"]
    done = qtdog("train", *presets, *flags)
    assert done.code == 0, done.err
    assert "erm + gptq 7 bit" in done.out
    assert "in float, before quantization: source" in done.out
    assert "of the validation images answered" in done.out
    assert ("of the test images answered" in done.out) == (target == "75")
    assert ("test –" in done.out) == (target == "none")
    assert (tmp_path / "run" / "model.safetensors").is_file()
