"""Manifests: the released files read without a complaint, audited and repaired; rows and images
survive the way.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmedpo_utils.base.cards import card_folder
from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.images import open_image, resolve_image, with_images
from mmedpo_utils.base.rows import question_text, row_sha
from mmedpo_utils.curate import training_rows
from mmedpo_utils.preference_rows import (
    PAIR_KEYS,
    answer_text,
    is_identical,
    pair_row,
    read_manifest,
    read_questions,
    row_source,
    rows_to_questions,
    write_manifest,
)
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.relevance import normalise, training_weights
from mmedpo_utils.show.audit import audit_manifest, repair_manifest
from mmedpo_utils.show.plots import weight_histograms

QUESTION = {
    "question_id": "q1",
    "image": "a.png",
    "text": "Is there a nodule?\n<image>",
    "gpt4_answer": "yes",
    "answer_type": "CLOSED",
    "patient_id": "p1",
    "finding": "nodule",
    "question_type": "presence",
}


def good_row() -> dict:
    return pair_row(QUESTION, "no", 0.5)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with two good images."""
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    Image.fromarray(noise).save(folder / "b.jpg")
    return folder


def test_written_rows_read_back(tmp_path: Path, images: Path) -> None:
    rows = [good_row(), good_row() | {"rejected_image": "b.jpg", "source": "visual"}, good_row()]
    write_manifest(tmp_path / "pairs.json", rows)
    assert read_manifest(tmp_path / "pairs.json", images, images) == rows
    (images / "a.png").unlink()
    assert read_manifest(tmp_path / "pairs.json") == rows, "without roots no image is looked at"
    assert [row_source(row) for row in rows] == ["text", "visual", "text"]
    assert (
        row_sha(rows) == row_sha([dict(reversed(row.items())) for row in rows]) != row_sha(rows[:1])
    )


def test_identical_pairs_are_warned_of_and_counted(tmp_path: Path, images: Path) -> None:
    same, visual = (
        pair_row(QUESTION, " yes", 0.0),
        pair_row(QUESTION, "yes", 0.5, rejected_image="b.jpg"),
    )
    copied = pair_row(QUESTION, "yes", 0.5, rejected_image="a.png")
    write_manifest(tmp_path / "pairs.json", [same, visual, copied, good_row()])
    with pytest.warns(UserWarning, match="2 of 4 rows have identical"):
        rows = read_manifest(tmp_path / "pairs.json", images, images)
    assert [is_identical(row, images, images) for row in rows] == [True, False, True, False]
    audit = audit_manifest(rows)
    assert (audit["identical_pairs"], audit["zero_weights"], audit["duplicate_ids"]) == (1, 1, 2)
    assert audit["sources"] == {"text": 2, "visual": 2} and audit["score_mean"] == pytest.approx(
        0.375
    )


def test_audit_counts_leaks_and_repair_drops_by_choice() -> None:
    def pair(
        question: str, chosen: str, rejected: str, score: float = 0.5, **optional: str
    ) -> dict:
        return pair_row(
            QUESTION | {"text": f"{question}\n<image>", "gpt4_answer": chosen},
            rejected,
            score,
            **optional,
        )

    rows = [
        pair("Is there a nodule?", "Yes", "No, the lungs are clear."),
        pair("is there a  NODULE?", "yes", "No"),
        pair("Is there a mass?", "no", "  There is one."),
        pair("Where?", "No lesion is seen", "None, nowhere"),
        pair("Which lobe?", "upper", "upper", 0.0),
        pair("Which side?", "the left lung", "right", 0.0),
        pair("Is there a nodule?", "Yes", "Yes", rejected_image="b.png"),
    ]
    audit = audit_manifest(rows)
    assert audit["duplicate_prompts"] == 1, "the visual row is of another source"
    assert (audit["rejected_longer"], audit["rejected_shorter"]) == (2, 2), (
        "words; two rows have the same answer twice"
    )
    assert (audit["opposite_openers"], audit["one_sided_openers"]) == (2, 2), (
        "`None` does not begin with the word no"
    )
    everything = ("drop_zero_weight", "drop_identical", "drop_duplicates")
    assert repair_manifest(rows, everything) == (
        [rows[0], *rows[2:4], rows[6]],
        {"drop_zero_weight": 2, "drop_identical": 0, "drop_duplicates": 1},
    )
    assert repair_manifest(rows, everything[1:2]) == (rows[:4] + rows[5:], {"drop_identical": 1})
    assert repair_manifest(rows, ()) == (rows, {}) and len(rows) == 7
    with pytest.raises(InputError, match="'drop_all': unknown; choose among drop_zero_weight"):
        repair_manifest(rows, ["drop_all"])


