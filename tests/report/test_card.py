from __future__ import annotations

import copy
from pathlib import Path

import pytest

from filtrun.catalogue import conf_dir, entries
from filtrun.errors import UserError
from filtrun.report.card import make_card, read_card

CARDS = sorted((conf_dir() / "paper").glob("*.yaml"))

GOOD = {
    "title": "T", "link": "https://arxiv.org/abs/2401.00001", "year": 2024, "family": "peft", "abstract": "A\n b.",
    "tables": [
        {
            "name": "t", "title": "Table", "setting": "s", "rows": {"a": ["method=a"], "b": ["method=b", "lr=1"]},
            "scales": {"laptop": {"seeds": [0, 1], "overrides": ["data=digits"]}, "smoke": {"seeds": [3]}},
            "metrics": {"test/fid": "lower"},
            "published": [
                {"setting": "p", "source": "Table 1", "better": {"FID": "lower"},
                 "rows": {"a": {"FID": 3}, "z": {"FID": 4.5}}}
            ],
        }
    ],
    "claims": [{"claim": "test/fid(a) better than test/fid(b) by 5%", "table": "t", "says": "x", "source": "y"}],
}  # fmt: skip


def test_a_card():
    card = make_card("a", GOOD)
    assert (card.slug, card.abstract, card.methods) == ("a", "A b.", ("a",))
    table = card.table("t")
    assert [c.overrides for c in table.cells("laptop")] == [
        ("data=digits", "method=a", "scale=laptop", "seed=0"),
        ("data=digits", "method=a", "scale=laptop", "seed=1"),
        ("data=digits", "method=b", "lr=1", "scale=laptop", "seed=0"),
        ("data=digits", "method=b", "lr=1", "scale=laptop", "seed=1"),
    ]
    assert [(c.row, c.seed) for c in table.cells("smoke")] == [("a", 3), ("b", 3)] and table.cells("paper") == []
    assert table.published[0].rows == {"a": {"FID": 3.0}, "z": {"FID": 4.5}}
    claim = card.claims[0]
    assert (claim.metric, claim.better, claim.than, claim.margin, claim.relative) == ("test/fid", "a", "b", 0.05, True)


def test_the_gallery_cell_has_defaults_and_can_be_chosen():
    cell = make_card("b", GOOD).gallery
    assert (cell.table, cell.row, cell.metric, cell.baseline) == ("t", "b", "test/fid", "a")  # the row of its name
    assert make_card("other", GOOD).gallery.row == "a" and make_card("other", GOOD).gallery.baseline == "b"
    chosen = make_card("b", {**GOOD, "gallery": {"row": "a", "baseline": "a"}}).gallery
    assert (chosen.row, chosen.baseline) == ("a", "a")
    assert make_card("b", {**GOOD, "tables": [], "claims": []}).gallery is None


def test_a_scale_adds_to_single_rows():
    values = copy.deepcopy(GOOD)
    values["tables"][0]["scales"]["smoke"]["rows"] = {"b": ["lr=2"]}
    table = make_card("a", values).table("t")
    assert table.overrides("b", "smoke") == ("method=b", "lr=1", "lr=2", "scale=smoke")
    assert table.overrides("a", "smoke") == ("method=a", "scale=smoke")
    assert table.overrides("b", "laptop") == ("data=digits", "method=b", "lr=1", "scale=laptop")
    values["tables"][0]["scales"]["smoke"]["rows"] = {"c": ["lr=2"]}
    with pytest.raises(UserError, match="scales.smoke: rows names no row 'c' of the table"):
        make_card("a", values)


