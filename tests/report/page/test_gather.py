"""What a page holds of records, curves and pictures, and how much room that takes."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re

import pytest
from PIL import Image

from filtrun.errors import UserError
from filtrun.report.page.curves import read, thinned
from filtrun.report.page.gather import embedded, gather
from filtrun.report.page.html import page
from filtrun.report.page.images import Images, encode


def test_runs_are_gathered_with_what_is_only_theirs(folder) -> None:
    data = gather(folder)
    runs = {run["folder"]: run for run in data["runs"]}
    assert set(runs) == {*(f"{m}{s}" for m in ("lora", "sara") for s in range(3)), "stopped", "hostile"}
    assert [path.rsplit("/", 2)[1] for path in data["broken"]] == ["torn"]
    assert runs["sara2"]["metrics"] == {"test/fid": 14.0, "test/target_accuracy": 0.9}
    assert runs["stopped"]["error"] == "the loss is not finite at step 12" and runs["stopped"]["status"] == "failed"
    groups = {name: run["group"] for name, run in runs.items()}
    assert groups["lora0"] == groups["lora1"] == groups["lora2"] != groups["sara0"]
    assert len({run["cell"] for run in data["runs"]}) == 8
    fid = next(m for m in data["metrics"] if m["key"] == "test/fid")
    assert (fid["title"], fid["better"]) == ("FID", "lower")


def test_runs_that_differ_in_their_seed_alone_are_one_setting(sweeps, make_record, tmp_path) -> None:
    def groups(*seeds: tuple[int, int, int]) -> list[str]:
        """Of runs with these seeds, split seeds and pre-training seeds."""
        root = tmp_path / str(seeds)
        for i, (seed, split, base) in enumerate(seeds):
            config = make_record()["config"] | {"seed": seed, "split_seed": split, "pretrain": {"seed": base}}
            sweeps.add_run(root, f"r{i}", make_record, seed=seed, config=config)
        found = {run["folder"]: run["group"] for run in gather(root)["runs"]}
        return [found[f"r{i}"] for i in range(len(seeds))]

    fixed = groups((0, 0, 0), (1, 0, 0), (2, 0, 0))  # also where the run's own seed is by chance that of the split
    assert fixed[0] == fixed[1] == fixed[2]
    follow = groups((0, 0, 0), (1, 1, 0), (2, 2, 0))
    assert follow[0] == follow[1] == follow[2]
    other = groups((0, 0, 0), (1, 0, 0), (0, 3, 0), (1, 3, 0))
    assert other[0] == other[1] != other[2] == other[3]


def test_settings_by_columns_give_back_each_run(folder) -> None:
    data = gather(folder)
    for i, run in enumerate(data["runs"]):
        held = {k: c["values"][c["runs"][i]] for k, c in data["values"].items() if c["runs"][i] >= 0}
        record = json.loads((folder / run["folder"] / "record.json").read_text())
        assert held["seed"] == str(record["config"]["seed"])
        assert held.get("method.sara.rank") == ("4000" if run["methods"] == "sara" else None)
        assert held.get("environment/torch") == record["environment"].get("torch")


def test_where_chooses_and_unknown_keys_are_named(folder) -> None:
    assert {r["methods"] for r in gather(folder, ["methods=sara,seed<2"])["runs"]} == {"sara"}
    assert len(gather(folder, ["methods=sara,seed<2"])["runs"]) == 2
    with pytest.raises(UserError, match="sed: no record has such a key.*seed"):
        gather(folder, ["sed=1"])


def test_thinned_curves_keep_their_ends_and_extremes() -> None:
    draw = random.Random(0)
    values = [draw.gauss(0, 1) for _ in range(5000)]
    values[1234], values[4000] = 50.0, -40.0
    x, y = thinned([float(i) for i in range(5000)], values, 200)
    assert 100 < len(x) <= 200 and x == sorted(x)
    assert (x[0], x[-1]) == (0.0, 4999.0) and max(y) == 50.0 and min(y) == -40.0
    assert all(values[int(a)] == b for a, b in zip(x, y, strict=True))
    assert thinned([1.0, 2.0], [3.0, 4.0], 200) == ([1.0, 2.0], [3.0, 4.0])


def test_torn_and_odd_lines_of_a_log_are_left_out(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 2.0, "b": "x", "time": 3}\n[1]\n{"step": 2, "a": NaN}\n{"step": 3, "a": 5}\n{"st')
    assert read(path) == {"a": ([1, 3], [2.0, 5])}
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    assert read(link) == {}


def test_pictures_are_scaled_into_their_share_and_kept_once(sweeps, tmp_path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        sweeps.picture(tmp_path / name / "samples.png", seed)
    (tmp_path / "c" / "samples_before.png").write_text("no picture")
    images = Images(30_000)
    shown = images.add([(tmp_path / name, ()) for name in "abc"])
    assert shown == [{"after": 0}, {"after": 0}, {"after": 1}] and images.left_out == 1
    assert sum(map(len, images.encoded)) <= 30_000
    for uri in images.encoded:
        head, _, text = uri.partition(",")
        assert head == "data:image/webp;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(text)))
        assert picture.format == "WEBP" and picture.width in (480, 360, 260, 180)
        assert math.isclose(picture.width / picture.height, 518 / 402, rel_tol=0.01)
    none = Images(1000)
    assert none.add([(tmp_path / "a", ())]) == [{}] and none.left_out == 1


def test_a_link_out_of_the_run_folder_is_not_read(sweeps, tmp_path) -> None:
    sweeps.picture(tmp_path / "private.png", 3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.png").symlink_to(tmp_path / "private.png")
    assert Images(100_000).add([(tmp_path / "run", ())]) == [{}]


def test_small_pictures_are_not_scaled_up(tmp_path) -> None:
    Image.new("RGB", (90, 40), "red").save(tmp_path / "samples.png")
    assert Image.open(io.BytesIO(encode(tmp_path / "samples.png", 9000))).size == (90, 40)


def test_hostile_text_stays_text(folder, sweeps) -> None:
    data = gather(folder)
    text = page(data, "now").decode()
    assert "<img" not in text and "onerror" in text
    assert text.count("</script>") == 2 and text.count("<script") == 2
    block = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert not set(block) & set("<>&\u2028\u2029")
    held = json.loads(block)
    assert sweeps.HOSTILE in {run["name"] for run in held["runs"]}
    assert "<b>" not in page(data | {"title": "<b>"}, "now").decode()
    assert json.loads(embedded({"a": "\ud800<"})) == {"a": "?<"}


def test_nothing_is_fetched_and_only_the_page_s_own_script_may_run(folder) -> None:
    text = page(gather(folder), "now").decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert not re.search(r"""(?:src|href)=["'](?!#)|@import|url\(""", text)


