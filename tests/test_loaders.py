"""Loaders: each data set's own layout, in miniature, made here by the rules of its publisher."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from mmedpo_utils.base.cards import load_card
from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.images import open_image
from mmedpo_utils.base.rows import patient_of, question_text
from mmedpo_utils.base.sections import IMAGE_FOLDERS
from mmedpo_utils.convert import layouts
from mmedpo_utils.convert.cards import check_dataset
from mmedpo_utils.convert.layouts import LAYOUTS, REPORT_QUESTION, import_hugging_face, read_layout
from mmedpo_utils.dataset import prepare_dataset
from mmedpo_utils.preference_rows import pair_row, read_manifest, read_questions, write_manifest
from mmedpo_utils.profiles import load_profile


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)).save(
        path
    )
    return path


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def vqa_rad(root: Path) -> Path:
    """OSF's list has padded types, numbers among the answers, and four phrase types."""

    def row(number: int, image: str, question: str, answer: object, kind: str, phrase: str) -> dict:
        return {
            "qid": number,
            "phrase_type": phrase,
            "qid_linked_id": f"03f451ca-{number}",
            "image_case_url": "",
            "image_name": image,
            "image_organ": "CHEST",
            "evaluation": "evaluated",
            "question": question,
            "question_rephrase": "NULL",
            "question_relation": "NULL",
            "question_frame": "NULL",
            "question_type": "PRES ",
            "answer": answer,
            "answer_type": kind,
        }

    write(
        root / "VQA_RAD Dataset Public.json",
        [
            row(0, "synpic1.jpg", "Is there a nodule? ", " Yes", "CLOSED ", "freeform"),
            row(1, "synpic1.jpg", "How many nodules?", 2, "OPEN", "para"),
            row(2, "synpic2.jpg", "Is the heart enlarged?", "no", "CLOSED", "test_freeform"),
            row(3, "synpic1.jpg", "Where is the nodule?", "left upper lobe", "OPEN", "test_para"),
        ],
    )
    for number in (1, 2):
        picture(root / "VQA_RAD Image Folder" / f"synpic{number}.jpg", number)
    return root


def slake(root: Path) -> Path:
    for file, first in (("train", 0), ("validate", 100), ("test", 200)):
        rows = [
            {
                "img_id": first,
                "img_name": f"xmlab{first}/source.jpg",
                "question": question,
                "answer": answer,
                "q_lang": language,
                "location": "Abdomen",
                "modality": "MRI",
                "answer_type": kind,
                "base_type": "vqa",
                "content_type": "Modality",
                "triple": ["vhead", "_", "_"],
                "qid": first + number,
            }
            for number, (question, answer, kind, language) in enumerate(
                [
                    ("What modality is used?", "MRI", "OPEN", "en"),
                    ("用什么方式?", "核磁", "OPEN", "zh"),
                    ("CT or MRI?", "MRI", "CLOSED", "en"),
                ]
            )
        ]
        write(root / f"{file}.json", rows)
        picture(root / "imgs" / f"xmlab{first}" / "source.jpg", first)
    return root


def iu_xray(root: Path) -> Path:
    def study(number: int) -> dict:
        name = f"CXR{number}_IM-{number + 1000}"
        for view in (0, 1):
            picture(root / "images" / name / f"{view}.png", number + view)
        return {
            "id": name,
            "report": f" No effusion in study {number}.",
            "image_path": [f"{name}/0.png", f"{name}/1.png"],
        }

    write(
        root / "annotation.json",
        {"train": [study(1), study(2)], "val": [study(3)], "test": [study(4)]},
    )
    return root


def mimic_images(root: Path) -> list[tuple[str, str, str, str]]:
    """(dicom, study, subject, split): two views of one study, a second study of the patient,
    another patient.
    """
    rows = [
        ("aa-1", "50000001", "10000032", "train"),
        ("aa-2", "50000001", "10000032", "train"),
        ("bb-1", "50000002", "10000032", "train"),
        ("cc-1", "50000003", "11000077", "validate"),
        ("dd-1", "50000004", "12000001", "test"),
    ]
    for seed, (dicom, study, subject, _) in enumerate(rows):
        picture(
            root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}" / f"{dicom}.jpg", seed
        )
    return rows


