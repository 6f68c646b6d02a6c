"""Catalogue: what the files and source texts say must be what the classes themselves say."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from filtrun.catalogue import GROUPS, conf_dir, entries, find
from filtrun.citation import Paper, cited, parse_paper
from filtrun.config_file import comments, parse_yaml
from filtrun.errors import UserError
from filtrun.source import describe, prose, quick_fact
from filtrun.syntax import module_path


def entry(kind, name, *dirs):
    return next(e for e in entries(kind, dirs) if e.name == name)


def real(target):
    import importlib

    home, _, name = target.rpartition(".")
    return getattr(importlib.import_module(home), name)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_conf_dir_has_every_group():
    assert (conf_dir() / "config.yaml").is_file()
    assert all((conf_dir() / group).is_dir() for group in GROUPS.values())


def test_conf_dir_prefers_the_folder_in_an_installed_package(tmp_path, monkeypatch):
    import filtrun.catalogue

    package = tmp_path / "site" / "filtrun"
    inside = write(package / "conf" / "config.yaml", "{}").parent
    write(tmp_path / "site" / "conf" / "config.yaml", "{}")
    monkeypatch.setattr(filtrun.catalogue, "__file__", str(package / "catalogue.py"))
    assert conf_dir() == inside
    (inside / "config.yaml").unlink()
    assert conf_dir() == tmp_path / "site" / "conf"
    (tmp_path / "site" / "conf" / "config.yaml").unlink()
    with pytest.raises(UserError, match="configs are missing"):
        conf_dir()


def test_sara_method():
    sara = entry("methods", "sara")
    assert (sara.target, sara.family) == ("filtrun.methods.peft.sara.SaRA", "peft")
    assert sara.paper == Paper("SaRA", "https://arxiv.org/abs/2409.06633", 2025)
    assert sara.summary == "SaRA: train the smallest weights of a pre-trained model (ICLR 2025, arXiv 2409.06633)."
    assert list(sara.nodes) == ["method.sara"] and sara.node["lambda_rank"] == 5e-4
    assert sara.notes["threshold"] == "|w| below this trains; or"


def test_global_package_and_picks():
    probe = entry("methods", "linear_probe")
    assert probe.summary == "Train the classification head on frozen features."
    assert probe.tasks == ("classify",) and probe.picks == {"model": "resnet20"}
    unet = entry("models", "unet")
    assert unet.tasks == ("diffuse", "inverse") and unet.picks == {"task": "diffuse"} and unet.node["size"] == "tiny"
    assert entry("models", "diffusers").sets == {"task": {"noise": "linear", "prediction": "eps"}}


def test_tasks_of_every_kind():
    assert entry("tasks", "diffuse").tasks == ("diffuse",)
    assert entry("data", "digits").tasks == ()
    assert {e.name for e in entries("models") if "classify" in e.tasks} >= {"resnet20", "vit", "vgg16_bn"}


def test_every_entry_is_readable_and_has_a_summary():
    for kind in GROUPS:
        for found in entries(kind):
            assert not found.problem, found.problem
            assert found.summary, found.path


@pytest.mark.parametrize("kind", ["methods", "models", "data", "tasks", "loggers", "trainer"])
def test_options_read_from_text_are_those_of_the_class(kind):
    for found in entries(kind):
        if not found.target:
            continue
        cls, options = real(found.target), describe(found.target).options
        if not dataclasses.is_dataclass(cls):
            continue
        fields = [f for f in dataclasses.fields(cls) if f.init]
        assert sorted(options) == sorted(f.name for f in fields)
        for field in fields:
            option, default = options[field.name], field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            assert option.required == (default is dataclasses.MISSING)
            assert option.required or option.default == default, (found.name, field.name)
            said = field.metadata
            if said:
                assert (option.help, option.source) == (said["help"], said["source"])
                assert (option.low, option.high) == (said["low"], said["high"])
                assert option.choices == (tuple(said["choices"]) if said["choices"] is not None else None)


def test_a_function_gives_its_parameters_without_those_the_runner_fills():
    options = describe("filtrun.models.timm_models.timm_classifier").options
    assert options["name"].default == "resnet18" and options["name"].type == "str"
    assert "timm model" in options["name"].help
    assert not {"num_classes", "in_channels", "image_size", "pretrained", "options"} & set(options)


def test_facts_and_hooks_are_those_of_the_class():
    from filtrun.method import HOOKS, Method

    for found in entries("methods"):
        cls, source = real(found.target), found.source
        assert source.facts["trains"] == cls.trains and source.facts["paper"] == cls.paper
        assert quick_fact(found.target, "paper") == cls.paper
        assert (quick_fact(found.target, "tasks") or None) == cls.tasks
        for hook in HOOKS:
            own = getattr(cls, hook) is not getattr(Method, hook)
            assert own == (source.origin[hook] != "filtrun.method.Method"), (found.name, hook)


def test_metrics_are_those_of_the_task():
    for found in entries("tasks"):
        described, declared = found.source.facts["metrics"], real(found.target).metrics
        assert list(described) == list(declared)
        for name, metric in declared.items():
            assert tuple(described[name]) == (metric.title, metric.better, metric.meaning, metric.format)


@pytest.mark.parametrize(
    ("text", "paper"),
    [
        ("SaRA, arXiv 2409.06633 (ICLR 2025)", Paper("SaRA", "https://arxiv.org/abs/2409.06633", 2025)),
        ("X, arXiv 2007.01234", Paper("X", "https://arxiv.org/abs/2007.01234", 2020)),
        ("BitFit, arXiv:2106.10199 (2022)", Paper("BitFit", "https://arxiv.org/abs/2106.10199", 2022)),
        ("a baseline", Paper("a baseline", "", None)),
        ("Optimal Brain Damage, 1990", Paper("Optimal Brain Damage", "", 1990)),
        ("Y, https://example.org/2019/y.pdf (2018)", Paper("Y", "https://example.org/2019/y.pdf", 2018)),
        ("Z, doi 10.5281/zenodo.4414861.", Paper("Z", "https://doi.org/10.5281/zenodo.4414861", None)),
        (
            "probe (baseline; protocol of VPT, arXiv 2203.12119)",
            Paper("probe (baseline; protocol of VPT)", "https://arxiv.org/abs/2203.12119", 2022),
        ),
    ],
)
def test_parse_paper(text, paper):
    assert parse_paper(text) == paper


def test_cited_takes_the_first_publication_and_no_licence():
    header = 'A net. Error 7 % (Table 6). He et\nal., "Residual", CVPR 2016 (arXiv 1512.03385), section 4.2. Any size.'
    assert cited(header) == Paper('He et al., "Residual", CVPR 2016', "https://arxiv.org/abs/1512.03385", 2016)
    assert cited("Clothes.\nLicence: MIT (Zalando, arXiv:1708.07747).") is None


def test_numbers_are_read_as_hydra_reads_them(tmp_path):
    from omegaconf import OmegaConf

    text = (
        "a: 1e-3\nb: 1.0e-3\nc: 5E+2\nd: .5\ne: 1_000\nf: 1e3x\ng: '1e-3'\nh: -2.5\ni: 3\nj: .inf\nk: 2024-01\nl: ~\n"
    )
    assert parse_yaml(text, tmp_path / "x.yaml") == OmegaConf.to_container(OmegaConf.create(text))


def test_comments():
    header, notes = comments(
        "# @package _global_\n# First.\n# Second.\na: 1  # one\n# no\nb:\n  c: x  # deep\nd: 'x#'\n"
    )
    assert header == "First.\nSecond."
    assert notes == {"a": "one", "c": "deep"}


def test_user_folders_add_entries_and_do_not_replace(tmp_path):
    write(tmp_path / "method" / "mine.yaml", "# Mine.\nmine: {_target_: filtrun.methods.peft.sara.SaRA, lr: 8}\n")
    write(tmp_path / "method" / "sara.yaml", "# Another.\nsara: {_target_: a.B}\n")
    write(tmp_path / "model" / "sub" / "net.yaml", "# A net.\n_target_: their_pkg.nets.Net\ntasks: [classify]\n")
    mine = entry("methods", "mine", tmp_path)
    assert (mine.summary, mine.family, mine.node["lr"]) == ("Mine.", "peft", 8)
    assert entry("methods", "sara", tmp_path).target == "filtrun.methods.peft.sara.SaRA"
    net = entry("models", "sub/net", tmp_path)
    assert (net.family, net.tasks, net.source) == ("their_pkg", ("classify",), None)
    with pytest.raises(UserError, match="no such folder"):
        entries("methods", [tmp_path / "absent"])


def test_a_config_may_build_on_another_of_its_group(tmp_path):
    write(tmp_path / "data" / "base.yaml", "# Base.\n_target_: filtrun.data.digits.Digits\nfew_shot: 1\nflip: true\n")
    write(tmp_path / "data" / "more.yaml", "# More.\ndefaults: [base, _self_]\nfew_shot: 5\n")
    more = entry("data", "more", tmp_path)
    assert more.node == {"_target_": "filtrun.data.digits.Digits", "few_shot": 5, "flip": True}


@pytest.mark.parametrize("text", ["a: [1\n", "- 1\n", "bad: 3\n", "\x00"])
def test_a_broken_config_is_an_entry_with_a_problem(tmp_path, text):
    path = write(tmp_path / "method" / "bad.yaml", text)
    bad = entry("methods", "bad", tmp_path)
    assert str(path) in bad.problem and bad.tasks == () and bad.paper is None


def test_source_of_a_users_package_is_read_without_importing_it(tmp_path, monkeypatch):
    write(tmp_path / "their_kit" / "__init__.py", "raise SystemExit('imported')")
    write(
        tmp_path / "their_kit" / "methods.py",
        "from dataclasses import dataclass, field\nfrom filtrun.method import Method\nfrom filtrun.options import opt\n"
        "from .names import KINDS\n\n\n@dataclass\nclass Base(Method):\n    '''Does it.'''\n\n"
        "    a: int = opt(1, 'first', low=0)\n"
        "    c: list = field(default_factory=list)\n\n\n@dataclass\nclass Theirs(Base):\n"
        "    kind: str = opt('x', 'which', choices=KINDS)\n    must: float\n    paper = 'P, arXiv 2401.00001'\n\n"
        "    def loss(self, run, batch, loss):\n        return loss\n",
    )
    write(tmp_path / "their_kit" / "names.py", "KINDS = ('x', 'y')\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = describe("their_kit.methods.Theirs")
    assert source.doc == "Does it."
    assert {k: (o.default, o.choices, o.required) for k, o in source.options.items()} == {
        "a": (1, None, False), "c": ([], None, False), "kind": ("x", ("x", "y"), False), "must": (None, None, True),
    }  # fmt: skip
    assert source.origin["loss"] == "their_kit.methods.Theirs" and source.origin["finish"] == "filtrun.method.Method"
    assert quick_fact("their_kit.methods.Theirs", "paper") == "P, arXiv 2401.00001"
    assert "their_kit" not in sys.modules


def test_odd_sources_do_not_stop_it(tmp_path, monkeypatch):
    write(tmp_path / "odd_kit.py", "A = B\nB = A\nclass Loop(Loop):\n    x = A\nclass Fine:\n    y = f'{1}'\n")
    write(tmp_path / "odd_syntax.py", "class (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert describe("odd_kit.Loop") is None and describe("odd_syntax.X") is None
    assert describe("odd_kit.Fine").facts["y"] == "f'{1}'"
    assert describe("nowhere_at_all.X") is None and describe("plain") is None and describe("odd_kit.Absent") is None
    assert module_path("filtrun.no.such") is None


def test_prose_ends_before_the_first_section():
    assert prose("One.\n\nTwo.\n\nArgs:\n    x: y\n") == "One.\n\nTwo."
    assert prose("One.") == "One."


def test_find_is_over_everything_and_names_the_closest():
    assert [e.kind for e in find("sara")] == ["methods", "papers"]
    assert [e.name for e in find("Linear-Probe")] == ["linear_probe"]
    assert [e.kind for e in find("trainer")] == ["trainer"]
    with pytest.raises(UserError, match="did you mean 'digits'"):
        find("digit")
    with pytest.raises(UserError, match="did you mean 'methods'"):
        entries("method")


def test_paths_are_absolute():
    assert all(Path(e.path).is_absolute() for e in entries("data"))