def test_five_hundred_runs_with_pictures_and_long_logs_stay_under_ten_megabytes(make_record, sweeps, tmp_path) -> None:
    sweeps.picture(tmp_path / "one.png", 0, 220, 180)
    base = Image.open(tmp_path / "one.png")
    line = [
        {"step": i, "train/loss": 1 / 3 + 1 / i, "lr": 0.1 / i, "a": 1.7**0.5 * i, "b": 3.3 / i} for i in range(1, 401)
    ]
    log = "".join(json.dumps(each) + "\n" for each in line)
    for i in range(500):
        run = tmp_path / "runs" / f"{i:03}"
        run.mkdir(parents=True)
        config = make_record()["config"] | {"seed": i, "trainer": {f"key{k}": k for k in range(80)}}
        (run / "record.json").write_text(json.dumps(make_record(seed=i, config=config)))
        (run / "metrics.jsonl").write_text(log)
        picture = base.copy()
        picture.putpixel((i % 220, i // 220), (255, 0, 0))
        picture.save(run / "samples.png", compress_level=0)
    data = gather(tmp_path / "runs")
    assert len(data["runs"]) == 500 and len(data["images"]) == 500
    assert all(len(x) > 80 for run in data["runs"] for x, _ in run["curves"].values())
    assert sum(map(len, data["images"])) > 3_500_000  # the pictures take what they may
    assert 5_000_000 < len(page(data, "now")) < 10_000_000