def mimic_annotation(root: Path) -> Path:
    splits: dict[str, list] = {"train": [], "val": [], "test": []}
    for dicom, study, subject, split in mimic_images(root):
        splits["val" if split == "validate" else split].append(
            {
                "id": dicom,
                "study_id": int(study),
                "subject_id": int(subject),
                "report": f"Report {study}.",
                "split": split,
                "image_path": [f"p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"],
            }
        )
    write(root / "annotation.json", splits)
    return root


def mimic_split(root: Path, compressed: bool = True) -> Path:
    rows = mimic_images(root)
    for study, subject in {(study, subject) for _, study, subject, _ in rows}:
        text = (
            "IMPRESSION: none"
            if study == "50000002"
            else (
                "                 FINAL REPORT\n EXAMINATION:  CHEST\n\n FINDINGS: \n \n Lungs are "
                "clear\n"
                f" in study {study}.\n \n IMPRESSION: \n Normal.\n"
            )
        )
        (root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt").write_text(
            text, encoding="utf-8"
        )
    table = "dicom_id,study_id,subject_id,split\n" + "".join(",".join(row) + "\n" for row in rows)
    if compressed:
        (root / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(gzip.compress(table.encode()))
    else:
        (root / "mimic-cxr-2.0.0-split.csv").write_text(table, encoding="utf-8")
    return root


def sizes(questions: dict) -> dict[str, int]:
    return {split: len(rows) for split, rows in questions.items()}


def test_vqa_rad(tmp_path: Path) -> None:
    questions = read_layout("vqa-rad", vqa_rad(tmp_path))
    assert sizes(questions) == {"train": 2, "test": 2}
    assert questions["train"] == [
        {
            "question_id": 0,
            "image": "synpic1.jpg",
            "text": "Is there a nodule?\n<image>",
            "gpt4_answer": "Yes",
            "answer_type": "CLOSED",
            "question_type": "PRES",
        },
        {
            "question_id": 1,
            "image": "synpic1.jpg",
            "text": "How many nodules?\n<image>",
            "gpt4_answer": "2",
            "answer_type": "OPEN",
            "question_type": "PRES",
        },
    ]
    assert [row["question_id"] for row in questions["test"]] == [2, 3]
    assert patient_of(questions["test"][1]) == "synpic1.jpg", (
        "no patient is named, so the image stands for one"
    )


def test_slake_keeps_the_english_rows(tmp_path: Path) -> None:
    questions = read_layout("slake", slake(tmp_path))
    assert sizes(questions) == {"train": 2, "validation": 2, "test": 2}
    assert [
        (
            row["question_id"],
            row["image"],
            row["gpt4_answer"],
            row["answer_type"],
            row["question_type"],
        )
        for row in questions["test"]
    ] == [
        (200, "xmlab200/source.jpg", "MRI", "OPEN", "Modality"),
        (202, "xmlab200/source.jpg", "MRI", "CLOSED", "Modality"),
    ]


def test_iu_xray_asks_for_one_report_per_study(tmp_path: Path) -> None:
    questions = read_layout("iu-xray", iu_xray(tmp_path))
    assert sizes(questions) == {"train": 2, "validation": 1, "test": 1}
    row = questions["test"][0]
    assert (row["question_id"], row["image"], row["patient_id"]) == (
        "CXR4_IM-1004",
        "CXR4_IM-1004/0.png",
        "CXR4",
    )
    assert (question_text(row), row["gpt4_answer"], row["answer_type"]) == (
        REPORT_QUESTION,
        "No effusion in study 4.",
        "REPORT",
    )


def test_mimic_annotation_and_official_split_agree_on_patients(tmp_path: Path) -> None:
    annotation = read_layout("mimic-cxr", mimic_annotation(tmp_path / "a"))
    with pytest.warns(UserWarning, match="1 of 5 images left out"):
        official = read_layout("mimic-cxr", mimic_split(tmp_path / "b"))
    assert sizes(annotation) == {"train": 3, "validation": 1, "test": 1}
    assert sizes(official) == {"train": 2, "validation": 1, "test": 1}
    for questions in (annotation, official):
        patients = {split: {row["patient_id"] for row in rows} for split, rows in questions.items()}
        assert patients == {"train": {"10000032"}, "validation": {"11000077"}, "test": {"12000001"}}
        assert questions["test"][0]["image"] == "p12/p12000001/s50000004/dd-1.jpg"
    assert [row["gpt4_answer"] for row in official["train"]] == [
        "Lungs are clear in study 50000001."
    ] * 2
    with pytest.warns(UserWarning, match="1 of 5"):
        assert read_layout("mimic-cxr", mimic_split(tmp_path / "c", compressed=False)) == official


MAKERS = {"vqa-rad": vqa_rad, "slake": slake, "iu-xray": iu_xray, "mimic-cxr": mimic_annotation}


@pytest.mark.parametrize("name", MAKERS)
def test_rows_are_questions_and_become_pairs(tmp_path: Path, name: str) -> None:
    root = MAKERS[name](tmp_path / name)
    rows = read_layout(name, root)["train"]
    lines = tmp_path / "questions.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_questions(lines, root / IMAGE_FOLDERS[name]) == rows
    write_manifest(tmp_path / "pairs.json", [pair_row(row, "something else", 0.5) for row in rows])
    assert len(read_manifest(tmp_path / "pairs.json", root / IMAGE_FOLDERS[name])) == len(rows)


@pytest.mark.parametrize("name", MAKERS)
def test_profile_names_the_data_set(tmp_path: Path, name: str) -> None:
    root = MAKERS[name](tmp_path)
    profile = load_profile(
        "vqa-rad-mini", {"data.source": name, "data.card": name, "data.root": str(root)}
    )
    dataset = prepare_dataset(profile)
    assert dataset.questions == read_layout(name, root) and dataset.image_root == profile.image_root
    assert dataset.released_pairs is None and dataset.image(
        dataset.image_names("test")[0]
    ).size == (16, 16)
    write(root / "train_preferences.json", [])
    assert prepare_dataset(profile).released_pairs == root / "train_preferences.json"


@pytest.mark.parametrize("name", MAKERS)
def test_missing_image_names_the_question(tmp_path: Path, name: str) -> None:
    root = MAKERS[name](tmp_path)
    questions = read_layout(name, root)
    row = questions["test"][0]
    (root / IMAGE_FOLDERS[name] / row["image"]).unlink()
    others = [other for other in questions["test"] if other["image"] != row["image"]]
    if others:
        with pytest.warns(UserWarning, match="test, question .*is missing") as said:
            assert read_layout(name, root)["test"] == others
        message = str(said[0].message)
    else:
        with pytest.raises(InputError, match="test, question .*is missing") as caught:
            read_layout(name, root)
        message = str(caught.value)
    assert repr(row["question_id"]) in message and row["image"] in message
    assert read_layout(name, root, images=False) == questions


def test_image_outside_its_folder_is_refused(tmp_path: Path) -> None:
    root = iu_xray(tmp_path / "iu")
    picture(tmp_path / "secret.png")
    splits = json.loads((root / "annotation.json").read_text())
    splits["test"][0]["image_path"] = ["../../secret.png"]
    write(root / "annotation.json", splits)
    with pytest.raises(InputError, match="outside"):
        read_layout("iu-xray", root)


def test_reports_outside_the_files_folder_are_refused(tmp_path: Path) -> None:
    root = mimic_split(tmp_path, compressed=False)
    (root / "mimic-cxr-2.0.0-split.csv").write_text(
        "dicom_id,study_id,subject_id,split\na,../x,../../y,test\n"
    )
    with pytest.raises(InputError, match="row 0.*expected numbers"):
        read_layout("mimic-cxr", root)


def hugging_face(folder: Path) -> datasets.DatasetDict:
    """As the common copies look: JPEG bytes in the image column, two questions about one image."""
    first, second = (picture(folder / f"{number}.jpg", number).read_bytes() for number in (1, 2))
    text = datasets.Value("string")
    columns = datasets.Features({"image": datasets.Image(), "question": text, "answer": text})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {
                    "image": [{"bytes": content, "path": None} for content in images],
                    "question": ["Is there a nodule?", "Where is it?"][: len(images)],
                    "answer": ["yes", "left lung"][: len(images)],
                },
                features=columns,
            )
            for split, images in (("train", [first, first]), ("test", [second]))
        }
    )


