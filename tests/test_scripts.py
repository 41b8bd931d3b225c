"""Every script at toy size, each in its own process."""

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

import finetune
import models
from analysis.tables import format_tables, gather_results
from data.distilled import load_distilled
from data.images import load_images
from data.subsets import few_labels
from evaluation import probes, results
from models.saved import load_model, rebuild
from tests.conftest import DISTILL, PRETRAIN, ROOT, TARGET, run_command
from utils import files
from utils.errors import UserError


def test_target_file_has_settings_statistics_and_quality(runs):
    target = files.load(runs / "target" / "seed0" / "target.pt", "target")
    assert (
        target["settings"]["epochs"] == 1
        and target["source"] == "digits"
        and target["feature_dim"] == 64
    )
    assert (
        target["mean"].shape == target["std"].shape == (3,) and 10 < target["quality"]["knn"] <= 100
    )
    log = [
        json.loads(line)
        for line in (runs / "target" / "seed0" / "log.jsonl").read_text().splitlines()
    ]
    assert log[-1]["step"] == 1437 // 128 and log[-1]["loss"] > 0


def test_distill_writes_set_picture_and_settings(distilled):
    d = load_distilled(distilled)
    assert (
        d.images.shape == (20, 3, 32, 32)
        and d.targets.shape == (20, 64)
        and d.target_kind == "feature"
    )
    assert (d.meta["method"], d.meta["source"], d.meta["seed"]) == ("krr_st", "digits", 0)
    assert d.meta["settings"]["outer_steps"] == 4
    assert Image.open(distilled.parent / "images.png").size == (10 * 66 + 2, 2 * 66 + 2)
    assert (
        json.loads((distilled.parent / "config.json").read_text())["settings"]["num_images"] == 20
    )


def test_finished_run_is_not_repeated_and_other_settings_are_an_error(distilled, roots):
    before = distilled.stat().st_mtime_ns
    assert (
        "already exists" in run_command("distill.py", "--source", "digits", *DISTILL, *roots).stdout
    )
    other = run_command(
        "distill.py", "--source", "digits", *DISTILL, "--outer-lr", "0.5", *roots, check=False
    )
    assert other.returncode == 2 and "outer_lr: " in other.stderr and "0.5 now" in other.stderr
    assert distilled.stat().st_mtime_ns == before


@pytest.mark.long
def test_interrupted_command_writes_a_checkpoint_and_resumes(roots, runs, tmp_path):
    words = [
        "distill.py",
        *DISTILL,
        "--outer-steps",
        "100",
        *roots[:2],
        "--run-root",
        str(tmp_path),
        "--log-every",
        "1",
    ]
    words += ["--target-network", str(runs / "target" / "seed0" / "target.pt")]
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "digits" / "krr_st" / "seed0" / "log.jsonl"
    deadline = time.time() + 1200
    while not (log.is_file() and log.read_text().count("\n") > 2):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=1800)
    assert (
        process.returncode == 130
        and "rerun the same command to resume" in errors
        and "Traceback" not in errors
    )
    assert (log.parent / "checkpoint.pt").is_file() and not (log.parent / "distilled.pt").exists()
    run_command(*words)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(
        range(1, 101)
    )
    assert load_distilled(log.parent / "distilled.pt").images.isfinite().all()


def test_distillation_starts_from_random_images_with_features(roots, runs, distilled):
    run_command(
        "-m", "distillers", "random_features", "--source", "digits", "--num-images", "20", *roots
    )
    real = load_distilled(runs / "random_features" / "seed0" / "distilled.pt")
    assert (
        real.target_kind == "feature"
        and real.targets.shape == load_distilled(distilled).targets.shape
    )
    assert (
        real.images - load_distilled(distilled).images
    ).abs().max() < 0.1  # after four small steps


def make_untrained_flags(tmp_path, folder):
    """Return the flags of finetune.py for an untrained network on the digits."""
    words = ["--weights", "none", "--arch", "convnet3", "--width", "0.125", "--image-size", "32"]
    words += ["--dataset", "digits", "--data-root", tmp_path / "data"]
    return [*map(str, [*words, "--run-root", tmp_path / folder])]


def read_results(folder):
    [path] = folder.rglob("results.jsonl")
    return {line["name"]: line for line in results.read(path)}


