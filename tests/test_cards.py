"""Dataset cards: one schema, the paper's counts, and a check that tells what a folder lacks without
raising.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import pytest
import yaml

from mmedpo_utils.base import cards
from mmedpo_utils.base.cards import DatasetCard, card_names, load_card
from mmedpo_utils.base.errors import InputError
from mmedpo_utils.convert.cards import check_dataset, export_croissant
from mmedpo_utils.convert.layouts import import_hugging_face
from mmedpo_utils.dataset import prepare_dataset
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.released.published_audit import COUNTS
from mmedpo_utils.show.plots import results_table
from tests.test_loaders import MAKERS, hugging_face, vqa_rad

PAPER_NAMES = {
    "vqa-rad": "VQA-RAD",
    "slake": "SLAKE",
    "iu-xray": "IU-Xray",
    "mimic-cxr": "MIMIC-CXR",
}


def published(table: str) -> dict[str, dict]:
    values = json.loads(
        (cards.card_folder() / "published_results.json").read_text(encoding="utf-8")
    )
    return {row["dataset"]: row for row in values["tables"][table]["rows"]}


def test_the_issued_cards_are_there() -> None:
    assert card_names() == ["iu-xray", "mimic-cxr", "phantom", "slake", "vqa-rad", "vqa-rad-mini"]
    assert [name for name in card_names() if load_card(name).credentialed] == ["mimic-cxr"]


@pytest.mark.parametrize(("name", "printed"), PAPER_NAMES.items())
def test_counts_of_the_paper_are_as_printed(name: str, printed: str) -> None:
    splits, pairs, items = load_card(name).splits, published("5")[printed], published("6")[printed]
    assert splits["train"].paper_items == pairs["text"] == pairs["visual"]
    assert splits["test"].paper_items == (items["qa_items"] or items["reports"])
    assert splits["test"].paper_images == items["images"]


def test_counts_of_vqa_rad_are_those_of_the_released_rows(shared: Path) -> None:
    released = json.loads(
        (shared / "data/released/vqa-rad_dpo_weighted.json").read_text(encoding="utf-8")
    )
    lines = (
        (shared / "data/released/vqa-rad_test_questions.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    train, test = [{row["image"] for row in rows} for rows in (released, map(json.loads, lines))]
    splits, oddities = load_card("vqa-rad").splits, " ".join(load_card("vqa-rad").oddities)
    assert (splits["train"].items, splits["train"].images) == (len(released), len(train))
    assert (splits["test"].items, splits["test"].images) == (len(lines), len(test))
    assert f"ask about {len(test)}" in oddities and f"{len(train & test)} of these" in oddities
    studies = json.loads(
        (shared / "data/released/iuxray_dpo_weighted.json").read_text(encoding="utf-8")
    )
    assert (
        load_card("iu-xray").splits["train"].images
        == len({row["image"] for row in studies})
        == len(studies)
    )
    assert len({row["id"].partition("_")[0] for row in studies}) == len(studies), (
        "one report per patient"
    )


@pytest.mark.parametrize(("name", "file"), [("vqa-rad", "vqa-rad"), ("iu-xray", "iuxray")])
def test_the_cards_count_the_released_rows(shared: Path, name: str, file: str) -> None:
    rows = json.loads(
        (shared / f"data/released/{file}_dpo_weighted.json").read_text(encoding="utf-8")
    )
    scores = [row["weighted_score"] for row in rows]
    texts = [
        [row[key][-1]["value"] for key in ("conversations", "rejected_conversations")]
        for row in rows
    ]
    longer = sum(len(chosen.split()) < len(rejected.split()) for chosen, rejected in texts)
    told = " ".join(load_card(name).oddities)
    assert (
        f"{scores.count(0)} of them have weight 0; the mean weight is "
        f"{sum(scores) / len(scores):.2f}" in told
    )
    assert f"{100 * longer / len(rows):.0f}% of the rejected answers are longer" in told


def test_the_cards_count_the_test_questions(shared: Path) -> None:
    lines = (
        (shared / "data/released/vqa-rad_test_questions.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    kinds = [json.loads(line)["answer_type"] for line in lines]
    closed, open_ones = kinds.count("CLOSED"), kinds.count("OPEN")
    assert f"{len(kinds)} test questions are {closed} closed and {open_ones} open" in " ".join(
        load_card("vqa-rad").oddities
    )
    assert (
        COUNTS["vqa_rad_closed_accuracy"] == closed and COUNTS["vqa_rad_open_recall"] == open_ones
    )
    assert "645 open and 416 closed" in " ".join(load_card("slake").oddities)


def test_each_missing_or_unknown_key_is_named(tmp_path: Path) -> None:
    file, values = (
        tmp_path / "slake.yaml",
        yaml.safe_load((cards.card_folder() / "slake.yaml").read_text(encoding="utf-8")),
    )
    assert set(values) == {item.name for item in dataclasses.fields(DatasetCard)}
    for key in values:
        file.write_text(
            yaml.safe_dump({name: value for name, value in values.items() if name != key}),
            encoding="utf-8",
        )
        with pytest.raises(InputError, match=f"slake.yaml: missing key `{key}`"):
            load_card(file)
        file.write_text(yaml.safe_dump(values | {f"{key}x": 1}), encoding="utf-8")
        with pytest.raises(
            InputError, match=f"unknown key `{key}x`; the nearest valid one is `{key}`"
        ):
            load_card(file)
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert load_card(file) == load_card("slake")


@pytest.mark.parametrize("name", MAKERS)
def test_a_full_folder_lacks_nothing_but_rows(tmp_path: Path, name: str) -> None:
    table = check_dataset(load_card(name), MAKERS[name](tmp_path))
    wrong = [row for row in table if row["what to do"] != "nothing"]
    assert {row["what"].partition(": ")[2] for row in wrong} <= {"questions or reports"}, (
        "miniatures are smaller"
    )
    assert all({"what", "expected", "found", "what to do"} == set(row) for row in table)
    assert "train: images" in results_table(table)


def test_missing_files_and_images_are_rows(tmp_path: Path) -> None:
    card, root = load_card("vqa-rad"), vqa_rad(tmp_path)
    (root / "VQA_RAD Image Folder" / "synpic2.jpg").unlink()
    table = {row["what"]: row for row in check_dataset(card, root)}
    assert (table["test: images"]["expected"], table["test: images"]["found"]) == (2, 1)
    assert "synpic2.jpg" in table["test: images"]["what to do"]
    assert (
        table["test: questions or reports"]["expected"],
        table["test: questions or reports"]["found"],
    ) == (451, 2)
    (root / "VQA_RAD Dataset Public.json").write_text("{", encoding="utf-8")
    assert "is not JSON" in check_dataset(card, root)[-1]["what to do"]


@pytest.mark.parametrize("name", card_names())
@pytest.mark.parametrize("exists", [False, True])
def test_an_absent_data_set_raises_nothing(tmp_path: Path, name: str, exists: bool) -> None:
    card = load_card(name)
    table = check_dataset(card, tmp_path if exists else tmp_path / "absent")
    assert [row["found"] for row in table] == ["missing"] * len(card.layout) + ["not readable"]
    assert all(card.access in row["what to do"] for row in table[:-1])


def test_an_imported_hugging_face_copy_is_recognised(tmp_path: Path) -> None:
    import_hugging_face(hugging_face(tmp_path / "pictures"), tmp_path / "root", "vqa-rad")
    table = check_dataset(load_card("vqa-rad"), tmp_path / "root")
    assert table[0]["found"] == "test_questions.jsonl"
    assert [row["found"] for row in table if row["what"] == "train: questions or reports"] == [2]


def test_hashes_are_compared(tmp_path: Path, shared: Path) -> None:
    card, mini = load_card("vqa-rad-mini"), shared / "data" / "vqa_rad_mini"
    assert {row["what to do"] for row in check_dataset(card, mini)} == {"nothing"}
    (tmp_path / "test_questions.jsonl").write_bytes(
        (mini / "test_questions.jsonl").read_bytes() + b"\n"
    )
    changed = next(
        row
        for row in check_dataset(card, tmp_path)
        if row["what"] == "test_questions.jsonl: SHA-256"
    )
    assert changed["what to do"].startswith("fetch it again")


def test_the_phantom_card_fits_what_is_drawn(tmp_path: Path) -> None:
    sizes = {f"data.{split}_patients": 2 for split in ("train", "validation", "test")}
    prepare_dataset(load_profile("phantom-smoke", {"output": str(tmp_path), **sizes}))
    table = check_dataset(load_card("phantom"), tmp_path)
    assert {row["what to do"] for row in table} == {"nothing"}
    assert [row["found"] for row in table if row["what"].endswith(": images")] == [2, 2, 2]


@pytest.mark.parametrize("name", card_names())
def test_croissant_metadata_is_valid(tmp_path: Path, name: str) -> None:
    mlcroissant = pytest.importorskip(
        "mlcroissant", reason="the extra `croissant` is not installed"
    )
    card = load_card(name)
    root = MAKERS[name](tmp_path / name) if name in MAKERS else None
    export_croissant(card, tmp_path / "croissant.json", root)
    metadata = mlcroissant.Dataset(jsonld=tmp_path / "croissant.json").metadata
    assert not metadata.ctx.issues.errors
    assert (metadata.name, metadata.url, metadata.license) == (name, card.homepage, [card.licence])
    assert all(text.rstrip(".") in metadata.description for text in (card.access, *card.oddities))
    listed = {file.name: file.sha256 for file in metadata.distribution}
    assert listed == {
        file: digest or hashlib.sha256((root / file).read_bytes()).hexdigest()
        for file, digest in card.files.items()
        if digest or root and (root / file).is_file()
    }
    text = (tmp_path / "croissant.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "10000032" not in text and "No effusion" not in text, (
        "no path, patient or report"
    )


def test_croissant_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlcroissant", None)
    with pytest.raises(InputError, match="extra `croissant`"):
        export_croissant(load_card("slake"), tmp_path / "croissant.json")
    assert not list(tmp_path.iterdir())