@pytest.mark.parametrize("form", ["object", "saved", "parquet"])
def test_hugging_face_copy_becomes_the_layout(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = hugging_face(tmp_path / "pictures")
    if form == "saved":
        source.save_to_disk(tmp_path / "source")
    elif form == "parquet":
        (tmp_path / "source" / "data").mkdir(parents=True)
        for split, table in source.items():
            table.to_parquet(tmp_path / "source" / "data" / f"{split}-00000-of-00001.parquet")
    root = tmp_path / "root"
    questions = import_hugging_face(
        source if form == "object" else tmp_path / "source", root, "vqa-rad"
    )
    assert read_layout("vqa-rad", root) == questions and sizes(questions) == {"train": 2, "test": 1}
    assert [row["question_id"] for row in questions["train"]] == ["train-0", "train-1"]
    assert [row["answer_type"] for row in questions["train"]] == ["CLOSED", "OPEN"]
    files = sorted((root / "VQA_RAD Image Folder").iterdir())
    assert len(files) == 2 and questions["train"][0]["image"] == questions["train"][1]["image"]
    stored = root / "VQA_RAD Image Folder" / questions["test"][0]["image"]
    assert stored.read_bytes() == (tmp_path / "pictures" / "2.jpg").read_bytes(), (
        "as it came, not encoded again"
    )
    assert open_image(stored).size == (16, 16)


def test_hugging_face_columns_of_slake_are_used(tmp_path: Path) -> None:
    table = (
        hugging_face(tmp_path)["train"].add_column("q_lang", ["zh", "en"]).add_column("qid", [7, 8])
    )
    table = table.add_column("answer_type", ["CLOSED", "CLOSED"]).add_column(
        "content_type", ["Organ", "Position"]
    )
    (row,) = import_hugging_face(table, tmp_path / "root", "slake")["train"]
    assert (row["question_id"], row["answer_type"], row["question_type"]) == (
        8,
        "CLOSED",
        "Position",
    )
    assert row == read_layout("slake", tmp_path / "root")["train"][0]


def test_nothing_is_left_of_a_bad_hugging_face_copy(tmp_path: Path) -> None:
    table = hugging_face(tmp_path / "pictures")["train"].cast_column(
        "image", datasets.Image(decode=False)
    )
    rows = [
        *table,
        {"image": {"bytes": b"no image", "path": None}, "question": "Is it?", "answer": "no"},
    ]
    broken = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    with pytest.warns(UserWarning, match="1 of 3 rows left out.*split train: row 2: `image`"):
        assert len(import_hugging_face(broken, tmp_path / "some", "vqa-rad")["train"]) == 2
    with pytest.raises(InputError, match="split train: row 0: `image`"):
        import_hugging_face(broken.select([2]), tmp_path / "root", "vqa-rad")
    assert not list((tmp_path / "root").glob("*.jsonl"))
    other = datasets.Dataset.from_dict({"img_name": ["a"], "question": ["b"], "answer": ["c"]})
    with pytest.raises(InputError, match="no column image .*img_name"):
        import_hugging_face(other, tmp_path, "slake")
    with pytest.raises(InputError, match="expected vqa-rad or slake"):
        import_hugging_face(other, tmp_path, "slack")
    with pytest.raises(InputError, match="no such folder"):
        import_hugging_face(tmp_path / "absent", tmp_path, "slake")


@pytest.mark.parametrize("name", LAYOUTS)
def test_empty_folder_says_what_belongs_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="holds no question.*data_manifests/") as caught:
        read_layout(name, tmp_path)
    assert all(file in str(caught.value) for file in LAYOUTS[name])
    with pytest.raises(InputError, match="nearest valid one is `vqa-rad`"):
        read_layout("vqa_rad", tmp_path)


