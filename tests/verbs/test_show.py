from __future__ import annotations

import json

import pytest

from filtrun.errors import UserError
from filtrun.verbs import show


def shown(capsys, monkeypatch, folder, width=80):
    monkeypatch.setenv("COLUMNS", str(width))
    assert show.main([str(folder)]) == 0
    return capsys.readouterr().out


def test_a_finished_run(records, tmp_path, capsys, monkeypatch):
    folder = records.write_record(tmp_path / "run")
    (folder / "samples.png").touch()
    text = shown(capsys, monkeypatch, folder, width=120)
    for part in ("sara-digits-unet: finished", "FID ↓", "71.30", "12.41", "-58.89 better", "filtrun method=sara seed=1",
                 "pretrain abababababababab (cached)", "samples: samples.png", "cpu (x86_64)", "total time: 48.2 s",
                 "threshold 0.01235", "selected_weights 20,480", "1.2 MFLOP"):  # fmt: skip
        assert part in text
    assert "no longer there" not in text and "error" not in text
    (folder / "samples.png").unlink()
    assert "samples.png (no longer there)" in shown(capsys, monkeypatch, folder, width=120)


def test_it_fits_80_columns(records, tmp_path, capsys, monkeypatch):
    text = shown(capsys, monkeypatch, records.write_record(tmp_path))
    body = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert max(map(len, body)) <= 80 and "\x1b" not in text and "…" not in text


def test_a_failed_run_shows_its_error(records, tmp_path, capsys, monkeypatch):
    folder = records.write_record(
        tmp_path, status="failed", error="the loss is NaN\x1b[5m", metrics={}, cost={}, config={}
    )
    text = shown(capsys, monkeypatch, folder)
    assert "sara-digits-unet: failed" in text and "error: the loss is NaN?[5m" in text


def test_json_is_the_record_and_its_folder(records, tmp_path, capsys):
    folder = records.write_record(tmp_path / "run")
    assert show.main([str(folder / "record.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == records.make_record(folder=str(folder))


def test_a_run_by_its_name(records, tmp_path, capsys, monkeypatch):
    records.write_record(tmp_path / "outputs" / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    assert "finished" in shown(capsys, monkeypatch, "first")
    with pytest.raises(UserError, match="there is no run 'frist'; did you mean 'first'"):
        show.main(["frist"])
    with pytest.raises(UserError, match="holds several runs; show one of them: first"):
        show.main(["outputs/runs"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no record of filtrun"),
        ("[]", "is no record"),
        ("{}", "is a required property"),
        ("\xff", "is no record"),
    ],
)
def test_broken_records(tmp_path, content, message):
    (tmp_path / "record.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        show.main([str(tmp_path)])


def test_folders_without_a_record(tmp_path):
    with pytest.raises(UserError, match=r"there is no record\.json in it"):
        show.main([str(tmp_path)])
    with pytest.raises(UserError, match="there is no run"):
        show.main([""])


def test_a_task_that_is_not_to_be_found_still_shows_its_numbers(records, tmp_path, capsys, monkeypatch):
    folder = records.write_record(tmp_path, config={"task": {"_target_": "gone_kit.tasks.T"}})
    assert "71.3" in shown(capsys, monkeypatch, folder)
