"""The precision that a run chooses, stores and shows."""

import json
from types import SimpleNamespace

import numpy
import pytest
import torch

import distill
import finetune
import pretrain
import pretrain_target
from analysis import tables
from distillers import dm, method
from tests.conftest import DISTILL, PRETRAIN, make_stopping_steps
from utils import device, files, run
from utils.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    """Function that sets what the machine has."""

    def build(gpu=False, gpu_bf16=True, avx512_bf16=False, amx=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    return build


def chosen(*flags, by=distill):
    return method.parse_args(by.METHOD, ["--source", "digits", *flags]).precision


@pytest.mark.parametrize(
    "parts", [dict(gpu=True), dict(avx512_bf16=True), dict(amx=True), dict(gpu=True, amx=True)]
)
def test_auto_is_bf16_for_krr_st_on_devices_that_compute_in_it(machine, parts):
    machine(**parts)
    assert chosen() == "bf16"
    assert chosen("--precision", "fp32") == chosen("--reference") == "fp32"
    assert chosen(by=dm) == "fp32"
    assert chosen("--precision", "bf16", by=dm) == "bf16"
    assert pretrain_target.parse_args(["--source", "digits"]).precision == "fp32"


@pytest.mark.parametrize("parts", [dict(), dict(gpu=True, gpu_bf16=False, amx=True)])
def test_auto_is_float32_on_other_devices(machine, parts):
    machine(**parts)
    assert chosen() == "fp32"


def test_auto_follows_the_device_flag(machine):
    machine(gpu=True)
    assert chosen("--device", "cpu") == "fp32"
    machine(gpu=True, gpu_bf16=False, avx512_bf16=True)
    assert chosen("--device", "cpu") == "bf16"


def test_auto_of_later_stages_follows_the_set(machine, distilled, weights, roots, tmp_path):
    machine(amx=True)
    assert pretrain.parse_args(["--distilled", str(distilled)])[0].precision == "bf16"
    content = files.load(distilled, "distilled")
    content["meta"]["method"] = "random_features"
    files.save(tmp_path / "other.pt", "distilled", content)
    assert pretrain.parse_args(["--distilled", str(tmp_path / "other.pt")])[0].precision == "fp32"
    assert pretrain.parse_args(["--source", "digits"])[0].precision == "fp32"

    def fine_tune(path, protocol):
        place = tmp_path / protocol / path.stem / "model.pt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
        flags = ["--dataset", "digits", "--labels-per-class", "2", *roots]
        flags += ["--steps", "1"] if protocol == "full" else []
        finetune.main(["--weights", str(place), "--protocol", protocol, *flags])
        return json.loads((place.parent / "results.jsonl").read_text())["precision"]

    assert fine_tune(weights, "full") == "bf16"
    assert fine_tune(weights, "linear") == "fp32"
    content = files.load(weights, "model")
    content["meta"]["method"] = None
    files.save(tmp_path / "unknown.pt", "model", content)
    assert fine_tune(tmp_path / "unknown.pt", "full") == "fp32"


def test_tf32_requires_cuda():
    args = SimpleNamespace(device="cpu", precision="tf32", deterministic=False)
    with pytest.raises(UserError, match="tf32: not supported on cpu"):
        device.select_device(args)


def test_hidden_gpu_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    args = SimpleNamespace(device="auto", precision="fp32", deterministic=False)
    with device.restore_backends():
        assert device.select_device(args).type == "cpu"


def backends():
    cudnn = torch.backends.cudnn
    return (
        torch.backends.cuda.matmul.allow_tf32,
        cudnn.allow_tf32,
        cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_backends_are_set_during_a_run_and_restored(machine, monkeypatch, precision, deterministic):
    machine(gpu=True)
    monkeypatch.setattr(device, "device_name", lambda _: "a GPU")
    monkeypatch.setattr(device.distributed, "initialise", torch.device)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision != "tf32")
    before = backends()
    args = SimpleNamespace(device="cuda", precision=precision, deterministic=deterministic)
    with pytest.raises(ZeroDivisionError), device.restore_backends():
        device.select_device(args)
        assert backends() == (False, precision == "tf32", not deterministic, deterministic)
        raise ZeroDivisionError
    assert backends() == before


def test_main_functions_restore_the_backends(roots, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = backends()
    method.main(dm.METHOD, ["--source", "digits", *DISTILL[:4], "--outer-steps", "1", *roots])
    assert backends() == before
    assert "device: cpu, precision: fp32" in capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def in_bf16(roots, tmp_path_factory):
    """A run root with all stages in bf16, and the flags for it."""
    place = tmp_path_factory.mktemp("bf16")
    flags = [*roots[:2], "--run-root", str(place), "--precision", "bf16", "--device", "cpu"]
    numpy.save(place / "features.npy", numpy.random.default_rng(0).random((1437, 8), "float32"))
    words = ["--source", "digits", "--features", str(place / "features.npy")]
    pretrain_target.main([*words, *flags[:4]])
    distill.main(["--source", "digits", *DISTILL, *flags])
    distilled = place / "digits" / "krr_st" / "seed0" / "distilled.pt"
    pretrain.main(["--distilled", str(distilled), *PRETRAIN, *flags])
    return place, flags


def model(place):
    return place / "digits" / "krr_st" / "seed0" / "convnet3-x0.125" / "seed0"


def test_device_and_precision_are_stored_and_tables_name_bf16(in_bf16):
    place, flags = in_bf16
    few = ["--weights", str(model(place) / "model.pt"), "--dataset", "digits", "--steps", "1"]
    for seed, precision in enumerate(("bf16", "fp32")):
        words = [*few, "--labels-per-class", "2", "--seed", str(seed), *flags[:4]]
        finetune.main([*words, "--precision", precision])
    config = json.loads((place / "digits" / "krr_st" / "seed0" / "config.json").read_text())
    assert (config["device"], config["settings"]["precision"]) == ("cpu", "bf16")
    lines = tables.gather_results([place])
    assert {line["precision"] for line in lines} == {"bf16", "fp32"}
    assert {line["device"] for line in lines} == {"cpu"}
    made = {"distill.precision": ["bf16", "fp32"], "pretrain.precision": ["bf16", "fp32"]}
    for line in lines:
        own = {name: v for name, v in line["deviations"].items() if name.endswith("precision")}
        assert own == made | (
            {"finetune.precision": ["bf16", "fp32"]} if line["precision"] == "bf16" else {}
        )
    text = "".join(tables.format_tables(lines).values())
    assert "bf16 in distill, pretrain)" in text and "bf16 in distill, pretrain, finetune)" in text


def test_precision_names_a_row_but_is_not_a_reduced_scale():
    line = dict(source="tinyimagenet", method="krr_st", arch="convnet4", dataset="cars")
    line |= dict(protocol="full", width=1.0, image_size=64, num_images=2000, distilled_seed=0)
    exact = line | dict(accuracy=10.0, seed=0, deviations={})
    fast = line | dict(accuracy=20.0, seed=0, deviations={"distill.precision": ["bf16", "fp32"]})
    (table,) = [each for each in tables.all_tables() if each.name == "table2"]
    ((settings, columns, rows),) = tables.split_by_scale(table, [exact, fast])
    assert settings is None and columns == [("convnet4", "cars")]
    assert [own for _, own, _ in rows] == ["", "bf16 in distill"]
    assert tables.identity(exact) != tables.identity(fast)


def test_run_resumed_in_another_precision_is_refused(in_bf16):
    _, flags = in_bf16
    words = ["--source", "digits", *DISTILL, "--outer-lr", "0.01", "--name", "resumed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "steps", make_stopping_steps([("distil", 1)]))
        with pytest.raises(run.Stopped):
            distill.main([*words, *flags])
    with pytest.raises(UserError, match="precision: bf16 stored, fp32 now"):
        distill.main([*words, *flags[:4], "--precision", "fp32"])


def test_resume_in_bf16_is_bit_identical(in_bf16):
    place, flags = in_bf16
    words = [*DISTILL, "--name", "parts"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run.Run, "steps", make_stopping_steps([("initialise pool", 1), ("distil", 1)])
        )
        for _ in range(2):
            with pytest.raises(run.Stopped):
                distill.main(["--source", "digits", *words, *flags])
    distill.main(["--source", "digits", *words, *flags])
    whole, parts = (
        files.load(place / "digits" / name / "seed0" / "distilled.pt", "distilled")
        for name in ("krr_st", "parts")
    )
    for name in ("images", "targets"):
        assert torch.equal(whole[name], parts[name])
    (place / "pretrained").mkdir()
    copy = place / "pretrained" / "distilled.pt"
    copy.write_bytes((place / "digits" / "krr_st" / "seed0" / "distilled.pt").read_bytes())
    words = ["--distilled", str(copy), *PRETRAIN, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "steps", make_stopping_steps([("pre-train", 1)]))
        with pytest.raises(run.Stopped):
            pretrain.main(words)
    pretrain.main(words)
    whole, parts = (
        files.load(folder / "model.pt", "model")["network"]
        for folder in (model(place), copy.parent / "convnet3-x0.125" / "seed0")
    )
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
