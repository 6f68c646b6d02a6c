from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest

from filtrun.errors import UserError
from filtrun.verbs import doctor, doctor_checks


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_name(checks):
    return {(c.group, c.name): c for c in checks}


def test_this_machine_can_run_the_main_job(here, capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    states = {(c["group"], c["name"]): c for c in found["checks"]}
    import torch

    assert states["versions", "torch"]["detail"].split("+")[0] == torch.__version__.split("+")[0]
    assert states["data sets", "digits"]["state"] == "ok" and states["configs", "conf"]["state"] == "ok"
    assert states["folders", "outputs"]["detail"].startswith(str(here / "outputs"))
    assert list(here.iterdir()) == []  # looking leaves nothing behind


def test_the_page(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(doctor_checks, "EXTRAS", {"mlflow": ("no_such_module",)})
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "pip install 'filtrun[mlflow]'" in text and "can run here" in text and "cores for this process" in text


def test_what_the_main_job_needs_makes_it_fail(here, capsys, monkeypatch):
    monkeypatch.setattr(doctor_checks, "NEEDED", {"no_such_module": "no-such-package"})
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "BROKEN" in text and "pip install no-such-package" in text and "cannot run: no-such-package" in text


def test_optional_packages_are_missing_not_broken(monkeypatch):
    monkeypatch.setattr(doctor_checks, "EXTRAS", {"timm": ("no_such_module",), "rich": ("rich",)})
    timm, rich = doctor_checks.extras()
    assert (timm.state, timm.fix) == ("missing", "pip install 'filtrun[timm]'") and rich.state == "ok"


def test_data_sets_under_a_root(tmp_path):
    checks = by_name(doctor_checks.data_sets(str(tmp_path)))
    assert checks["data sets", "digits"].state == "ok"  # comes with scikit-learn wherever the root is
    assert checks["data sets", "cifar100"].state == "missing"
    names = [c.name for c in doctor_checks.data_sets(None)]
    assert "cifar" in names and "cifar10" not in names  # one set under two names


def test_inception_weights(tmp_path, monkeypatch):
    weights = tmp_path / "w.safetensors"
    monkeypatch.setenv("FILTRUN_INCEPTION", str(weights))
    (check,) = doctor_checks.inception()
    assert check.state == "missing" and "is not a file" in check.detail
    weights.touch()
    (check,) = doctor_checks.inception()
    assert (check.state, check.detail) == ("ok", str(weights))
    monkeypatch.delenv("FILTRUN_INCEPTION")
    monkeypatch.setenv("HOME", str(tmp_path))
    (check,) = doctor_checks.inception()
    assert check.state == "missing" and "FILTRUN_INCEPTION=FILE" in check.fix


def test_folders(tmp_path, monkeypatch):
    assert doctor_checks.folder("outputs", tmp_path / "a" / "b").state == "ok"
    (tmp_path / "file").touch()
    check = doctor_checks.folder("stage cache", tmp_path / "file" / "x")
    assert check.state == "broken" and "stages.root=DIR" in check.fix
    space = namedtuple("space", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: space(0, 0, 1_500_000_000))
    assert doctor_checks.folder("outputs", tmp_path).state == "missing"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: space(0, 0, 1_000_000))
    assert doctor_checks.folder("outputs", tmp_path).state == "broken"

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_checks.tempfile, "TemporaryFile", refuse)
    check = doctor_checks.folder("outputs", tmp_path)
    assert check.state == "broken" and "Permission denied" in check.detail


def test_the_stage_cache_may_be_elsewhere(here, capsys):
    assert doctor.main([f"stages.root={here / 'cache'}", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert next(c for c in checks if c["name"] == "stage cache")["detail"].startswith(str(here / "cache"))


def test_a_check_that_fails_is_reported(here, monkeypatch):
    def fall():
        raise OSError("disk on fire")

    monkeypatch.setattr(doctor_checks, "extras", fall)
    check = by_name(doctor_checks.all_checks())["extras", "extras"]
    assert (check.state, check.detail) == ("missing", "could not be checked: OSError: disk on fire")


def test_mistakes():
    with pytest.raises(UserError, match="did you mean 'data.root'"):
        doctor.main(["dataroot=x"])
    with pytest.raises(UserError, match="is no option"):
        doctor.main(["--jsn"])
