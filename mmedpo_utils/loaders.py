"""The data sets' own folder layouts, read into questions in the format of ``manifests.read_questions``.

A report is a question too: ``REPORT_QUESTION``, answered by the report. Where a layout names no patient, none is made up;
the image's name then stands for the patient (``metrics.patient_of``).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import InputError
from .files import atomic_write, write_json_lines
from .manifests import (
    ANSWER_TYPES,
    IMAGE_MARK,
    Row,
    check_fields,
    check_question,
    load_json,
    place,
    read_questions,
    read_text,
    resolve_image,
)
from .metrics import is_yes_no
from .phantom.texts import SPLITS
from .profiles import IMAGE_FOLDERS
from .schema import nearest

OTHER_NAMES = {"val": "validation", "validate": "validation", "valid": "validation"}
REPORT_QUESTION = "Provide a detailed description of the given image"  # one of the 16 prompts of the released IU-Xray rows
Questions = dict[str, list[Row]]


def read_layout(name: str, root: str | os.PathLike, images: bool = True) -> Questions:
    """Read a data set from its own folder layout.

    Args:
        name: a name of ``LAYOUTS``: vqa-rad, slake, iu-xray or mimic-cxr, as they are published, or folder (one
            ``<split>_questions.jsonl`` per split, images in images/). ``import_hugging_face`` leaves question files
            too: they are read where the published files are not there.
        root: the data set's folder; its dataset card says what lies there.
        images: whether every image must be there, inside the image folder. Nothing is decoded.

    Returns:
        rows per split, of train, validation and test those that the data set has.

    Raises:
        InputError: names the file, the row and the field, or says that nothing of the layout is there.
    """
    _check_name(name)
    root, files = Path(root), [file for file in LAYOUTS[name] if (Path(root) / file).is_file()]
    if files:
        questions = LAYOUTS[name][files[0]](root)
    else:
        questions = {split: read_questions(root / f"{split}_questions.jsonl") for split in SPLITS
                     if (root / f"{split}_questions.jsonl").is_file()}
    if not any(questions.values()):
        raise InputError(f"{root}: holds no question of {name}; expected {' or '.join([*LAYOUTS[name], 'test_questions.jsonl'])} "
                         "there: data_manifests/ has a card that says how to get the data, and how its folder looks")
    if images:
        for split, rows in questions.items():
            _find_images(root / IMAGE_FOLDERS[name], split, rows)
    return questions


def import_hugging_face(source: Any, root: str | os.PathLike, name: str) -> Questions:
    """Turn a Hugging Face data set into question files and images that ``read_layout(name, root)`` reads.

    Args:
        source: a ``datasets`` DatasetDict or a mapping of splits, or a folder: one that ``save_to_disk`` wrote, or a
            copy of a Hub repository (parquet files). Its columns: image, question, answer; also used where there:
            answer_type, qid, q_lang (only "en" is kept), content_type.
        root: the folder to write into. An image is stored as it came, named by its content, so that questions about
            one image share one file. Nothing is left of a split that fails except finished image files.
        name: vqa-rad or slake.

    Without an answer_type, yes and no count as CLOSED, every other answer as OPEN.

    Raises:
        InputError: an unknown name, a column is missing, a row cannot be used, or there is no place to write.
    """
    if name not in ("vqa-rad", "slake"):
        raise InputError(f"data set {name!r}: has no Hugging Face copy to import; expected vqa-rad or slake")
    root, folder, questions = Path(root), Path(root) / IMAGE_FOLDERS[name], {}
    for split, table in _hugging_face_splits(source).items():
        known, rows, written = _split_name(split, name), [], set()
        for number, item in enumerate(table):
            where = f"{name}, split {split}: row {number}"
            if item.get("q_lang") not in (None, "en"):
                continue
            check_fields(item, where, ("question", "answer", "image"))
            row = _row(where, item.get("qid", f"{split}-{number}"), _store_image(item["image"], folder, where, written),
                       item["question"], item["answer"], item.get("answer_type"), item.get("content_type"))
            rows.append(row)
        if rows:
            questions[known] = rows
    if not questions:
        raise InputError(f"{name}: the Hugging Face data set has no row to import; expected image, question and answer")
    for split, rows in questions.items():
        write_json_lines(root / f"{split}_questions.jsonl", rows)
    return questions


def _hugging_face_splits(source: Any) -> dict[str, Iterable[dict[str, Any]]]:
    """Tables per split, with their images undecoded."""
    import datasets

    if isinstance(source, str | os.PathLike):
        if not Path(source).is_dir():
            raise InputError(f"{source}: no such folder; download the Hugging Face data set first, and give its folder")
        saved = any((Path(source) / file).is_file() for file in ("dataset_dict.json", "state.json"))
        try:
            source = datasets.load_from_disk(str(source)) if saved else datasets.load_dataset(str(source))
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{source}: cannot be read as a Hugging Face data set ({str(error).partition(chr(10))[0]}); give "
                             "a folder that save_to_disk wrote, or a copy of the Hub repository") from error
    splits = {str(source.split or "train"): source} if isinstance(source, datasets.Dataset) else source
    if not isinstance(splits, dict) or not all(isinstance(table, datasets.Dataset) for table in splits.values()):
        raise InputError(f"Hugging Face data set: expected a Dataset, a DatasetDict or a folder, found {type(source).__name__}")
    for split, table in splits.items():
        missing = [column for column in ("image", "question", "answer") if column not in table.column_names]
        if missing:
            raise InputError(f"Hugging Face data set, split {split}: no column {', '.join(missing)} among "
                             f"{', '.join(table.column_names)}; where it holds img_name instead of image, unpack its "
                             "imgs.zip and read the folder with read_layout")
    return {split: table.cast_column("image", datasets.Image(decode=False)) for split, table in splits.items()}


def _store_image(value: dict[str, Any], folder: Path, where: str, written: set[str]) -> str:
    """Write an undecoded image {bytes, path} once; its file name."""
    try:
        content = value["bytes"] or Path(value["path"]).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            suffix = {"JPEG": "jpg"}.get(image.format, image.format.lower())
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: `image`: cannot be opened as an image ({error}); fetch the data set again") from error
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"
    if name not in written:
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)
        written.add(name)
    return name


def _row(where: str, number: Any, image: Any, question: Any, answer: Any, answer_type: Any = None,
         question_type: Any = None, **optional: Any) -> Row:
    """One checked question. Numbers among the answers become text; yes and no are CLOSED where the type is not said."""
    answer = str(answer).strip() if isinstance(answer, str | int | float) else answer
    kind = str(answer_type).strip().upper() if answer_type else None
    if kind is None:
        kind = "CLOSED" if is_yes_no(str(answer)) else "OPEN"
    if kind not in ANSWER_TYPES:
        raise InputError(f"{where}: `answer_type`: expected one of {', '.join(ANSWER_TYPES)}, found {answer_type!r}")
    text = f"{question.strip()}\n{IMAGE_MARK}" if isinstance(question, str) and question.strip() else ""
    row = {"question_id": number, "image": image, "text": text, "gpt4_answer": answer, "answer_type": kind, **optional}
    if question_type:
        row["question_type"] = str(question_type).strip()
    check_question(row, where)
    return row


def _check_name(name: str) -> None:
    if name not in LAYOUTS:
        raise InputError(f"data set {name!r}: unknown layout{nearest(name, LAYOUTS)}")


def _split_name(split: str, where: str) -> str:
    """train, validation or test. Raises InputError: another name."""
    known = OTHER_NAMES.get(split, split)
    if known not in SPLITS:
        raise InputError(f"{where}: split {split!r}: unknown{nearest(split, SPLITS)}")
    return known


def _find_images(folder: Path, split: str, rows: list[Row]) -> None:
    for name in dict.fromkeys(row["image"] for row in rows):
        try:
            resolve_image(folder, name)
        except InputError as error:
            raise InputError(f"{split}, question {next(row['question_id'] for row in rows if row['image'] == name)!r}: "
                             f"{error}") from error


def _entries(path: Path, rows: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each entry of a JSON list with its place, checked to have ``keys``."""
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: expected a non-empty list of entries with {', '.join(keys)}, found "
                         f"{'an empty list' if rows == [] else type(rows).__name__}; fetch the file again")
    for number, row in enumerate(rows):
        where = place(path, number, row, keys[0])
        check_fields(row, where, keys)
        yield where, row


