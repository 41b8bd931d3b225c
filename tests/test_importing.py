"""Released sets of other authors: each layout, and errors for missing facts."""

import shutil

import numpy as np
import pytest
import torch

import pretrain
from data.distilled import Distilled, load_distilled
from data.images import load_images
from distillers import importing
from models.saved import load_model
from tests.conftest import PRETRAIN, run_command
from utils import files
from utils.errors import UserError

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
STATS = "0.4,0.5,0.6/0.2,0.25,0.3"
M, S = 6, 32


@pytest.fixture
def x():
    """Draw six images of pixels in [0, 1], (6, 3, 32, 32)."""
    return torch.rand(M, 3, S, S, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def import_set(tmp_path):
    """Return a function that saves `content` as a file, imports it with `flags`, and returns the
    set. `more` has further files."""

    def call(name, content, *flags, more=None):
        for each, part in {name: content, **(more or {})}.items():
            save = {".npz": lambda p, c: np.savez(p, **c), ".npy": np.save}.get(
                (tmp_path / each).suffix
            )
            (save or (lambda p, c: torch.save(c, p)))(tmp_path / each, part)
        flags = [str(tmp_path / flag) if flag in (more or {}) else flag for flag in flags]
        importing.main(
            [
                "--source",
                "tinyimagenet",
                "--method",
                "released",
                "--images",
                str(tmp_path / name),
                "--run-root",
                str(tmp_path / "runs"),
                "--data-root",
                str(tmp_path / "none"),
                *flags,
            ],
            reserved=("target", "dm"),
        )
        return load_distilled(
            tmp_path / "runs" / "tinyimagenet" / "released" / "seed0" / "distilled.pt"
        )

    return call


def normalise(x):
    return torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)


def test_raw_images_with_features_keep_their_values(import_set, x, tmp_path, capsys):
    """Read x_syn.pt and y_syn.pt of KRR-ST, saved as parameters that require a gradient."""
    y = torch.randn(M, 5)
    d = import_set(
        "x_syn.pt",
        torch.nn.Parameter(x),
        "--targets",
        "y_syn.pt",
        "--target-kind",
        "feature",
        "--normalised",
        "none",
        more={"y_syn.pt": y.clone().requires_grad_()},
    )
    assert d.target_kind == "feature" and torch.equal(d.images, x) and torch.equal(d.targets, y)
    assert (
        d.mean.tolist() == [0, 0, 0] and d.std.tolist() == [1, 1, 1] and torch.equal(d.pixels(), x)
    )
    assert (
        d.meta["imported"] == ["x_syn.pt", "y_syn.pt"]
        and d.meta["preset"] == d.meta["source"] == "tinyimagenet"
    )
    assert d.meta["settings"]["images"] == files.digest(tmp_path / "x_syn.pt")
    assert d.meta["settings"]["targets"] == files.digest(tmp_path / "y_syn.pt")
    assert (d.meta["method"], d.meta["settings"]["normalised"]) == ("released", "none")
    assert d.meta["deviations"] == {"num_images": [M, 2000], "image_size": [S, 64]}
    assert str(tmp_path) not in str(d.meta)
    assert "0.0 % outside [0, 1]; targets: feature (6, 5)" in capsys.readouterr().out
    assert (tmp_path / "runs" / "tinyimagenet" / "released" / "seed0" / "images.png").is_file()


def test_normalised_images_with_class_indices_are_read_from_two_files(import_set, x):
    """Read images_best.pt and labels_best.pt of MTT."""
    labels = torch.tensor([0, 0, 1, 1, 4, 4], dtype=torch.int32)
    d = import_set(
        "images_best.pt",
        normalise(x),
        "--targets",
        "labels_best.pt",
        "--normalised",
        STATS,
        more={"labels_best.pt": labels},
    )
    assert d.target_kind == "class" and d.targets.tolist() == labels.tolist() and d.num_outputs == 5
    torch.testing.assert_close(d.images, normalise(x))
    torch.testing.assert_close(d.pixels(), x, rtol=0, atol=1e-6)


