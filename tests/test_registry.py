"""The registry of methods agrees with the modules and settings that it names."""

import importlib

import pytest

from data.distilled import TARGET_KINDS
from distillers import method, registry
from tests.conftest import run_command
from utils.presets import PRETRAIN, STAGES


@pytest.mark.parametrize(
    "entry", [entry for entry in registry.ENTRIES if entry.module], ids=lambda entry: entry.name
)
def test_each_method_has_a_module_settings_and_flags(entry):
    made_by = importlib.import_module(entry.module).METHOD
    assert made_by.name == entry.name and entry.stage in STAGES and entry.targets in TARGET_KINDS
    assert entry.labels in ("yes", "no", "optional")
    args = vars(method.parse_args(made_by, ["--source", "cifar100"]))
    assert ("target_network" in args) == entry.target_network
    for variant in entry.variants:
        assert variant.name.startswith(f"{entry.name}_")
        for name, value in variant.settings.items():
            assert args[name] != value and type(args[name]) is type(value), (variant.name, name)
        assert all(args[name] > 0 for name in variant.factors)


def test_names_are_unique_and_known_with_and_without_their_target_network():
    assert len(registry.TITLES) == len(registry.METHODS) + len(registry.VARIANTS)
    assert registry.entry_of("krr_st_d5.encoder").name == "krr_st"
    assert registry.entry_of("dm").stage == "dm"
    assert registry.title("krr_st.encoder") == "KRR-ST, target encoder"
    assert registry.title("theirs") == "theirs"
    names = ["theirs", "full", "krr_st_d5", "krr_st.encoder", "krr_st", "scratch"]
    assert sorted(names, key=registry.order) == names[::-1]
    assert registry.own_settings("krr_st_as_released.encoder") == {
        "distill.outer_lr",
        "distill.keep_pool_count",
        "distill.raw_init",
        "distill.augment_outer",
    }
    assert registry.own_settings("krr_st_m_50") == registry.own_settings("krr_st") == set()
    assert "steps" in PRETRAIN["feature"]
    assert registry.own_settings("full_10x") == {"pretrain.steps"}


@pytest.mark.long
def test_command_line_lists_the_methods_and_names_itself():
    shown = run_command("-m", "distillers", "--help").stdout
    assert all(f"\n  {name} " in shown for name in registry.COMMANDS)
    assert "\n  krr_st " not in shown
    done = run_command("-m", "distillers", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "python -m distillers: error: the first argument must be a method"
    )
    done = run_command("-m", "distillers", "random", "--name", "full.encoder", check=False)
    assert done.returncode == 2 and "must be a plain word" in done.stderr


def test_documentation_has_a_row_for_each_method():
    rows = registry.markdown().splitlines()
    assert len(rows) == 2 + len(registry.ENTRIES)
    assert rows[2].startswith("| `python distill.py` | KRR-ST: ")
    assert all(row.count("|") == 7 for row in rows)