@pytest.mark.parametrize(("file", "zero", "pairs"), [("vqa-rad", 12, 1797), ("iuxray", 34, 2069)])
def test_released_files_are_audited_repaired_and_weighed(
    shared: Path, file: str, zero: int, pairs: int
) -> None:
    """The counts are made a second time here, from the JSON alone."""
    path = shared / f"data/released/{file}_dpo_weighted.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    texts = [
        [turns[-1]["value"] for turns in (row["conversations"], row["rejected_conversations"])]
        for row in raw
    ]
    sides = [[text.split() for text in pair] for pair in texts]
    first = [[re.findall("[a-z]+|$", text.lower())[0] for text in pair] for pair in texts]
    prompts = {(row["image"], row["conversations"][0]["value"].lower()) for row in raw}
    audit = audit_manifest(rows := read_manifest(path))
    assert (
        (audit["rows"], audit["zero_weights"])
        == (pairs, zero)
        == (len(raw), sum(not row["weighted_score"] for row in raw))
    )
    assert audit["duplicate_prompts"] == len(raw) - len(prompts)
    assert audit["rejected_longer"] == sum(
        len(chosen) < len(rejected) for chosen, rejected in sides
    )
    assert audit["rejected_shorter"] == sum(
        len(chosen) > len(rejected) for chosen, rejected in sides
    )
    assert audit["opposite_openers"] == sum(sorted(pair) == ["no", "yes"] for pair in first)
    assert audit["one_sided_openers"] == sum(
        (pair[0] in ("yes", "no")) != (pair[1] in ("yes", "no")) for pair in first
    )
    left, counts = repair_manifest(rows, ("drop_zero_weight", "drop_duplicates"))
    assert counts["drop_zero_weight"] == zero and len(left) == pairs - sum(counts.values())
    again = audit_manifest(left)
    assert again["zero_weights"] == again["duplicate_prompts"] == 0 and again["score_range"][0] > 0
    weights = {
        method: normalise([row["weighted_score"] for row in rows], method)
        for method in ("none", "literal", "rescaled")
    }
    assert (weights["literal"] == 0.75).all(), "every score of at most 1 falls to the lower bound"
    assert (
        weights["none"].min() == 0
        and (weights["none"] == [row["weighted_score"] for row in raw]).all()
    )
    assert 0.75 <= weights["rescaled"].min() < 1 < weights["rescaled"].max() <= 1.25
    figure = weight_histograms(weights)
    for panel, (name, values) in zip(figure.axes, weights.items(), strict=True):
        assert sum(bar.get_height() for bar in panel.patches) == pairs
        assert panel.get_title().startswith(f"{name}: mean {values.mean():.2f}")


def test_texts_without_the_mark() -> None:
    assert (
        question_text(QUESTION)
        == question_text(good_row())
        == question_text("<image> Is there a nodule?")
    )
    assert answer_text(good_row()) == "yes" and answer_text(good_row(), rejected=True) == "no"


def test_rows_and_questions_are_inverse() -> None:
    assert rows_to_questions([good_row()]) == [QUESTION]
    assert (
        rows_to_questions([pair_row(QUESTION | {"gpt4_answer": "Free air"}, "no", 1)])[0][
            "answer_type"
        ]
        == "OPEN"
    )


def test_open_image_makes_every_mode_grey_or_rgb(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    grey = (ramp * 255).round().astype(np.uint8)
    Image.fromarray((1000 + ramp * 3000).astype(np.uint16)).save(tmp_path / "deep.png")
    deep = open_image(tmp_path / "deep.png")
    assert deep.mode == "L" and np.abs(np.asarray(deep, int) - grey).max() <= 1
    colour = Image.merge(
        "RGB", [Image.fromarray(grey), Image.fromarray(255 - grey), Image.fromarray(grey)]
    )
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "RGB"):
        colour.convert(mode).save(tmp_path / f"{mode}.tiff")
        assert open_image(tmp_path / f"{mode}.tiff").mode == ("L" if mode in ("1", "L") else "RGB")
    clear = colour.copy()
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    assert np.asarray(open_image(tmp_path / "clear.png")).max() == 0