def test_tuning_and_the_same_setting():
    values = copy.deepcopy(GOOD) | {"tuning": "by\n hand"}
    values["tables"][0]["published"][0]["same"] = ["paper"]
    card = make_card("a", values)
    assert card.tuning == "by hand" and card.table("t").published[0].same == ("paper",) and card.table("t").tuning == ""


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["title"], None, "title is missing"),
        (["year"], "2024", "year must be a whole number"),
        (["link"], "arxiv.org/x", "link must start with https"),
        (["titel"], "x", "titel is no key of a card; did you mean 'title'"),
        (["tables", 0, "scales", "laptp"], {"seeds": [0]}, "did you mean 'laptop'"),
        (["tables", 0, "scales", "laptop", "seeds"], [], "seeds must be a list of whole numbers"),
        (["tables", 0, "rows", "a"], "method=a", "a must be a list of texts"),
        (["tables", 0, "metrics", "test/fid"], "down", "must be lower or higher, not 'down'"),
        (["tables", 0, "published", 0, "rows", "a"], {"FIDD": 3}, "has no direction in better; did you mean 'FID'"),
        (["tables", 0, "published", 0, "rows", "a"], {"FID": "3"}, "FID must be a number"),
        (["claims", 0, "claim"], "a beats b", "must read 'metric"),
        (["claims", 0, "claim"], "test/fid(a) better than test/kid(b) by 0", "must read 'metric"),
        (["claims", 0, "claim"], "test/fid(a) better than test/fid(bb) by 0", "names no row 'bb'"),
        (["claims", 0, "claim"], "test/kid(a) better than test/kid(b) by 0", "names no metric 'test/kid'"),
        (["claims", 0, "table"], "u", "names no table 'u'"),
        (["tables", 0, "rows"], {}, "rows is empty"),
        (["tables", 0, "published", 0, "same"], ["laptp"], "did you mean 'laptop'"),
        (["tables", 0, "tuning"], 3, "tuning must be text"),
        (["gallery"], {"row": "c"}, "gallery: row names no row of the table 'c'"),
        (["gallery"], {"metric": "test/kid"}, "gallery: metric names no metric of the table 'test/kid'"),
        (["gallery"], {"rows": "a"}, "gallery: rows is no key of a card; did you mean 'row'"),
        (["claims"], {}, "claims must be a list"),
        (["tables"], [3], r"tables\[0\] must be a mapping"),
    ],
)
def test_a_wrong_card_is_told_by_file_and_key(path, value, message):
    values = copy.deepcopy(GOOD)
    place = values
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(UserError, match=message) as error:
        make_card("a", values)
    assert "paper/a.yaml" in str(error.value)


@pytest.mark.parametrize("path", CARDS, ids=[p.stem for p in CARDS])
def test_every_card_is_valid_and_names_what_exists(path: Path):
    card = read_card(path)
    names = {kind: {e.name for e in entries(kind)} for kind in ("methods", "data", "models", "tasks")}
    groups = {"method": "methods", "data": "data", "model": "models", "task": "tasks"}
    assert set(card.methods) <= names["methods"]
    for table in card.tables:
        assert {"smoke", "laptop"} <= set(table.scales)
        for scale in table.scales:
            for cell in table.cells(scale):
                for override in cell.overrides:
                    key, _, value = override.partition("=")
                    for part in value.strip("[]").split(",") if key in groups else ():
                        assert part in names[groups[key]], f"{path.stem}: {override}"


def test_the_sara_card_has_the_published_table():
    card = read_card(conf_dir() / "paper" / "sara.yaml")
    table = card.table("new_classes")
    assert len(table.cells("laptop")) == 9 and {c.row for c in table.cells("laptop")} == {"sara", "lora", "full"}
    assert table.metrics == {"test/fid": "lower", "test/target_accuracy": "higher", "test/source_accuracy": "higher"}
    first = table.published[0].rows
    assert first["sara"] == {"FID": 134.96, "CLIP": 27.08, "VLHI": 1.55} and first["full"]["FID"] == 133.69
    assert card.claims[0].metric == "test/fid" and (card.claims[0].better, card.claims[0].than) == ("sara", "lora")
    # VLHI is (FIDmax - FID)/(FIDmax - FIDmin) + (CLIP - CLIPmin)/(CLIPmax - CLIPmin) over all rows of one backbone
    rows = [(p, row, v) for p in table.published if "1.5" in p.setting for row, v in p.rows.items()]
    fids, clips = [v["FID"] for *_, v in rows], [v["CLIP"] for *_, v in rows]
    for _, row, v in rows:
        vlhi = (max(fids) - v["FID"]) / (max(fids) - min(fids)) + (v["CLIP"] - min(clips)) / (max(clips) - min(clips))
        assert abs(vlhi - v["VLHI"]) < 0.011, row
