"""Evaluation does not change the network or depend on the batch size; probes equal formulas."""

import pytest
import torch

import models
from data.images import ImageSet
from evaluation import probes

CPU = torch.device("cpu")


def make_images(n=90, classes=3, seed=0, signal=0.6):
    """Make noise images whose brightness depends on the class."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    x = torch.rand(n, 32, 32, 3, generator=g) * (1 - signal) + signal * labels[
        :, None, None, None
    ] / (classes - 1)
    pixels = (x * 255).to(torch.uint8)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.3)
    return ImageSet(
        "noise", pixels, labels, [str(c) for c in range(classes)], mean, std, fingerprint=""
    )


def make_network(seed=0, outputs=3):
    torch.manual_seed(seed)
    built = models.build("convnet3", 32, outputs, width=0.05)
    built(torch.randn(8, 3, 32, 32))  # moves the running statistics
    return built


def test_evaluation_restores_modes_and_changes_no_buffer():
    net = make_network().train()
    net.features[1].eval()
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for batch_statistics in (False, True):
        probes.accuracy(net, make_images(), CPU, batch_statistics=batch_statistics)
    features = probes.compute_outputs(net.embed, make_images(), CPU)
    labels = make_images().labels
    probes.knn_accuracy_of(features, labels, features, labels, 3)
    probes.linear_accuracy_of(features, labels, features, labels, 3)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_results_do_not_depend_on_the_batch_size(monkeypatch):
    net, data = make_network(), make_images()
    results = []
    for size in (7, 90):
        monkeypatch.setattr(probes, "BATCH", size)
        results.append(
            (probes.accuracy(net, data, CPU), probes.compute_outputs(net.embed, data, CPU))
        )
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1])


def test_accuracy_is_the_share_of_correct_eval_mode_predictions():
    net, data = make_network().train(), make_images()
    accuracy = probes.accuracy(net, data, CPU)
    predicted = net.eval()(data.normalised(torch.arange(90), CPU)).argmax(1)
    assert accuracy == pytest.approx(100 * (predicted == data.labels).double().mean().item())


def test_batch_statistics_are_those_of_training_mode(monkeypatch):
    monkeypatch.setattr(probes, "BATCH", 1000)
    net, data = make_network(), make_images()
    accuracy = probes.accuracy(net, data, CPU, batch_statistics=True)
    predicted = net.train()(data.normalised(torch.arange(90), CPU)).argmax(1)
    assert accuracy == pytest.approx(
        100 * (predicted == data.labels).double().mean().item(), abs=1.2
    )


def test_knn_follows_its_formula():
    net, train, test = make_network().eval(), make_images(40), make_images(20, seed=1)
    with torch.no_grad():
        bank, queries = (net.embed(d.normalised(torch.arange(len(d)), CPU)) for d in (train, test))
    correct = 0
    for query, truth in zip(queries, test.labels, strict=True):
        similarity = torch.nn.functional.cosine_similarity(bank, query[None])
        votes = [0.0, 0.0, 0.0]
        for i in similarity.argsort(descending=True)[:20]:
            votes[train.labels[i]] += float(torch.exp(similarity[i] / 0.07))
        correct += max(range(3), key=votes.__getitem__) == truth
    features, tests = (probes.compute_outputs(net.embed, images, CPU) for images in (train, test))
    ours = probes.knn_accuracy_of(features, train.labels, tests, test.labels, 3)
    assert ours == pytest.approx(100 * correct / 20)


def test_linear_probe_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    net, train, test = (
        make_network().eval(),
        make_images(60, signal=0.05),
        make_images(200, seed=1, signal=0.05),
    )
    with torch.no_grad():
        f, q = (
            net.embed(d.normalised(torch.arange(len(d)), CPU)).double().numpy()
            for d in (train, test)
        )
    mean, std = f.mean(0), f.std(0).clip(1e-6)
    theirs = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit((f - mean) / std, train.labels)
    features, tests = (probes.compute_outputs(net.embed, images, CPU) for images in (train, test))
    ours = probes.linear_accuracy_of(features, train.labels, tests, test.labels, 3)
    assert ours == pytest.approx(100 * theirs.score((q - mean) / std, test.labels), abs=1.0)
    assert 40 < ours < 100