def _read_vqa_rad(root: Path) -> Questions:
    """The list on OSF: test rows are those whose phrase_type begins with "test"."""
    path, questions = root / "VQA_RAD Dataset Public.json", {"train": [], "test": []}
    keys = ("qid", "image_name", "question", "answer", "answer_type", "phrase_type")
    for where, row in _entries(path, load_json(path, "the list of questions from OSF"), keys):
        split = "test" if str(row["phrase_type"]).strip().startswith("test") else "train"
        questions[split].append(_row(where, row["qid"], row["image_name"], row["question"], row["answer"],
                                     row["answer_type"], row.get("question_type")))
    return questions


def _read_slake(root: Path) -> Questions:
    """train.json, validate.json and test.json; the English rows only."""
    questions = {}
    for file, split in (("train", "train"), ("validate", "validation"), ("validation", "validation"), ("test", "test")):
        path = root / f"{file}.json"
        if path.is_file():
            keys = ("qid", "img_name", "question", "answer", "answer_type", "q_lang")
            questions[split] = [
                _row(where, row["qid"], row["img_name"], row["question"], row["answer"], row["answer_type"],
                     row.get("content_type"))
                for where, row in _entries(path, load_json(path, "a list of SLAKE's questions"), keys) if row["q_lang"] == "en"]
    return questions