def published_slake(root: Path) -> Path:
    """SLAKE as it is published: English and Chinese rows by its card, one blank answer at qid
    1622.
    """

    def row(number: int, answer: str, language: str) -> dict:
        return {
            "img_id": number % 90,
            "img_name": f"xmlab{number % 90}/source.jpg",
            "question": "What is shown?",
            "answer": answer,
            "q_lang": language,
            "answer_type": "OPEN",
            "content_type": "Organ",
            "qid": number,
        }

    for file, english, every in (
        ("train", 4919, 9835),
        ("validate", 1053, 2099),
        ("test", 1061, 2070),
    ):
        rows = [row(number, "Liver", "en" if number < english else "zh") for number in range(every)]
        if file == "train":
            rows[1622]["answer"] = ""
        write(root / f"{file}.json", rows)
    for number in range(90):
        folder = root / "imgs" / f"xmlab{number}"
        folder.mkdir(parents=True)
        (folder / "source.jpg").write_bytes(b"x")
    return root


def test_slake_as_it_is_published(tmp_path: Path) -> None:
    root = published_slake(tmp_path)
    with pytest.warns(UserWarning) as said:
        assert sizes(read_layout("slake", root)) == {
            "train": 4918,
            "validation": 1053,
            "test": 1061,
        }
    (warning,) = said
    assert "train.json: 1 of 4919 rows left out" in str(warning.message)
    assert "row 1622 (qid 1622): `answer`: expected a non-empty text, found ''" in str(
        warning.message
    )
    rows = {row["what"]: row for row in check_dataset(load_card("slake"), root)}
    found = rows["train: questions or reports"]
    assert (found["expected"], found["found"]) == (4919, 4918) and "oddities" in found["what to do"]
    assert "qid 1622" in rows["rows that can be used"]["what to do"]
    assert rows["validation: questions or reports"]["what to do"] == "nothing"
    assert rows["test: questions or reports"]["what to do"] == "nothing"