def test_pairs_beside_lists_of_accuracies_are_read(import_set, x):
    """Read res_*.pt of DC, DSA and DM: a pair per experiment, and accuracies as NumPy numbers."""
    data = [[normalise(x), torch.arange(M)], [normalise(1 - x), torch.arange(M) + 1]]
    content = {
        "data": data,
        "accs_all_exps": {"ConvNet": [np.float64(0.3), np.float64(0.4)], "n": np.int64(2)},
    }
    with pytest.raises(
        UserError,
        match=r"2 arrays .* choose one by --images-entry \(found: data\.0\.0 \(6, 3, 32, 32",
    ):
        import_set("res.pt", content, "--normalised", STATS)
    d = import_set("res.pt", content, "--normalised", STATS, "--images-entry", "data.1.0")
    torch.testing.assert_close(d.pixels(), 1 - x, rtol=0, atol=1e-6)
    assert d.targets.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("core", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_numbers_of_numpy_1_and_2_are_read(tmp_path, core):
    torch.save(
        {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(1)},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=False,
    )
    content = (tmp_path / "a.pt").read_bytes()
    assert content.count(b"numpy._core.multiarray") == 2
    (tmp_path / "a.pt").write_bytes(content.replace(b"numpy._core.multiarray", core))
    assert importing.read(tmp_path / "a.pt")["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_pair_in_one_file_is_read(import_set, x):
    d = import_set("data.pt", (normalise(x), torch.arange(M)), "--normalised", STATS)
    assert d.targets.tolist() == [0, 1, 2, 3, 4, 5]


def test_channels_last_images_with_soft_labels_are_read(import_set, x):
    """Read the npz file of KIP: images (m, S, S, 3) in float64, labels with mean zero."""
    soft = np.eye(10)[:M] - 0.1
    d = import_set(
        "kip.npz",
        {"images": normalise(x).permute(0, 2, 3, 1).double().numpy(), "labels": soft},
        "--target-kind",
        "soft",
        "--normalised",
        STATS,
    )
    assert d.target_kind == "soft" and np.allclose(d.targets.numpy(), soft)
    torch.testing.assert_close(d.pixels(), x, rtol=0, atol=1e-6)
    assert d.images.is_contiguous()


def test_bytes_are_scaled_and_one_hot_rows_become_class_indices(import_set, x):
    content = (x * 255).round().byte()
    d = import_set(
        "x.npy",
        content.permute(0, 2, 3, 1).numpy(),
        "--normalise",
        STATS,
        "--targets",
        "y.npy",
        "--target-kind",
        "class",
        more={"y.npy": np.eye(7)[[6, 1, 1, 0, 2, 3]]},
    )
    assert d.targets.tolist() == [6, 1, 1, 0, 2, 3]
    torch.testing.assert_close(d.images, normalise(content.float() / 255))
    torch.testing.assert_close(d.pixels(), content.float() / 255, rtol=0, atol=1e-6)


def test_images_without_targets_are_read(import_set, x):
    d = import_set("x.pt", x, "--target-kind", "none", "--normalise", "imagenet")
    assert d.targets.shape == (M, 0) and d.std[0] == pytest.approx(0.229)
    torch.testing.assert_close(d.images[:, 1], (x[:, 1] - 0.456) / 0.224)


def test_source_statistics_are_those_of_its_images(tmp_path, x):
    torch.save((x, torch.arange(M)), tmp_path / "data.pt")
    source = load_images("digits", "train", 32, tmp_path)
    flags = [
        "--source",
        "digits",
        "--images",
        str(tmp_path / "data.pt"),
        "--data-root",
        str(tmp_path),
    ]
    importing.main([*flags, "--method", "a", "--normalised", "source", "--run-root", str(tmp_path)])
    d = load_distilled(tmp_path / "digits" / "a" / "seed0" / "distilled.pt")
    assert (
        torch.equal(d.mean, source.mean)
        and torch.equal(d.std, source.std)
        and torch.equal(d.images, x)
    )
    importing.main(
        [
            *flags,
            "--method",
            "a",
            "--normalise",
            "source",
            "--run-root",
            str(tmp_path),
            "--seed",
            "1",
        ]
    )
    d = load_distilled(tmp_path / "digits" / "a" / "seed1" / "distilled.pt")
    torch.testing.assert_close(d.pixels(), x, rtol=0, atol=1e-6)


@pytest.mark.long
def test_imported_set_can_be_pretrained_on(tmp_path, x, capsys):
    torch.save(x, tmp_path / "x.pt")
    torch.save(
        torch.tensor([3.0, 3.0, 1.0, 0.0, 9.0, 9.0]), tmp_path / "y.pt"
    )  # class indices as floats
    words = [
        "-m",
        "distillers",
        "import",
        "--source",
        "digits",
        "--method",
        "dm_released",
        "--images",
        tmp_path / "x.pt",
        "--targets",
        tmp_path / "y.pt",
        "--normalised",
        "none",
        "--run-root",
        tmp_path,
    ]
    assert "wrote" in run_command(*words).stdout
    words = [str(word) for word in words[3:]]
    importing.main(words)
    assert "already exists" in capsys.readouterr().out
    with pytest.raises(UserError, match="preset: digits stored, other now"):
        importing.main([*words, "--preset", "other"])
    path = tmp_path / "digits" / "dm_released" / "seed0" / "distilled.pt"
    pretrain.main(["--distilled", str(path), *PRETRAIN])
    saved = load_model(path.parent / "convnet3-x0.125" / "seed0" / "model.pt")
    assert saved["num_outputs"] == 10 and saved["meta"]["method"] == "dm_released"
    assert "--normalised none|STATS" in run_command("-m", "distillers", "import", "--help").stdout


FEATURES = {"y.pt": torch.randn(M, 5)}


def test_missing_flag_error_describes_the_file_and_names_the_flag(import_set, x, tmp_path):
    with pytest.raises(UserError) as refused:
        import_set("x.pt", x * 2 - 1, "--targets", "y.pt", more=FEATURES)
    text = str(refused.value)
    assert (
        "\n" not in text
        and "--target-kind feature" in text
        and "--normalised none" in text
        and "STATS" in text
    )
    mean = " ".join(f"{2 * x[:, c].mean() - 1:.3f}" for c in range(3))
    assert (
        f"(6, 3, 32, 32) float32, {2 * x.min() - 1:.4g} to {2 * x.max() - 1:.4g}, mean {mean}, std "
        "0." in text
    )
    assert "(6, 5) float32, " in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "more", "message"),
    [
        (
            ["--normalised", "none"],
            {},
            r"no targets for 6 images; give --targets FILE, or --target-kind none",
        ),
        (
            ["--normalised", "none", "--targets", "y.pt"],
            {"y.pt": torch.randn(5, 5)},
            r"no targets .*the tensor \(5, 5\)",
        ),
        (
            ["--normalised", "none", "--targets", "y.pt"],
            {"y.pt": torch.randn(6)},
            "must be class indices",
        ),
        (
            ["--normalised", "none", "--targets", "y.pt", "--target-kind", "soft"],
            {"y.pt": torch.arange(6)},
            "not soft",
        ),
        (
            ["--normalised", "none", "--targets", "y.pt", "--target-kind", "class"],
            FEATURES,
            "not one-hot",
        ),
        (
            ["--normalised", "none", "--targets", "y.pt", "--target-kind", "none"],
            FEATURES,
            "cannot be combined",
        ),
        (
            ["--normalised", "none", "--targets", "y.pt"],
            {"y.pt": torch.arange(6) - 1},
            "class indices from -1 to 4",
        ),
        (
            ["--normalised", "none", "--targets", "y.pt"],
            {"y.pt": torch.arange(6) * 10**6},
            "not within 0 to 99999",
        ),
        (
            ["--normalised", "none", "--targets", "y.pt"],
            {"y.pt": [torch.arange(6)] * 2},
            "choose one by --targets-entry",
        ),
        (["--normalised", "none", "--images-entry", "z"], {}, "at --images-entry z"),
        (
            ["--normalised", "source", "--target-kind", "none"],
            {},
            "tiny-imagenet-200.zip is not in",
        ),
        (["--normalised", "none", "--target-kind", "none", "--method", "dm"], {}, "--method dm"),
        (["--normalised", "none", "--target-kind", "none", "--method", "../x"], {}, "plain word"),
    ],
)
def test_wrong_flags_are_errors(import_set, x, tmp_path, flags, more, message):
    with pytest.raises(UserError, match=message):
        import_set("x.pt", x, *flags, more=more)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "stats", ["mtt", "0.5,0.5/0.2,0.2,0.2", "0.5,0.5,0.5/0.2,0,0.2", "125,122,114/51,50,51"]
)
def test_invalid_statistics_are_errors(import_set, x, stats, capsys):
    with pytest.raises(SystemExit):
        import_set("x.pt", x, "--target-kind", "none", "--normalised", stats)
    shown = capsys.readouterr().err
    assert "R,G,B/R,G,B" in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.full((M, 3, S, S), torch.nan), "not finite"),
        (torch.rand(M, 3, S, S + 1), "images of shape"),
        (torch.rand(M, 1, S, S), r"no images .* \(found: the tensor \(6, 1, 32, 32\)\)"),
        (torch.rand(0, 3, S, S), "images of shape"),
        ({"lr": 0.1}, r"no images .* \(found: no array\)"),
        ({"x": shutil.rmtree}, "more than data"),
    ],
)
def test_unsuitable_images_are_errors(import_set, content, message):
    with pytest.raises(UserError, match=message):
        import_set("x.pt", content, "--normalised", "none", "--target-kind", "none")


