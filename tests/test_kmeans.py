"""The k-means baseline on the digits, with and without labels."""

import numpy as np
import pytest
import torch
from torchvision.utils import save_image

import models
from data.distilled import load_distilled
from data.images import load_images
from distillers import kmeans, method
from models.target import load_target
from utils import files
from utils.errors import UserError


@pytest.fixture
def select_images(roots, runs, tmp_path):
    """Return a function that runs the command with the toy target and returns the set."""

    def call(*flags, seed=0, top="runs"):
        target = str(runs / "target" / "seed0" / "target.pt")
        places = [*roots[:2], "--run-root", str(tmp_path / top), "--target-network", target]
        method.main(kmeans.METHOD, ["--source", "digits", *places, "--seed", str(seed), *flags])
        return load_distilled(tmp_path / top / "digits" / "kmeans" / f"seed{seed}" / "distilled.pt")

    return call


@pytest.fixture(scope="module")
def source(data_root):
    return load_images("digits", "train", 32, data_root)


@pytest.fixture(scope="module")
def features(source, runs):
    target = load_target(
        runs / "target" / "seed0" / "target.pt", source, torch.device("cpu"), "fp32"
    )
    return target.features_of(source).numpy()


def find_indices(d, source):
    """Find each distilled image in the source."""
    real = source.normalised(torch.arange(len(source)), "cpu").flatten(1)
    distance = torch.stack([(real - x).abs().amax(1) for x in d.images.flatten(1)])
    assert (distance.amin(1) < 1e-6).all()
    return distance.argmin(1).numpy()


def test_chosen_images_are_the_nearest_to_the_centroids_of_their_class(
    select_images, source, features
):
    from sklearn.cluster import KMeans

    d = select_images("--num-images", "40")
    assert d.target_kind == "class" and d.targets.tolist() == [
        c for c in range(10) for _ in range(4)
    ]
    chosen = find_indices(d, source)
    assert len(set(chosen.tolist())) == 40
    for c in range(10):
        members = np.flatnonzero(source.labels.numpy() == c)
        centres = KMeans(4, n_init=1, random_state=0).fit(features[members]).cluster_centers_
        nearest, taken = [], set()
        for centre in centres.astype(np.float64):
            distances = [((features[i].astype(np.float64) - centre) ** 2).sum() for i in members]
            order = [members[j] for j in np.argsort(distances) if members[j] not in taken]
            nearest.append(order[0])
            taken.add(order[0])
        assert chosen[4 * c : 4 * c + 4].tolist() == nearest


def test_centroids_are_means_of_their_own_images(source, features):
    f = torch.from_numpy(features[source.labels.numpy() == 3])
    centres = kmeans.fit_centroids(f, 5, seed=1)
    nearest = torch.stack([(f - c).square().sum(1) for c in centres]).argmin(0)
    means = torch.stack([f[nearest == j].mean(0) for j in range(5)])
    torch.testing.assert_close(centres, means, rtol=1e-3, atol=1e-3)


def test_two_centroids_with_the_same_nearest_image_get_two_images():
    features = torch.tensor([[0.0], [1.0], [5.0], [5.2]])
    assert kmeans.nearest_distinct(
        features, torch.tensor([[4.9], [5.05], [0.2], [5.0]])
    ).tolist() == [2, 3, 0, 1]


def test_summed_error_is_the_distance_to_the_nearest_chosen_image(monkeypatch):
    monkeypatch.setattr(kmeans, "ROWS", 4)  # several parts
    g = torch.Generator().manual_seed(0)
    f, chosen = torch.randn(11, 3, generator=g), torch.randn(4, 3, generator=g)
    expected = sum(min(((a - b) ** 2).sum().item() for b in chosen) for a in f)
    assert kmeans.sum_distances(f, chosen) == pytest.approx(expected, rel=1e-5)


def test_labels_can_be_ignored(select_images, source, features):
    d = select_images("--num-images", "25", "--ignore-labels")  # not a multiple of the ten classes
    assert d.target_kind == "feature" and d.meta["initial"] == find_indices(d, source).tolist()
    np.testing.assert_array_equal(d.targets.numpy(), features[d.meta["initial"]])


def test_chosen_images_cover_the_source_better_than_random_ones(select_images):
    d = select_images("--num-images", "100")
    assert d.meta["objective_distilled"] < 0.9 * d.meta["objective_initial"]


def test_seed_determines_the_images(select_images):
    first, again, other = (
        select_images("--num-images", "20", seed=seed, top=top)
        for seed, top in ((0, "a"), (0, "b"), (1, "a"))
    )
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)


def test_large_sources_use_mini_batches(source, features, monkeypatch):
    f = torch.from_numpy(features)
    whole = kmeans.sum_distances(f, kmeans.fit_centroids(f, 10, 0))
    monkeypatch.setattr(kmeans, "MOST_PAIRS", 10 * len(f) - 1)
    parts = kmeans.sum_distances(f, kmeans.fit_centroids(f, 10, 0))
    assert parts != whole and parts < 1.3 * whole


def test_source_without_labels_gives_target_features(tmp_path, source):
    folder, data = tmp_path / "photos", tmp_path / "data"
    folder.mkdir()
    for i in range(40):
        save_image(source.raw(torch.tensor([i]), "cpu")[0], folder / f"{i:02}.png")
    photos, network = (
        load_images(str(folder), "train", 32, data),
        models.build("resnet18_target", 32, 0, 0.03),
    )
    content = dict(
        network=network.state_dict(),
        arch="resnet18_target",
        width=0.03,
        image_size=32,
        source=photos.name,
        fingerprint=photos.fingerprint,
    )
    files.save(tmp_path / "target.pt", "target", content)
    flags = [
        "--source",
        folder,
        "--preset",
        "digits",
        "--data-root",
        data,
        "--run-root",
        tmp_path / "runs",
    ]
    flags += ["--target-network", tmp_path / "target.pt", "--num-images", 7]
    method.main(kmeans.METHOD, [str(word) for word in flags])
    d = load_distilled(tmp_path / "runs" / photos.name / "kmeans" / "seed0" / "distilled.pt")
    assert d.target_kind == "feature" and len(set(find_indices(d, photos).tolist())) == 7
    target = load_target(tmp_path / "target.pt", photos, torch.device("cpu"), "fp32")
    torch.testing.assert_close(d.targets, target.features(d.images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("m", "message"), [(25, "not a multiple of digits's 10 classes"), (2000, "fewer than 200")]
)
def test_number_of_images_must_be_a_multiple_of_the_classes(select_images, tmp_path, m, message):
    with pytest.raises(UserError, match=message):
        select_images("--num-images", str(m))
    assert not (tmp_path / "runs").exists()