def test_one_bad_row_of_every_layout_is_left_out_and_named(tmp_path: Path) -> None:
    """Of each published format one row is spoilt; the others are read, and one warning names it."""
    spoilt = {
        "vqa-rad": (
            "VQA_RAD Dataset Public.json",
            lambda data: data[1].update(answer=None),
            "row 1 (qid 1): `answer` is missing",
        ),
        "slake": (
            "train.json",
            lambda data: data[0].update(answer=True),
            "row 0 (qid 0): `answer`: expected",
        ),
        "iu-xray": (
            "annotation.json",
            lambda data: data["train"][0].update(report=" "),
            "split train: `report`: expected",
        ),
        "mimic-cxr": (
            "annotation.json",
            lambda data: data["train"][1].update(image_path=[]),
            "split train: `image_path`",
        ),
    }
    for name, (file, change, words) in spoilt.items():
        root = MAKERS[name](tmp_path / name)
        whole = sum(sizes(read_layout(name, root)).values())
        data = json.loads((root / file).read_text(encoding="utf-8"))
        change(data)
        write(root / file, data)
        with pytest.warns(UserWarning, match="1 of [0-9]+ rows left out") as said:
            assert sum(sizes(read_layout(name, root)).values()) == whole - 1
        assert len(said) == 1 and words in str(said[0].message)
    root = mimic_split(tmp_path / "official", compressed=False)
    table = root / "mimic-cxr-2.0.0-split.csv"
    table.write_text(table.read_text().replace("dd-1,50000004", "dd-1,fifty"))
    with pytest.warns(UserWarning) as said:
        assert sizes(read_layout("mimic-cxr", root)) == {"train": 2, "validation": 1}
    assert any(
        "1 of 4 rows left out" in str(w.message) and "expected numbers" in str(w.message)
        for w in said
    )


@pytest.mark.parametrize("code", ["en", "EN", " en "])
def test_languages_are_read_however_they_are_written(tmp_path: Path, code: str) -> None:
    root = slake(tmp_path)
    rows = json.loads((root / "test.json").read_text(encoding="utf-8"))
    write(
        root / "test.json",
        [row | {"q_lang": code if row["q_lang"] == "en" else "zh"} for row in rows],
    )
    assert len(read_layout("slake", root)["test"]) == 2
    shutil.copy(root / "validate.json", root / "validation.json")
    with pytest.raises(InputError, match="holds validate.json and validation.json"):
        read_layout("slake", root)