def test_normalised_bytes_are_an_error(import_set):
    with pytest.raises(UserError, match="bytes are pixels"):
        import_set(
            "x.pt",
            torch.zeros(M, 3, S, S, dtype=torch.uint8),
            "--normalised",
            STATS,
            "--target-kind",
            "none",
        )


def test_unreadable_files_are_errors(tmp_path):
    np.savez(tmp_path / "objects.npz", images=np.array([{"a": shutil.rmtree}], dtype=object))
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "text.pt").write_text("not a tensor")
    for name, message in (
        ("objects.npz", "not a NumPy file of plain"),
        ("text.npz", "not a NumPy file of plain"),
        ("text.pt", "not a readable torch file"),
        ("nowhere.pt", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            importing.read(tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("class", torch.tensor([0, -1, 2]), "class indices from -1 to 2"),
        ("class", torch.tensor([0, 1, 10**9]), "not within 0 to 99999"),
        ("none", torch.zeros(3, 2), "targets without a value"),
        ("soft", torch.zeros(3, 0), "targets without a value"),
        ("soft", torch.tensor(1.0), "a scalar"),
    ],
)
def test_distilled_files_with_invalid_targets_are_errors(tmp_path, kind, targets, message):
    d = Distilled(torch.rand(3, 3, S, S), targets, kind, torch.zeros(3), torch.ones(3), {})
    files.save(tmp_path / "d.pt", "distilled", d.content())
    with pytest.raises(UserError, match=message):
        load_distilled(tmp_path / "d.pt")


def test_soft_label_recipe_depends_on_source_and_network(tmp_path):
    """Check the batch sizes of the released code for soft labels.

    They are 500, 256 for MobileNet at 64 px, and 10 for ImageNette.
    """
    d = Distilled(
        torch.rand(3, 3, S, S), torch.rand(3, 4), "soft", torch.zeros(3), torch.ones(3), {}
    )
    for source, arch, batch, steps in (
        ("tinyimagenet", "convnet4", 500, 40_000),
        ("tinyimagenet", "mobilenet", 256, 40_000),
        ("cifar100", "mobilenet", 500, 10_000),
        ("imagenet", "vgg11", 500, 10_000),
        ("imagenette", "vgg11", 10, 1_000),
    ):
        d.meta["preset"] = source
        files.save(tmp_path / "d.pt", "distilled", d.content())
        args, _ = pretrain.parse_args(["--distilled", str(tmp_path / "d.pt"), "--arch", arch])
        assert (args.batch_size, args.steps, args.lr, args.optimizer) == (
            batch,
            steps,
            3e-4,
            "adamw",
        )
