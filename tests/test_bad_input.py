"""Errors of users: one line on standard error, exit code 2, no file written."""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torchvision.utils import save_image

from tests.conftest import DISTILL, ROOT, TARGET, run_command
from utils import cli, device, distributed, files
from utils.errors import UserError


@pytest.fixture
def get_error(capsys, roots):
    """Return a function that runs a script which must fail, and returns its one-line error."""

    def call(script, *flags):
        with pytest.raises(SystemExit) as stop:
            cli.run(importlib.import_module(script).main, [*map(str, flags), *roots])
        shown = capsys.readouterr().err
        # Progress bars do not count.
        lines = [line for line in shown.splitlines() if line.strip() and "it/s]" not in line]
        assert stop.value.code == 2 and len(lines) == 1 and "error: " in lines[0]
        return lines[0]

    return call


def test_error_has_no_traceback(roots):
    done = run_command("distill.py", "--source", "no_such_set", *roots, check=False)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "unknown data set no_such_set" in done.stderr
    )


def test_unknown_source_error_lists_the_data_sets(get_error):
    for script in ("pretrain_target", "distill"):
        line = get_error(script, "--source", "cifar11")
        assert "unknown data set cifar11" in line and "cifar10" in line


@pytest.mark.parametrize(
    ("name", "needed"), [("tinyimagenet", "tiny-imagenet-200"), ("imagenet", "imagenet")]
)
def test_missing_data_set_error_names_the_archive_and_its_folder(
    get_error, name, needed, data_root
):
    line = get_error("pretrain_target", "--source", name)
    assert needed in line and str(data_root) in line


def test_more_distilled_images_than_real_ones(get_error):
    line = get_error("distill", "--source", "digits", "--num-images", "1438")
    assert "1438" in line and "1437" in line


def test_empty_folder(get_error, tmp_path):
    (tmp_path / "notes.txt").write_text("no image here")
    assert "no image" in get_error("pretrain_target", "--source", tmp_path)


def test_folder_without_permission(get_error, tmp_path, monkeypatch):
    def denied(path):  # a test that runs as root can read every folder
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    assert f"{tmp_path}: no permission" in get_error("pretrain_target", "--source", tmp_path)


def test_folder_of_broken_images(get_error, tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    assert "1 of 1 images cannot be decoded" in get_error("pretrain_target", "--source", tmp_path)


def test_missing_target_error_names_the_command(get_error, tmp_path):
    line = get_error("distill", "--source", "digits", "--target-network", tmp_path / "none.pt")
    assert "pretrain_target.py --source digits" in line


def test_target_of_another_source_or_size(get_error, tmp_path, runs, distilled, data_root):
    path = runs / "target" / "seed0" / "target.pt"
    assert "another image size (32, not 48)" in get_error(
        "distill", "--image-size", "48", "--target-network", path, *DISTILL
    )
    for split in ("train", "test"):
        for c in "ab":
            folder = data_root / "other" / split / c
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(12):
                save_image(torch.rand(3, 32, 32), folder / f"{i}.png")
    line = get_error(
        "distill", "--source", "other", "--image-size", "32", "--target-network", path, *DISTILL
    )
    assert "another source (digits, not other)" in line
    assert "not a target file (found: distilled)" in get_error(
        "distill", "--target-network", distilled, *DISTILL
    )


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04half a zip", b"plain text", b"a,b,c\n1,2,3\n"]
)
def test_unreadable_distilled_file(get_error, tmp_path, content):
    path = tmp_path / "distilled.pt"
    path.write_bytes(content)
    assert "not a readable distilled file" in get_error("pretrain", "--distilled", path)
    assert "no such file" in get_error("pretrain", "--distilled", tmp_path / "nowhere.pt")


def test_distilled_file_of_another_image_size_than_the_student(
    get_error, tmp_path, weights, distilled, runs
):
    content = files.load(distilled, "distilled")
    content = {name: value for name, value in content.items() if name not in ("kind", "format")}
    files.save(tmp_path / "d.pt", "distilled", content | {"images": torch.randn(20, 3, 64, 64)})
    flags = ["--weights", weights, "--teacher", weights, "--dataset", "digits"]
    assert "64 px, the student takes 32 px" in get_error(
        "kd", *flags, "--distilled", tmp_path / "d.pt"
    )
    files.save(tmp_path / "small.pt", "distilled", content | {"images": torch.randn(20, 3, 16, 16)})
    assert "images of 16 px" in get_error("pretrain", "--distilled", tmp_path / "small.pt")
    assert "64 classes, but digits has 10" in get_error("kd", *flags, "--distilled", distilled)


def test_file_that_is_no_model(get_error, distilled, tmp_path):
    assert "not a model file (found: distilled)" in get_error(
        "finetune", "--weights", distilled, "--dataset", "digits"
    )
    assert "no such file" in get_error(
        "finetune", "--weights", tmp_path / "no.pt", "--dataset", "digits"
    )


def test_flags_that_contradict_the_weights(get_error, weights):
    line = get_error("finetune", "--weights", weights, "--dataset", "digits", "--arch", "vgg11")
    assert "--arch vgg11: the weights have convnet3" in line
    line = get_error("finetune", "--weights", weights, "--dataset", "digits", "--protocol", "head")
    assert "has 64 outputs, digits 10 classes" in line