@pytest.mark.parametrize(
    ("report", "findings"),
    [
        (" FINAL REPORT\n FINDINGS: Clear.\n\n RECOMMENDATION(S): A scan.\n", "Clear."),
        (" FINDINGS: Clear lungs.\n IMPRESSION/PLAN: None.\n", "Clear lungs."),
        (
            " WET READ: now\n FINDINGS: First.\n FINAL REPORT\n FINDINGS: Second.\n IMPRESSION: "
            "None.\n",
            "Second.",
        ),
        (" FINDINGS: First.\n FINAL REPORT\n FINDINGS:\n\n IMPRESSION: None.\n", "First."),
        (
            " FINDINGS:\n\n AP AND LATERAL VIEWS, CHEST: Clear.\n IMPRESSION: None.\n",
            "AP AND LATERAL VIEWS, CHEST: Clear.",
        ),
        (" CHEST, FINDINGS: Clear: no effusion at 10:30.\n", "Clear: no effusion at 10:30."),
        (" IMPRESSION: Normal.\n", ""),
        (" FINDINGS:\n IMPRESSION: Normal.\n", ""),
        ("", ""),
    ],
)
def test_the_findings_of_a_report(tmp_path: Path, report: str, findings: str) -> None:
    (tmp_path / "s1.txt").write_text(report)
    assert layouts._findings(tmp_path / "s1.txt") == findings


def test_a_report_of_blank_lines_takes_no_time(tmp_path: Path) -> None:
    (tmp_path / "s1.txt").write_text("FINDINGS: " + "\n " * 200_000 + "A" * 200_000 + "\n")
    began = time.monotonic()
    assert layouts._findings(tmp_path / "s1.txt") == "A" * 200_000
    assert time.monotonic() - began < 5


def test_a_report_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    root = mimic_split(tmp_path / "data", compressed=False)
    (tmp_path / "elsewhere.txt").write_text("FINDINGS: Somebody else's.\n")
    report = root / "files" / "p12" / "p12000001" / "s50000004.txt"
    report.unlink()
    report.symlink_to(tmp_path / "elsewhere.txt")
    with pytest.warns(UserWarning, match="is a link that leads outside"):
        assert "test" not in read_layout("mimic-cxr", root)


@pytest.mark.parametrize(
    ("report", "findings"),
    [
        (" FINDINGS: Main.\n\n ADDITIONAL FINDINGS: Small.\n IMPRESSION: None.\n", "Main."),
        (" FINDINGS:\n\n IMPRESSION AND PLAN: Normal.\n", ""),
        (" FINDINGS:\n\n REASON FOR EXAMINATION: Cough.\n", ""),
        (
            " FINDINGS:\n\n FRONTAL VIEW: Clear.\n\n LATERAL VIEW: No effusion.\n\n HISTORY: No.\n",
            "FRONTAL VIEW: Clear. LATERAL VIEW: No effusion.",
        ),
        (" FINDINGS: Clear.\n\n PORTABLE CHEST: Of another day.\n", "Clear."),
        (" FINDINGS:\n\n IMPRESSION, PORTABLE CHEST: Normal.\n", ""),
        (" FINDINGS:\n\n DISCUSSED WITH: The ward.\n", ""),
        (" FINDINGS AND IMPRESSION: All clear.\n", "All clear."),
        (" FINDINGS/IMPRESSION: All clear.\n", "All clear."),
        (" Findings: All clear.\n Impression: None.\n", "All clear."),
        (" FINDINGS: Clear.\n Impression: Normal.\n", "Clear."),
        (" FINDINGS: First.\n ______________\n FINAL REPORT\n HISTORY: Cough.\n", "First."),
    ],
)
def test_the_findings_keep_to_their_section(tmp_path: Path, report: str, findings: str) -> None:
    (tmp_path / "s1.txt").write_text(report)
    assert layouts._findings(tmp_path / "s1.txt") == findings


def test_a_split_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    root = iu_xray(tmp_path)
    text = (root / "annotation.json").read_text()
    (root / "annotation.json").write_text(text[:-1] + ', "test": []}')
    with pytest.raises(InputError, match=r"annotation.json: `test` is written twice"):
        read_layout("iu-xray", root)


def test_a_data_set_without_a_test_question_is_refused(tmp_path: Path) -> None:
    root = slake(tmp_path)
    (root / "test.json").unlink()
    values = {"data.source": "slake", "data.card": "slake", "data.root": str(root)}
    with pytest.raises(InputError, match="has no test question that can be used"):
        prepare_dataset(load_profile("vqa-rad-mini", values))
