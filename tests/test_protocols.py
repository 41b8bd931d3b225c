"""The experiment on evaluation protocols: its probe, its command at toy size, and its tables."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from analysis import protocols as tables
from analysis.tables import gather_results
from data.distilled import load_distilled
from distillers import __main__ as distillers
from evaluation import probes, results
from experiments import protocols
from experiments.tables import TABLES
from models import saved
from tests.conftest import DISTILL, TARGET, run_command
from utils.errors import UserError
from utils.presets import preset


def two_classes(scale):
    """Return features (n, 8) and labels (n,) of two classes whose means differ."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    noise = torch.randn(40, 8, generator=generator)
    return scale * (noise + 3 * labels[:, None]), labels


def test_the_short_probe_minimises_the_regularised_cross_entropy():
    """On standardised features of moderate size, 20 iterations suffice."""
    x, y = two_classes(1.0)
    x = (x - x.mean(0)) / x.std(0)
    tests, truth = x[:20], y[:20]
    short = protocols.unconverged_accuracy_of(x, y, tests, truth, 2)
    weight = torch.zeros(8, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        logits = x.double() @ weight + bias
        loss = -logits.log_softmax(1)[torch.arange(40), y].mean() + 1e-3 / 2 * (weight**2).sum()
        gradients = torch.autograd.grad(loss, [weight, bias])
        with torch.no_grad():
            for value, gradient in zip((weight, bias), gradients, strict=True):
                value -= 0.5 * gradient
    predicted = (tests.double() @ weight + bias).argmax(1)
    assert short == 100 * (predicted == truth).double().mean().item()


def test_features_of_small_scale_defeat_the_short_probe_only():
    """The weight decay outweighs features of scale 1e-4."""
    x, y = two_classes(1e-4)
    x = x - x[y == 0].mean(0)  # not centred
    unbalanced = torch.cat([x[y == 0], x[y == 1][:8]])
    labels = torch.cat([y[y == 0], y[y == 1][:8]])
    assert protocols.unconverged_accuracy_of(unbalanced, labels, x, y, 2) == 50
    assert probes.linear_accuracy_of(unbalanced, labels, x, y, 2) > 95


@pytest.fixture(scope="module")
def run_root(tmp_path_factory):
    """Make a run root with the three sets of digits for seed 0, and return it."""
    top = tmp_path_factory.mktemp("protocols")
    flags = ["--data-root", str(top / "data"), "--run-root", str(top / "runs")]
    run_command("pretrain_target.py", "--source", "digits", *TARGET, *flags)
    common = ["--source", "digits", "--num-images", "20", *flags]
    distillers.main(["random_features", *common])
    distillers.main(["high_loss", *common, "--width", "0.03", "--experts", "1"])
    run_command("distill.py", "--source", "digits", *DISTILL, *flags)
    return top / "runs"


@pytest.fixture
def toy(monkeypatch):
    for name, value in dict(
        SOURCE="digits",
        DATASET="digits",
        LABELS_PER_CLASS=5,
        WIDTH=0.125,
        SEEDS=(0,),
        STEPS={2: dict(epochs=1, batch_size=10), 3: dict(epochs=3, batch_size=20)},
    ).items():
        monkeypatch.setattr(protocols, name, value)
    monkeypatch.setitem(tables.FACTORS, "steps", {2: "2 steps", 3: "3 steps"})


def test_all_combinations_are_evaluated_once(run_root, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(protocols, "STORED", tmp_path / "stored.jsonl")
    argv = [str(run_root), "--data-root", str(run_root.parent / "data")]
    other = dict(name="krr_st_m_50_convnet3_3_0.001_seed0", probe="converged", digest="other")
    results.append(tmp_path, other, "stored.jsonl")
    protocols.main([*argv, "--collect"])
    *lines, last = results.read(tmp_path / "stored.jsonl")
    assert last == other  # stored results of other sets are kept
    # 2 networks without pre-training, and 4 rows x 2 networks x 2 recipes x 2 weight decays
    assert len(lines) == 2 * (2 + 4 * 8)
    assert len({line["digest"] for line in lines}) == len(lines)
    capsys.readouterr()
    protocols.main(argv)
    assert "%" not in capsys.readouterr().out  # no new accuracy
    assert results.read(run_root / "protocols" / protocols.NAME) == lines

    assert gather_results([run_root]) == []  # for other tables

    text = tables.format_combinations(lines)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    assert len(rows) == 2 + 16 and all(all(row) for row in rows)
    (chosen,) = [row for row in rows if row[0] == "3, 0.001, batch norm, converged"]
    wanted = dict(steps=3, weight_decay=1e-3, arch="convnet3", probe="converged", raw=False)

    def accuracy(method, **values):
        (line,) = [
            line
            for line in lines
            if line["method"] == method and all(line[k] == v for k, v in values.items())
        ]
        return line["accuracy"]

    random, krr = accuracy("random_features", **wanted), accuracy("krr_st", **wanted)
    scratch = accuracy("scratch", arch="convnet3", probe="converged")
    assert chosen[1] == f"{scratch:.2f} ± 0.00 ({scratch - random:+.2f})"
    assert chosen[2] == f"{random:.2f} ± 0.00"
    assert chosen[4] == f"{krr:.2f} ± 0.00 ({krr - random:+.2f})"

    effects = [row.split("|")[1:-1] for row in tables.format_factors(lines).splitlines()]
    (batch_norm,) = [row for row in effects if row[0].strip() == "batch norm"]
    pairs = [
        accuracy("krr_st", arch="convnet3", raw=False, steps=s, weight_decay=w, probe=p)
        - accuracy("random_features", arch="convnet3", steps=s, weight_decay=w, probe=p)
        for s in (2, 3)
        for w in (1e-4, 1e-3)
        for p in ("20 iterations", "converged")
    ]
    assert batch_norm[3].strip() == f"{sum(pairs) / len(pairs):+.2f}"


def test_raw_images_are_pixels_and_pretraining_depends_on_them(run_root, toy, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        protocols, "pretrain", lambda network, data, *rest: seen.update(images=data.images)
    )
    path = run_root / "digits" / "krr_st" / "seed0" / "distilled.pt"
    distilled = load_distilled(path)
    for raw, expected in ((False, distilled.images), (True, distilled.pixels())):
        case = protocols.Case("krr_st", 0, "convnet3", 2, 0.25, raw)
        args = protocols.parse_args([str(run_root)])
        protocols.pretrained_network(case, args, torch.device("cpu"))
        assert torch.equal(seen["images"], expected)


def test_a_stored_network_is_reused(run_root, toy):
    args = protocols.parse_args([str(run_root)])
    case = protocols.Case("random_features", 0, "convnet3", 2, 0.5)
    network = protocols.pretrained_network(case, args, torch.device("cpu"))
    path = run_root / "protocols" / case.name / "model.pt"
    before = path.stat().st_mtime_ns
    again = protocols.pretrained_network(case, args, torch.device("cpu"))
    assert path.stat().st_mtime_ns == before
    state = saved.load_model(path)["network"]
    for each in (network, again):
        assert all(torch.equal(value, state[name]) for name, value in each.state_dict().items())


def test_a_new_set_is_evaluated_again(run_root, toy, tmp_path, capsys):
    top = tmp_path / "runs"
    for name in ("random_features", "high_loss", "krr_st"):
        shutil.copytree(run_root / "digits" / name, top / "digits" / name)
    argv = [str(top), "--data-root", str(run_root.parent / "data")]
    protocols.main(argv)
    count = len(results.read(top / "protocols" / protocols.NAME))
    shutil.copy(
        top / "digits" / "random_features" / "seed0" / "distilled.pt",
        top / "digits" / "high_loss" / "seed0",
    )
    with pytest.raises(UserError, match=r"high_loss.*other settings"):
        protocols.main(argv)
    for folder in (top / "protocols").glob("high_loss*"):
        shutil.rmtree(folder)
    capsys.readouterr()
    protocols.main(argv)
    assert capsys.readouterr().out.count("high_loss") == 2 * 8
    assert len(results.read(top / "protocols" / protocols.NAME)) == count + 2 * 8


def test_factors_pair_the_distillations_by_their_seeds():
    lines = []
    for values in tables.list_combinations():
        for seed in (1, 2) if values["steps"] == min(tables.FACTORS["steps"]) else (0, 1, 2):
            for method, gain in (("random_features", 0), ("krr_st", 10 * seed)):
                line = dict(method=method, raw=False, seed=seed, equal_steps=False)
                lines.append(line | values | dict(accuracy=40.0 + gain))
    effects = [row.split("|")[1:-1] for row in tables.format_factors(lines).splitlines()]
    (batch_norm,) = [row for row in effects if row[0].strip() == "batch norm"]
    assert batch_norm[3].strip().startswith("+15.00")


def test_missing_sets_are_left_out(toy, tmp_path, capsys):
    found = [tmp_path / "digits" / name / "seed0" / "distilled.pt" for name in protocols.SETS]
    for path in found[:2]:
        path.parent.mkdir(parents=True)
        path.touch()
    plain = protocols.parse_args([str(tmp_path)])
    cases = protocols.select_cases(plain)
    assert {case.method for case in cases} == {"scratch", *protocols.SETS[:2]}
    assert len(cases) == 2 + 2 * 8
    text = "1 of 3 sets are missing and left out; to make them: bash scripts/run_small.sh"
    assert text in capsys.readouterr().out
    cases = protocols.select_cases(protocols.parse_args([str(tmp_path), "--successors"]))
    assert [case.method for case in cases] == sorted(2 * protocols.SETS[:2], reverse=True)
    assert "scripts/run_successors.sh" in capsys.readouterr().out

    found[2].parent.mkdir(parents=True)
    found[2].touch()
    assert len(protocols.select_cases(plain)) == 2 + 4 * 8
    assert capsys.readouterr().out == ""
    for path in found:
        path.unlink()
    with pytest.raises(UserError, match=r"none of the sets .*run_small\.sh --sources digits"):
        protocols.main([str(tmp_path)])


def test_stored_results_are_in_the_documentation_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "STORED", tmp_path / "none.jsonl")
    assert tables.collected_tables() == {}
    line = dict(method="krr_st", raw=False, seed=0, arch="convnet3", steps=80, weight_decay=1e-4)
    line |= dict(probe="converged", accuracy=50.0, digest="x", equal_steps=False)
    (tmp_path / "some.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(tables, "STORED", tmp_path / "some.jsonl")
    keys = {"protocols", "protocol_factors", "successors"}
    assert tables.collected_tables().keys() == keys


@pytest.fixture
def successors(run_root, toy, monkeypatch):
    """Add a set with a learned rate, and list three sets of two sizes."""
    flags = ["--data-root", run_root.parent / "data", "--run-root", run_root]
    path = run_root / "digits" / "mkdt" / "seed0" / "distilled.pt"
    if not path.is_file():
        argv = ["--source", "digits", "--num-images", 20, "--width", 0.03, "--experts", 1]
        argv += ["--outer-steps", 2, "--inner-steps", 2, "--expert-batch", 400, *flags]
        distillers.main(["mkdt", *map(str, argv)])
        for name in ("random_features", "krr_st"):
            other = run_root / "digits" / f"{name}_m_50" / "seed0"
            other.mkdir(parents=True)
            shutil.copy(run_root / "digits" / name / "seed0" / "distilled.pt", other)
    methods = ("random_features", "mkdt", "random_features_m_50", "krr_st_m_50")
    listed = {"successors": replace(TABLES["successors"], methods=methods)}
    for module in (protocols, tables):
        monkeypatch.setattr(module, "TABLES", listed)
    for name, steps in (("MKDT", 2), ("KRR-ST", 3)):
        monkeypatch.setitem(protocols.PAPERS, name, protocols.PAPERS[name] | dict(steps=steps))
    return flags


def test_successors_are_evaluated_with_the_protocols_of_two_papers(run_root, successors, capsys):
    path = run_root / "protocols" / protocols.NAME
    known = len(results.read(path)) if path.is_file() else 0
    protocols.main([str(run_root), *map(str, successors[:2]), "--successors"])
    lines = results.read(path)
    new = {line["name"] for line in lines[known:]}
    assert {"mkdt_dc_convnet3_2_0.0001_seed0", "mkdt_convnet3_3_0.001_seed0"} <= new
    assert {"krr_st_m_50_convnet3_3_0.001_seed0"} <= new and len(lines) >= known + 2 * 6

    text = tables.format_successors(lines)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    assert rows[0][1:3] == ["protocol of MKDT", "protocol of KRR-ST"]
    names = [row[0] for row in rows[2:]]
    assert names[:2] == ["100, random real images with the target's features", "100, MKDT"]
    assert names[3] == "50, KRR-ST"

    def accuracy(name, probe):
        return next(e["accuracy"] for e in lines if (e["name"], e["probe"]) == (name, probe))

    ours = accuracy("krr_st_m_50_convnet3_3_0.001_seed0", "converged")
    base = accuracy("random_features_m_50_convnet3_3_0.001_seed0", "converged")
    assert rows[5][2] == f"{ours:.2f} ± 0.00 ({ours - base:+.2f})"
    theirs = accuracy("mkdt_dc_convnet3_2_0.0001_seed0", "20 iterations")
    base = accuracy("random_features_dc_convnet3_2_0.0001_seed0", "20 iterations")
    assert rows[3][1] == f"{theirs:.2f} ± 0.00 ({theirs - base:+.2f})"
    assert [row[3] for row in rows[2:]] == ["1"] * 4


def test_low_rank_sets_are_also_pretrained_for_as_many_steps(run_root, toy, monkeypatch):
    listed = [c for c in protocols.list_successors() if c.equal_steps]
    assert {c.method for c in listed} == {f"krr_st_low_rank{m}" for m in ("", "_m_50", "_m_200")}
    assert len({c.name for c in listed}) == len(listed) == 3 * len(protocols.SEEDS) * 2
    assert {c.name.replace("_equal_steps", "") for c in listed} < {
        c.name for c in protocols.list_successors() if not c.equal_steps
    }
    # 20 images with the storage of 10, in batches of 4: 5 steps per epoch instead of 3
    plain = load_distilled(run_root / "digits" / "krr_st" / "seed0" / "distilled.pt")
    low_rank = replace(plain, meta=plain.meta | dict(num_images=10))
    assert len(plain.images) == 20
    monkeypatch.setattr(protocols, "load_distilled", lambda path: low_rank)
    monkeypatch.setitem(protocols.STEPS, 3, dict(epochs=7, batch_size=4))
    recipes = []
    monkeypatch.setattr(
        protocols, "pretrain", lambda network, data, args, *rest: recipes.append(args)
    )
    args = protocols.parse_args([str(run_root)])
    for equal_steps in (False, True):
        case = protocols.Case("krr_st", 0, "convnet3", 3, 0.75, equal_steps=equal_steps)
        protocols.pretrained_network(case, args, torch.device("cpu"))
    assert [(r.epochs, r.steps) for r in recipes] == [(7, 0), (7, 21)]


def test_the_table_shows_as_many_steps_in_a_row_of_its_own():
    line = dict(raw=False, seed=0, arch="convnet3", steps=600, weight_decay=1e-3)
    line |= dict(probe="converged")
    lines = [
        line | dict(method="random_features", equal_steps=False, accuracy=40.0),
        line | dict(method="krr_st_low_rank", equal_steps=False, accuracy=45.0),
        line | dict(method="krr_st_low_rank", equal_steps=True, accuracy=43.0),
    ]
    rows = tables.format_successors(lines).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[2] for row in cells] == [
        "40.00 ± 0.00",
        "45.00 ± 0.00 (+5.00)",
        "43.00 ± 0.00 (+3.00)",
    ]
    assert cells[2][0] == cells[1][0] + ", as many steps"


def test_the_learned_rate_is_used_with_the_protocol_of_mkdt_only(run_root, successors, monkeypatch):
    rates = {}

    def spy(network, data, args, *rest):
        rates[type(network.features[1]).__name__] = args.lr
        raise UserError("enough")

    monkeypatch.setattr(protocols, "pretrain", spy)
    args = protocols.parse_args([str(run_root)])
    for arch in ("dc_convnet3", "convnet3"):
        with pytest.raises(UserError, match="enough"):
            case = protocols.Case("mkdt", 0, arch, 2, 0.125)
            protocols.pretrained_network(case, args, torch.device("cpu"))
    learned = load_distilled(run_root / "digits" / "mkdt" / "seed0" / "distilled.pt")
    usual = preset("other", "pretrain", "feature", "convnet3")["lr"]
    assert rates == {"GroupNorm": learned.meta["learned_rate"], "BatchNorm2d": usual}
    assert learned.meta["learned_rate"] != usual