def test_more_labels_than_the_class_has(get_error, weights):
    flags = ["--weights", weights, "--dataset", "digits", "--protocol", "knn"]
    assert "fewer than 500" in get_error("finetune", *flags, "--labels-per-class", "500")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--num-images", "0"], "--num-images"),
        (["--outer-lr", "-1"], "--outer-lr"),
        (["--outer-lr", "nan"], "--outer-lr"),
        (["--outer-steps", "many"], "--outer-steps"),
        (["--image-size", "16"], "--image-size"),
        (["--arch", "transformer"], "--arch"),
        (["--precision", "fp8"], "--precision"),
        (["--colour", "blue"], "--colour"),
        (["--seed", str(2**32)], "--seed"),
    ],
)
def test_bad_flags(get_error, flags, word):
    assert word in get_error("distill", *flags)


def test_fraction_of_no_labels(get_error):
    flags = ["--weights", "none", "--dataset", "digits", "--label-fraction"]
    assert "must be above 0" in get_error("finetune", *flags, "0")


def test_several_numbers_of_labels_in_several_processes(get_error, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    flags = ["--weights", "none", "--dataset", "digits", "--labels-per-class", "1", "2"]
    assert "one number of labels per command" in get_error("finetune", *flags)


def test_batch_of_zero_where_zero_has_no_meaning(get_error):
    assert "--inner-batch" in get_error("distillers.__main__", "dsa", "--inner-batch", "0")


def test_target_in_the_folder_of_a_set(get_error):
    line = get_error("pretrain_target", "--source", "digits", "--name", "krr_st")
    assert "--name krr_st" in line


def test_hub_weights_for_another_network(get_error, monkeypatch):
    monkeypatch.setattr(torch.hub, "load", lambda *words, **flags: torch.nn.Linear(1, 1))
    line = get_error(
        "pretrain_target", "--source", "digits", *TARGET, "--weights", "hub", "--seed", "4"
    )
    assert "--weights hub" in line and "--arch resnet50_target" in line


def test_barlow_twins_batches_of_one_image(get_error):
    flags = ["ssl_bilevel", "--source", "digits", "--width", "0.03", "--inner-batch", "1"]
    assert "batches of at least 2" in get_error("distillers.__main__", *flags)


def test_nvidia_gpu_that_torch_cannot_use(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: 470")
    monkeypatch.setattr(device, "NVIDIA_DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old\nSecond line")

    monkeypatch.setattr(torch.cuda, "init", init)
    args = SimpleNamespace(device="auto", precision="fp32", deterministic=False)
    message = r"cannot use it \(The NVIDIA driver on your system is too old\); .* --device cpu"
    with pytest.raises(UserError, match=message):
        device.select_device(args)
    args.device = "cpu"
    assert device.select_device(args).type == "cpu"


def test_missing_device(get_error):
    if not torch.cuda.is_available():
        assert "--device cuda" in get_error("distill", "--device", "cuda")


def test_missing_or_unknown_method(roots):
    for words in ([], ["magic"]):
        done = run_command("-m", "distillers", *words, check=False)
        assert done.returncode == 2 and "random" in done.stderr and "Traceback" not in done.stderr


def test_backbone_that_does_not_fit(get_error, tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    (tmp_path / "text.pth").write_text("not weights")
    flags = ["--source", "digits", *TARGET]
    assert "does not fit" in get_error(
        "pretrain_target", *flags, "--weights", tmp_path / "w.pth", "--seed", "3"
    )
    for name in ("text.pth", "missing.pth"):  # same run folder: a failed run does not lock it
        line = get_error("pretrain_target", *flags, "--weights", tmp_path / name, "--seed", "3")
        assert "not a readable state dict" in line
    assert "width 1" in get_error(
        "pretrain_target", "--arch", "resnet50_target", "--width", "0.5", "--seed", "3"
    )
    assert "at least 2" in get_error("pretrain_target", *flags, "--batch-size", "1", "--seed", "3")


def test_run_root_that_cannot_be_created(capsys, roots, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main = importlib.import_module("pretrain_target").main
        cli.run(main, ["--source", "digits", *roots[:2], "--run-root", str(tmp_path / "file")])
    assert stop.value.code == 2 and str(tmp_path / "file") in capsys.readouterr().err


def test_target_of_a_source_that_has_changed(capsys, tmp_path):
    for i in range(4):
        save_image(torch.rand(3, 32, 32), tmp_path / f"{i}.png")
    roots = [
        "--data-root",
        str(tmp_path / "data"),
        "--run-root",
        str(tmp_path / "runs"),
        "--source",
        str(tmp_path),
    ]
    importlib.import_module("pretrain_target").main([*roots, "--preset", "digits", *TARGET])
    (tmp_path / "0.png").unlink()
    save_image(torch.rand(3, 32, 32), tmp_path / "4.png")
    with pytest.raises(SystemExit) as stop:
        cli.run(
            importlib.import_module("distill").main,
            [*roots, "--preset", "digits", *DISTILL, "--num-images", "2"],
        )
    assert stop.value.code == 2 and "another version of the source" in capsys.readouterr().err


def test_command_ends_without_a_message_if_nobody_reads_its_output():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "analysis.tables"],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=1800,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