def test_probes_with_several_numbers_of_labels_compute_features_once(tmp_path, monkeypatch):
    calls, outputs = [], probes.compute_outputs

    def counted(function, images, *args):
        calls.append(len(images))
        return outputs(function, images, *args)

    monkeypatch.setattr(probes, "compute_outputs", counted)
    together = [*make_untrained_flags(tmp_path, "a"), "--protocol", "linear", "--label-fraction"]
    finetune.main([*together, "0.05", "0.5", "1"])
    assert calls == [1437, 360]
    for share in ("0.05", "0.5"):
        alone = [
            *make_untrained_flags(tmp_path, "b"),
            "--protocol",
            "linear",
            "--label-fraction",
            share,
        ]
        finetune.main(alone)
    finetune.main([*make_untrained_flags(tmp_path, "b"), "--protocol", "linear"])  # all labels
    found = [read_results(tmp_path / name) for name in "ab"]
    assert (
        found[0].keys()
        == found[1].keys()
        == {"digits_linear_0.05_seed0", "digits_linear_0.5_seed0", "digits_linear_seed0"}
    )
    for name, line in found[0].items():
        assert line["digest"] == found[1][name]["digest"]
        assert line["accuracy"] == pytest.approx(found[1][name]["accuracy"], abs=0.3)
    calls.clear()
    finetune.main([*together, "0.05", "0.2", "1"])  # two exist already
    assert calls == [sum(-(-n // 5) for n in count_classes(tmp_path)), 360]
    assert len(read_results(tmp_path / "a")) == 4


def test_probe_averages_draws_of_labels(tmp_path):
    flags = [*make_untrained_flags(tmp_path, "a"), "--protocol", "linear", "--labels-per-class"]
    finetune.main([*flags, "1", "3"])
    finetune.main([*flags, "1", "3", "--label-draws", "4"])
    found = read_results(tmp_path / "a")
    assert len({line["digest"] for line in found.values()}) == 4
    train, test = (
        load_images("digits", split, 32, tmp_path / "data", labels=True)
        for split in ("train", "test")
    )
    torch.manual_seed(0)
    network = models.build("convnet3", 32, 10, 0.125)
    features, tests = (
        probes.compute_outputs(network.embed, images, torch.device("cpu"), "fp32", *statistics)
        for statistics in [(train.mean, train.std)]
        for images in (train, test)
    )
    for number in (1, 3):
        generator = torch.Generator().manual_seed(0)
        accuracies = []
        for _ in range(4):
            rows = few_labels(train, number, 0, generator)
            labels = train.labels[rows]
            accuracies.append(
                probes.linear_accuracy_of(features[rows], labels, tests, test.labels, 10)
            )
        one, mean = (
            found[f"digits_linear_{number}perclass{draws}_seed0"] for draws in ("", "_4draws")
        )
        assert len(set(accuracies)) > 1
        assert "label_draws" not in one and mean["label_draws"] == 4
        assert one["accuracy"] == pytest.approx(accuracies[0], abs=0.3)
        assert mean["accuracy"] == pytest.approx(sum(accuracies) / 4, abs=0.1)
    shown = format_tables(gather_results([tmp_path]))["digits"]
    assert "linear, 3 labels/class, 4 draws" in shown


@pytest.mark.parametrize("flags", [[], ["--protocol", "linear"], ["--labels-per-class", "2"]])
def test_draws_of_labels_need_a_probe_with_few_labels(flags, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        finetune.main([*make_untrained_flags(tmp_path, "a"), *flags, "--label-draws", "2"])
    assert "--label-draws requires a probe with" in capsys.readouterr().err


def count_classes(tmp_path):
    return load_images("digits", "train", 32, tmp_path / "data").labels.bincount().tolist()


def test_finetuning_with_several_numbers_of_labels_equals_separate_commands(tmp_path):
    flags = ["--steps", "2", "--labels-per-class"]
    finetune.main([*make_untrained_flags(tmp_path, "a"), *flags, "1", "2"])
    for number in ("2", "1"):
        finetune.main([*make_untrained_flags(tmp_path, "b"), *flags, number])
    found = [read_results(tmp_path / name) for name in "ab"]
    assert found[0].keys() == {f"digits_full_{n}perclass_seed0" for n in (1, 2)}
    for name, line in found[0].items():
        assert all(line[key] == found[1][name][key] for key in ("digest", "accuracy"))


def compute_accuracy(content, roots):
    """Compute the accuracy of a network's head on the test digits, in percent."""
    test = load_images("digits", "test", 32, roots[1])
    with torch.no_grad():
        predicted = (
            rebuild(content).eval()(test.normalised(torch.arange(len(test)), "cpu")).argmax(1)
        )
    return 100 * (predicted == test.labels).float().mean().item()


@pytest.mark.long
def test_pretraining_recipe_depends_on_the_kind_of_targets(roots, runs, weights):
    saved = load_model(weights)
    assert (
        saved["num_outputs"] == 64
        and saved["meta"]["method"] == "krr_st"
        and saved["width"] == 0.125
    )
    run_command("-m", "distillers", "random", "--source", "digits", "--num-images", "20", *roots)
    path = runs / "random" / "seed0" / "distilled.pt"
    assert load_distilled(path).targets.bincount().tolist() == [2] * 10
    run_command("pretrain.py", "--distilled", path, *PRETRAIN, "--seed", "1", *roots)
    saved = load_model(path.parent / "convnet3-x0.125" / "seed1" / "model.pt")
    assert saved["num_outputs"] == 10 and saved["meta"]["settings"]["loss"] == "cross_entropy"
    assert saved["meta"]["settings"]["augment"] is True
    flags = [
        "--weights",
        path.parent / "convnet3-x0.125" / "seed1" / "model.pt",
        "--dataset",
        "digits",
        *roots,
    ]
    run_command("finetune.py", *flags, "--protocol", "head")
    [line] = results.read(path.parent / "convnet3-x0.125" / "seed1" / "results.jsonl")
    assert line["protocol"] == "head" and line["accuracy"] == pytest.approx(
        compute_accuracy(saved, roots), abs=1e-3
    )

    soft = load_distilled(path)
    soft.targets, soft.target_kind = torch.eye(10)[soft.targets], "soft"
    path = runs / "soft" / "seed0" / "distilled.pt"
    files.save(path, "distilled", soft.content())
    run_command(
        "pretrain.py",
        "--distilled",
        path,
        "--steps",
        "3",
        "--width",
        "0.125",
        "--arch",
        "vgg11",
        *roots,
    )
    saved = load_model(path.parent / "vgg11-x0.125" / "seed0" / "model.pt")
    assert saved["num_outputs"] == 10 and saved["meta"]["settings"]["optimizer"] == "adamw"


@pytest.mark.long
def test_finetuning_protocols_write_results(weights, roots, tmp_path):
    weights = shutil.copy(weights, tmp_path / "model.pt")
    flags = ["--weights", weights, "--dataset", "digits", "--labels-per-class", "2", *roots]
    for protocol in ("linear", "knn"):
        assert (
            "2 labels per class"
            in run_command("finetune.py", *flags, "--protocol", protocol).stdout
        )
    run_command("finetune.py", *flags, "--steps", "2")
    assert "already in results.jsonl" in run_command("finetune.py", *flags, "--steps", "2").stdout
    run_command(
        "finetune.py",
        "--weights",
        weights,
        "--dataset",
        "digits",
        "--label-fraction",
        "0.1",
        "--steps",
        "2",
        "--seed",
        "5",
        *roots,
    )
    lines = results.read(weights.parent / "results.jsonl")
    assert [(line["protocol"], line["seed"]) for line in lines] == [
        ("linear", 0),
        ("knn", 0),
        ("full", 0),
        ("full", 5),
    ]
    for line in lines:
        assert (
            line["method"] == "krr_st"
            and line["source"] == line["dataset"] == "digits"
            and line["width"] == 0.125
        )
        assert (
            0 <= line["accuracy"] <= 100
            and line["versions"]["torch"]
            and line["digest"]
            and line["device"] == "cpu"
        )
        assert line["seconds"] > 0 and line["peak_memory_mib"] > 50
        assert line["deviations"]["num_images"] == [20, 30] and line["deviations"][
            "pretrain.epochs"
        ] == [3, 300]
        assert line["deviations"].get("finetune.steps") == (
            [2, 100] if line["protocol"] == "full" else None
        )
    assert (
        lines[0]["name"] == "digits_linear_2perclass_seed0"
        and lines[3]["name"] == "digits_full_0.1_seed5"
    )
    assert (
        load_model(weights.parent / "digits_full_2perclass_seed0" / "model.pt")["num_outputs"] == 10
    )
    shown = format_tables(gather_results([weights.parent]))["digits"]
    assert (
        "| KRR-ST (convnet3-x0.125 at 32 px, m = 20, digits) " in shown
        and "knn, 2 labels/class" in shown
    )


@pytest.mark.long
def test_kd_distils_a_teacher_trained_from_scratch(weights, distilled, roots):
    scratch = [
        "--weights",
        "none",
        "--arch",
        "resnet10",
        "--width",
        "0.125",
        "--dataset",
        "digits",
        "--steps",
        "2",
    ]
    run_command("finetune.py", *scratch, *roots)
    teacher = (
        distilled.parents[3] / "scratch" / "resnet10-x0.125_32px" / "digits_full_seed0" / "model.pt"
    )
    run_command(
        "kd.py",
        "--weights",
        weights,
        "--distilled",
        distilled,
        "--teacher",
        teacher,
        "--dataset",
        "digits",
        "--epochs",
        "2",
        *roots,
    )
    [line] = [
        line for line in results.read(weights.parent / "results.jsonl") if line["protocol"] == "kd"
    ]
    assert {
        "accuracy",
        "accuracy_running_statistics",
        "teacher",
        "teacher_running_statistics",
    } <= line.keys()
    assert line["images"] == {"source": "digits", "method": "krr_st", "seed": 0, "num_images": 20}
    assert line["deviations"]["teacher's finetune.steps"] == [2, 100] and line["deviations"][
        "num_images"
    ] == [20, 30]
    assert load_model(teacher)["meta"]["deviations"]["finetune.steps"] == [2, 100]
    assert len(list(weights.parent.glob("digits_kd_krr_st-*_seed0/model.pt"))) == 1


def test_changed_data_set_is_evaluated_again_and_not_resumed(weights, roots, tmp_path):
    for i in range(8):
        for split, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
            (tmp_path / "pets" / split / name).mkdir(parents=True, exist_ok=True)
            noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i))
            save_image(noise, tmp_path / "pets" / split / name / f"{i}.png")
    words = ["--weights", str(weights), "--dataset", str(tmp_path / "pets"), *roots]
    finetune.main([*words, "--steps", "2"])
    finetune.main([*words, "--protocol", "knn"])
    (tmp_path / "pets" / "test" / "b" / "7.png").unlink()
    with pytest.raises(UserError, match=r"holds a run with other settings .fingerprints"):
        finetune.main([*words, "--steps", "2"])
    finetune.main([*words, "--protocol", "knn"])
    found = [
        line
        for line in results.read(weights.parent / "results.jsonl")
        if line["dataset"].startswith("pets")
    ]
    assert [line["protocol"] for line in found] == ["full", "knn", "knn"]
    assert (
        len(
            [
                line
                for line in gather_results([weights.parent])
                if line["dataset"].startswith("pets")
            ]
        )
        == 2
    )  # one per name, the last


@pytest.mark.long
def test_folder_of_images_is_a_source(tmp_path):
    """Follow README: target network, distilled set and pre-trained network without labels."""
    from sklearn.datasets import load_sample_images

    for i, image in enumerate(load_sample_images().images):
        for j in range(20):
            patch = Image.fromarray(image).crop((30 * j, 20 * i, 30 * j + 60, 20 * i + 60 + j))
            (tmp_path / "photos" / str(i)).mkdir(parents=True, exist_ok=True)
            patch.save(tmp_path / "photos" / str(i) / f"{j}.jpg")
    roots = [
        "--data-root",
        tmp_path / "data",
        "--run-root",
        tmp_path / "runs",
        "--source",
        tmp_path / "photos",
    ]
    size = ["--preset", "digits", "--image-size", "48"]
    run_command("pretrain_target.py", *roots, *size, *TARGET, "--batch-size", "16")
    run_command("distill.py", *roots, *size, *DISTILL)
    [path] = (tmp_path / "runs").glob("photos-*/krr_st/seed0/distilled.pt")
    assert load_distilled(path).images.shape == (20, 3, 48, 48)
    run_command("pretrain.py", "--distilled", path, *PRETRAIN)


@pytest.mark.parametrize(
    "script", ["pretrain_target.py", "distill.py", "pretrain.py", "finetune.py", "kd.py"]
)
def test_scripts_have_help(script):
    shown = run_command(script, "--help").stdout
    assert f"python {script}" in shown and "--data-root" in shown


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("pretrain_target", ["--encoder", "x.py:f", "--epochs", "3"], "--epochs has no effect"),
        ("pretrain_target", ["--features", "x.npy", "--arch=resnet18"], "--arch has no effect"),
        ("pretrain_target", ["--pca", "5"], "--pca requires --encoder or --features"),
        ("pretrain_target", ["--no-unit-scale"], "--no-unit-scale requires --encoder"),
        ("finetune", ["--protocol", "linear", "--steps", "9"], "--steps has no effect with"),
        ("finetune", ["--protocol", "knn", "--no-flip"], "--no-flip has no effect with"),
        ("finetune", ["--protocol", "head", "--labels-per-class", "2"], "trains on no labels"),
        ("finetune", ["--protocol", "r2", "--label-fraction", "0.1"], "trains on no labels"),
    ],
)
def test_flags_without_effect_are_errors(command, flags, message, capsys):
    usual = dict(pretrain_target=[], finetune=["--weights", "m.pt", "--dataset", "digits"])
    module = importlib.import_module(command)
    with pytest.raises(SystemExit, match="2"):
        module.parse_args([*usual[command], *flags])
    assert message in capsys.readouterr().err