def test_open_image_turns_upright(tmp_path: Path) -> None:
    picture = Image.new("L", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


def test_resolve_image_keeps_to_its_folder(images: Path) -> None:
    assert resolve_image(images, "a.png") == (images / "a.png").resolve()
    assert resolve_image(images, "../images/a.png") == (images / "a.png").resolve()


def test_released_files_read_without_a_complaint(shared: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vqa = audit_manifest(read_manifest(shared / "data/released/vqa-rad_dpo_weighted.json"))
        iuxray = audit_manifest(read_manifest(shared / "data/released/iuxray_dpo_weighted.json"))
        mini = shared / "data/vqa_rad_mini"
        assert len(read_manifest(mini / "train_preferences.json", mini / "images")) == 7
        assert len(read_questions(mini / "test_questions.jsonl", mini / "images")) == 6
        assert len(read_questions(shared / "data/released/vqa-rad_test_questions.jsonl")) == 451
    assert (vqa["rows"], vqa["zero_weights"], vqa["identical_pairs"]) == (1797, 12, 0)
    assert (iuxray["rows"], iuxray["zero_weights"], iuxray["identical_pairs"]) == (2069, 34, 0)


def published(tmp_path: Path, *rows: dict) -> Path:
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(list(rows)), encoding="utf-8")
    return path


def test_question_files_of_other_makers_are_corrected(tmp_path: Path) -> None:
    """Each row says in another way what QUESTION says."""
    rows = [
        QUESTION | {"gpt4_answer": 4},
        QUESTION | {"question_id": "q2", "answer_type": " closed "},
        QUESTION | {"question_id": "q3", "text": "Is there a nodule?"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    second, third = QUESTION | {"question_id": "q2"}, QUESTION | {"question_id": "q3"}
    assert read_questions(path) == [QUESTION | {"gpt4_answer": "4"}, second, third]


def test_what_comes_twice_is_left_out_or_told(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [QUESTION, QUESTION | {"text": "Where is it?\n<image>"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="row 1.*`question_id`: an earlier question"):
        assert read_questions(path) == [QUESTION]
    with pytest.warns(UserWarning, match="1 of 3 rows have the id"):
        visual = good_row() | {"source": "visual", "rejected_image": "b.jpg"}
        assert len(read_manifest(published(tmp_path, good_row(), good_row(), visual))) == 3


def test_pairs_of_other_makers_are_corrected_alike(tmp_path: Path) -> None:
    row = good_row()
    for key, answer in (("conversations", 4), ("rejected_conversations", 2.5)):
        row[key] = [
            {"from": "human", "value": " Is there a nodule? "},
            {"from": "gpt", "value": answer},
        ]
    (read,) = read_manifest(published(tmp_path, row))
    assert (
        read["conversations"][0]["value"]
        == read["rejected_conversations"][0]["value"]
        == "<image>\nIs there a nodule?"
    )
    assert (answer_text(read), answer_text(read, rejected=True)) == ("4", "2.5")
    write_manifest(tmp_path / "ours.json", [read])
    with pytest.raises(InputError, match="one <image> mark"):
        write_manifest(
            tmp_path / "ours.json",
            [
                row
                | {
                    "conversations": [
                        {"from": "human", "value": "Is?"},
                        {"from": "gpt", "value": "yes"},
                    ]
                }
            ],
        )


def test_keys_that_are_not_read_are_named_once(tmp_path: Path) -> None:
    rows = [
        good_row() | {"image_root": "/films", "lang": "en"},
        good_row() | {"id": "q2", "image_root": "/films"},
        good_row() | {"id": "q3"},
    ]
    with pytest.warns(UserWarning) as said:
        assert len(read_manifest(published(tmp_path, *rows))) == 3
    (warning,) = said
    assert "keys that are not read: `image_root` (2 rows), `lang` (1 rows)" in str(warning.message)


def test_a_noised_rejected_side_is_never_a_text_pair(tmp_path: Path) -> None:
    flagged = good_row() | {"rejected_noised": 1}
    rows = [
        flagged,
        flagged,
        good_row() | {"rejected_noised": 0},
        flagged | {"rejected_image": "b.jpg"},
    ]
    with pytest.warns(UserWarning, match="2 of 4 rows left out.*`rejected_noised` is 1"):
        kept = read_manifest(published(tmp_path, *rows))
    assert [row_source(row) for row in kept] == ["text", "visual"]


def test_pairs_without_a_score_are_read_counted_and_trained_on_where_none_is_asked_for(
    tmp_path: Path,
) -> None:
    bare = {key: value for key, value in good_row().items() if key != "weighted_score"}
    rows = read_manifest(published(tmp_path, bare, bare | {"weighted_score": None}, good_row()))
    audit = audit_manifest(rows)
    assert (audit["without_weight"], audit["score_mean"], audit["zero_weights"]) == (2, 0.5, 0)
    assert (
        audit_manifest(rows[:1])["score_mean"] is None
        and audit_manifest(rows[:1])["score_range"] is None
    )
    assert len(repair_manifest(rows, ["drop_zero_weight"])[0]) == 3
    write_manifest(tmp_path / "again.json", rows)
    profile = load_profile("phantom-smoke")
    for name, variant in profile.training.variants.items():
        if variant.weights == "uniform" or variant.objective == "sft":
            assert (training_weights(rows, variant, profile) == 1).all(), name
        else:
            with pytest.raises(
                InputError, match="2 of 3 preference rows .id 'q1' first.*write `weights: uniform`"
            ):
                training_weights(rows, variant, profile)


def test_the_schema_names_the_keys_that_are_read() -> None:
    schema = json.loads((card_folder() / "pair_schema.json").read_text(encoding="utf-8"))
    assert set(schema["items"]["properties"]) == set(PAIR_KEYS)


def test_a_row_that_says_visual_without_an_image_is_left_out(tmp_path: Path) -> None:
    rows = [good_row() | {"source": "visual"}, good_row() | {"source": "theirs"}]
    with pytest.warns(UserWarning, match="1 of 2 rows left out.*`source` is visual"):
        (kept,) = read_manifest(published(tmp_path, *rows))
    assert row_source(kept) == "text"


def test_numbers_that_are_no_answers_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    whole = json.dumps(QUESTION | {"gpt4_answer": 2.0})
    path.write_text(f"{whole}\n{whole.replace('2.0', '1e999')}\n")
    with pytest.warns(UserWarning, match="1 of 2 rows left out.*found inf"):
        assert [row["gpt4_answer"] for row in read_questions(path)] == ["2"]


def test_the_kits_own_manifest_is_read_strictly(tmp_path: Path, images: Path) -> None:
    """A bad row of somebody's own manifest is left out, one of the kit's stops the training."""
    profile = load_profile("phantom-smoke", {"output": str(tmp_path / "run")})
    lone = {"dpo": replace(profile.training.variants["dpo"], pairs="theirs")}
    theirs = replace(profile, training=replace(profile.training, variants=lone))
    folder = profile.output / "pairs"
    folder.mkdir(parents=True)
    profile.image_root.mkdir(parents=True)
    shutil.copy(images / "a.png", profile.image_root)
    gone, blank = good_row() | {"image": "none.png"}, good_row() | {"image": ""}
    rows = [good_row(), gone, blank]
    for name in ("train", "theirs"):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="train.json: row 2 .*`image`: expected a non-empty text"):
        training_rows(profile, "dpo")
    with pytest.warns(UserWarning, match="theirs.json: 2 of 3 rows left out"):
        assert training_rows(theirs, "dpo") == rows[:1]
    (folder / "theirs.sha256").write_text("made here")
    with pytest.raises(InputError, match="theirs.json: row 2 "):
        training_rows(theirs, "dpo")


def test_many_rows_that_are_left_out_are_counted_and_few_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    blank = json.dumps(QUESTION | {"gpt4_answer": ""})
    lines = [json.dumps(QUESTION), *[blank] * 2999]
    path.write_text("\n".join(lines))
    with pytest.warns(UserWarning) as said:
        assert len(read_questions(path)) == 1
    (warning,) = said
    assert "2999 of 3000 rows left out" in str(warning.message)
    assert str(warning.message).count("`gpt4_answer`") == 5
    assert str(warning.message).endswith("; and 2994 more")


def test_questions_about_a_damaged_image_are_left_out_and_named(images: Path) -> None:
    (images / "torn.png").write_bytes((images / "a.png").read_bytes()[:200])
    rows = [
        QUESTION,
        QUESTION | {"question_id": "q2", "image": "torn.png"},
        QUESTION | {"image": "b.jpg"},
    ]
    with pytest.warns(UserWarning, match="1 of 3 rows left out.*question 'q2': .*torn.png"):
        assert with_images(rows, images, decode=True) == [rows[0], rows[2]]
    assert with_images(rows, images) == rows, "the file is there"
    with pytest.raises(InputError, match="question 'q2'"):
        with_images(rows[1:2], images, decode=True)


def test_a_list_that_lost_all_its_pairs_is_audited_and_repaired_too() -> None:
    found = audit_manifest([])
    assert found["rows"] == found["images"] == found["duplicate_ids"] == 0
    assert found["sources"] == {} and found["score_mean"] is None and found["score_range"] is None
    assert repair_manifest([], ["drop_identical"]) == ([], {"drop_identical": 0})