def _read_annotation(root: Path, patient: Callable[[dict[str, Any]], str], keys: tuple[str, ...]) -> Questions:
    """R2Gen's annotation.json: reports per split; of several images of a study the first is asked about."""
    path = root / "annotation.json"
    splits, questions = load_json(path, "an object with train, val and test"), {}
    if not isinstance(splits, dict) or not splits:
        raise InputError(f"{path}: expected an object with train, val and test, found {type(splits).__name__}")
    for split, entries in splits.items():
        rows = questions.setdefault(_split_name(split, str(path)), [])
        for where, row in _entries(path, entries, ("id", "report", "image_path", *keys)):
            where = f"{where}, split {split}"
            names = row["image_path"]
            if not isinstance(names, list) or not names:
                raise InputError(f"{where}: `image_path`: expected a list of one image or more, found {names!r:.80}")
            rows.append(_row(where, row["id"], names[0], REPORT_QUESTION, row["report"], "REPORT", "report",
                             patient_id=patient(row)))
    return questions


def _read_iu_xray(root: Path) -> Questions:
    """A study CXR12_IM-0345 is of patient CXR12: Open-i has one report per patient."""
    return _read_annotation(root, lambda row: str(row["id"]).partition("_")[0], ())


def _read_mimic_annotation(root: Path) -> Questions:
    return _read_annotation(root, lambda row: str(row["subject_id"]), ("subject_id",))


def _read_mimic_split(root: Path) -> Questions:
    """The official split: one row per image; its report is the FINDINGS section of files/pNN/pSUBJECT/sSTUDY.txt.

    Warns how many images were left out because their study has no report file or no such section.
    """
    path = next(root / file for file in MIMIC_SPLITS if (root / file).is_file())
    questions, reports, without, number = {}, {}, 0, -1
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream)):
                where = place(path, number, row, "dicom_id")
                check_fields(row, where, ("dicom_id", "study_id", "subject_id", "split"))
                if not (row["subject_id"].isdigit() and row["study_id"].isdigit()):
                    raise InputError(f"{where}: `subject_id`, `study_id`: expected numbers, found {row['subject_id']!r}, "
                                     f"{row['study_id']!r}; fetch the file again")
                study = f"p{row['subject_id'][:2]}/p{row['subject_id']}/s{row['study_id']}"
                if study not in reports:
                    reports = {study: _findings(root / "files" / f"{study}.txt")}  # a study's images stand in a row
                if not reports[study]:
                    without += 1
                    continue
                questions.setdefault(_split_name(row["split"], where), []).append(
                    _row(where, row["dicom_id"], f"{study}/{row['dicom_id']}.jpg", REPORT_QUESTION, reports[study], "REPORT",
                         "report", patient_id=row["subject_id"]))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as a CSV table ({error}); fetch the file again") from error
    if without:
        warnings.warn(f"{path.name}: {without} of {number + 1} images left out: no report file with a FINDINGS section",
                      stacklevel=3)
    return questions


def _findings(path: Path) -> str:
    """The FINDINGS section of a report file, its white space joined; empty where there is none."""
    if not path.is_file():
        return ""
    section = re.search(r"FINDINGS:(.*?)(?=\n\s*[A-Z][A-Z /]+:|\Z)", read_text(path), re.DOTALL)
    return " ".join(section[1].split()) if section else ""


MIMIC_SPLITS = ("mimic-cxr-2.0.0-split.csv", "mimic-cxr-2.0.0-split.csv.gz")
LAYOUTS: dict[str, dict[str, Callable[[Path], Questions]]] = {
    "folder": {},
    "vqa-rad": {"VQA_RAD Dataset Public.json": _read_vqa_rad},
    "slake": dict.fromkeys(("train.json", "test.json"), _read_slake),
    "iu-xray": {"annotation.json": _read_iu_xray},
    "mimic-cxr": {"annotation.json": _read_mimic_annotation} | dict.fromkeys(MIMIC_SPLITS, _read_mimic_split),
}
