"""The cells of a command line: the product Hydra's own sweeper makes, and rows of values that pair."""

from __future__ import annotations

from pathlib import Path

import pytest

from filtrun.errors import UserError
from filtrun.sweeps.expand import check_hydra, expand, pull, split_rows


@pytest.mark.parametrize(
    "words",
    [
        ["method=lora,sara", "seed=0,1,2", "trainer.steps=3"],
        ["seed=range(0,6,2)", "trainer.lr=choice(1e-3, 0.01)", "+name='a, b'"],
        ["method=[lora,sara],full", "data.target=[1,2],[3]", "name=x\\,y,z"],
        ["seed=0", "seed=1,2"],
        ["trainer.lr=sort(3,1,2)", "threads=null,1", "method=glob([l*,ss*],exclude=lin*)"],
    ],
)
def test_the_product_is_that_of_hydra_s_sweeper(words: list[str]) -> None:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import create_config_search_path
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from filtrun.catalogue import conf_dir

    loader = ConfigLoaderImpl(create_config_search_path(str(conf_dir())))
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(words)
    (batch,) = BasicSweeper.split_arguments(parsed, None)
    made = expand(words)
    values = [[o.value() for o in OverridesParser.create().parse_overrides(list(cell))] for cell in made]
    assert values == [[o.value() for o in OverridesParser.create().parse_overrides(list(cell))] for cell in batch]
    assert len(values) > 1


def test_rows_pair_values_and_go_with_every_cell() -> None:
    rows = split_rows("method=lora trainer.lr=1e-3,2e-3; method=sara 'name=a b'")
    assert rows == [["method=lora", "trainer.lr=1e-3,2e-3"], ["method=sara", "name=a b"]]
    assert expand(["seed=0,1", "device=cpu"], rows) == [
        ("method=lora", "trainer.lr=0.001", "seed=0", "device=cpu"),
        ("method=lora", "trainer.lr=0.001", "seed=1", "device=cpu"),
        ("method=lora", "trainer.lr=0.002", "seed=0", "device=cpu"),
        ("method=lora", "trainer.lr=0.002", "seed=1", "device=cpu"),
        ("method=sara", "name=a b", "seed=0", "device=cpu"),
        ("method=sara", "name=a b", "seed=1", "device=cpu"),
    ]


def test_a_glob_looks_into_the_user_s_own_configs(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine_one.yaml").write_text("{}")
    assert expand(["method=glob(mine*)"], config_dirs=[tmp_path]) == [("method=mine_one",)]
    with pytest.raises(UserError, match=r"method=glob\(mine\*\) is a list without values"):
        expand(["method=glob(mine*)"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trainer.lr=interval(0,1)"], "an interval has no end of values"),
        (["seed=0,"], "'seed=0,' on the command line is not understood"),
    ],
)
def test_words_that_make_no_cells(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        expand(words)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method=lora; ", "rows: '' must read KEY=VALUE"),
        ("method=lora sara", "rows: 'method=lora sara' must read"),
        ("name='a", "No closing quotation"),
        ("hydra.sweep.dir=x", "the same for all its cells"),
    ],
)
def test_rows_that_are_none(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        split_rows(text)


def test_what_goes_with_a_sweep() -> None:
    check_hydra(["hydra.sweep.dir=a", "seed=1"], ["-m", "--config-dir", "x", "--config-dir=x"])
    for words, flags, says in (
        (["hydra.run.dir=a"], [], "lie below hydra.sweep.dir"),
        (["hydra.sweep.subdir=a"], [], "named by what it computes"),
        (["hydra.sweep.dirs=a"], [], "did you mean 'hydra.sweep.dir'"),
        ([], ["--config-name", "x"], "--config-name does not go with a sweep"),
    ):
        with pytest.raises(UserError, match=says):
            check_hydra(words, flags)
    assert pull(["a=1", "b=2", "a=3=4"], "a") == (["b=2"], "3=4") and pull(["ab=1"], "a") == (["ab=1"], None)
