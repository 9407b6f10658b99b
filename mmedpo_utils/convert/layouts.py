"""The data sets' own folder layouts, read into questions in the format of
``manifests.read_questions``.

A report is a question too: ``REPORT_QUESTION``, answered by the report. Where a layout names no
patient, none is made up; the image's name then stands for the patient (``metrics.patient_of``). A
row that cannot be used does not stop its file: it is left out, and one warning a file counts such
rows and names them.
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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ..base.errors import InputError, Unusable, first_line
from ..base.files import atomic_write, load_json, read_text, write_json_lines
from ..base.images import IMAGE_FORMATS, resolve_image, with_images
from ..base.rows import (
    Row,
    check_fields,
    check_question,
    check_text,
    mended_question,
    mended_text,
    place,
)
from ..base.sections import IMAGE_FOLDERS
from ..base.settings import SPLITS, nearest
from ..base.words import is_yes_no
from ..preference_rows import read_questions

OTHER_NAMES = {"val": "validation", "validate": "validation", "valid": "validation"}
# one of the 16 prompts of the released IU-Xray rows
REPORT_QUESTION = "Provide a detailed description of the given image"
Questions = dict[str, list[Row]]


def read_layout(name: str, root: str | os.PathLike, images: bool = True) -> Questions:
    """Read a data set from its own folder layout.

    Args:
        name: a name of ``LAYOUTS``: vqa-rad, slake, iu-xray or mimic-cxr, as they are published, or
            folder (one ``<split>_questions.jsonl`` per split, images in images/).
            ``import_hugging_face`` leaves question files
            too: they are read where the published files are not there.
        root: the data set's folder; its dataset card says what lies there.
        images: whether the images must be there, inside the image folder; a row without one is left
            out. Nothing is decoded.

    Returns:
        rows per split, of train, validation and test those that the data set has.

    Raises:
        InputError: nothing of the layout is there, a file is of another kind, or none of its rows
            can be used.
    """
    _check_name(name)
    root, files = Path(root), [file for file in LAYOUTS[name] if (Path(root) / file).is_file()]
    if files:
        questions = LAYOUTS[name][files[0]](root)
    else:
        questions = {
            split: read_questions(root / f"{split}_questions.jsonl")
            for split in SPLITS
            if (root / f"{split}_questions.jsonl").is_file()
        }
    if not any(questions.values()):
        raise InputError(
            f"{root}: holds no question of {name}; expected "
            f"{' or '.join([*LAYOUTS[name], 'test_questions.jsonl'])} there: data_manifests/ has a "
            "card that says how to get the data, and how its folder looks"
        )
    if images:
        for split, rows in questions.items():
            questions[split] = with_images(rows, root / IMAGE_FOLDERS[name], split)
    return questions


def import_hugging_face(source: Any, root: str | os.PathLike, name: str) -> Questions:
    """Turn a Hugging Face data set into question files and images that ``read_layout(name, root)``
    reads.

    Args:
        source: a ``datasets`` DatasetDict or a mapping of splits, or a folder: one that
            ``save_to_disk`` wrote, or a copy of a Hub repository (parquet files). Its columns:
            image, question, answer; also used where there: answer_type, qid, q_lang (only "en" is
            kept), content_type.
        root: the folder to write into. An image is stored as it came, named by its content, so that
            questions about one image share one file. Nothing is left of a split that fails except
            finished image files.
        name: vqa-rad or slake.

    Without an answer_type, yes and no count as CLOSED, every other answer as OPEN.

    Raises:
        InputError: an unknown name, a column is missing, a row cannot be used, or there is no place
            to write.
    """
    if name not in ("vqa-rad", "slake"):
        raise InputError(
            f"data set {name!r}: has no Hugging Face copy to import; expected vqa-rad or slake"
        )
    root, folder, questions = Path(root), Path(root) / IMAGE_FOLDERS[name], {}
    for split, table in _hugging_face_splits(source).items():
        known = _split_name(split, name)
        rows = _import_split(f"{name}, split {split}", split, table, folder)
        if rows:
            questions[known] = rows
    if not questions:
        raise InputError(
            f"{name}: the Hugging Face data set has no row to import; expected image, question and "
            "answer"
        )
    for split, rows in questions.items():
        write_json_lines(root / f"{split}_questions.jsonl", rows)
    return questions


def _import_split(
    source: str, split: str, table: Iterable[dict[str, Any]], folder: Path
) -> list[Row]:
    rows, written, left_out = [], set(), Unusable(source)
    for number, item in enumerate(table):
        where = f"{source}: row {number}"
        if not _is_english(item.get("q_lang")):
            continue
        try:
            check_fields(item, where, ("question", "answer", "image"))
            names = {"text": "question", "gpt4_answer": "answer"}
            row = _row(
                where,
                names,
                item.get("qid", f"{split}-{number}"),
                "not stored yet",
                item["question"],
                item["answer"],
                item.get("answer_type"),
                item.get("content_type"),
            )
            row["image"] = _store_image(item["image"], folder, where, written)
        except InputError as error:
            left_out.note(error)
        else:
            rows.append(row)
    left_out.tell(len(rows))
    return rows


def _is_english(language: Any) -> bool:
    """Whether a row of SLAKE is an English one, however the code is written; without a code it is
    taken.
    """
    return language is None or str(language).strip().lower() == "en"


def _hugging_face_splits(source: Any) -> dict[str, Iterable[dict[str, Any]]]:
    """Tables per split, with their images undecoded."""
    import datasets

    if isinstance(source, str | os.PathLike):
        if not Path(source).is_dir():
            raise InputError(
                f"{source}: no such folder; download the Hugging Face data set first, and give its "
                "folder"
            )
        saved = any((Path(source) / file).is_file() for file in ("dataset_dict.json", "state.json"))
        try:
            source = (
                datasets.load_from_disk(str(source))
                if saved
                else datasets.load_dataset(str(source))
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{source}: cannot be read as a Hugging Face data set ({first_line(error)}); give "
                "a folder that save_to_disk wrote, or a copy of the Hub repository"
            ) from error
    splits = (
        {str(source.split or "train"): source} if isinstance(source, datasets.Dataset) else source
    )
    if not isinstance(splits, dict) or not all(
        isinstance(table, datasets.Dataset) for table in splits.values()
    ):
        raise InputError(
            "Hugging Face data set: expected a Dataset, a DatasetDict or a folder, found "
            f"{type(source).__name__}"
        )
    for split, table in splits.items():
        missing = [
            column for column in ("image", "question", "answer") if column not in table.column_names
        ]
        if missing:
            raise InputError(
                f"Hugging Face data set, split {split}: no column {', '.join(missing)} among "
                f"{', '.join(table.column_names)}; where it holds img_name instead of image, "
                "unpack its imgs.zip and read the folder with read_layout"
            )
    return {
        split: table.cast_column("image", datasets.Image(decode=False))
        for split, table in splits.items()
    }


def _store_image(value: dict[str, Any], folder: Path, where: str, written: set[str]) -> str:
    """Write an undecoded image {bytes, path} once; its file name."""
    try:
        content = value["bytes"] or Path(value["path"]).read_bytes()
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            image.load()
            suffix = {"JPEG": "jpg"}.get(image.format, image.format.lower())
    except Exception as error:  # decoders of damaged files raise whatever they meet
        reason = first_line(error)
        raise InputError(
            f"{where}: `image`: cannot be opened as an image ({reason}); fetch the data set again"
        ) from error
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"
    if name not in written:
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)
        written.add(name)
    return name


def _row(
    where: str,
    names: dict[str, str],
    number: Any,
    image: Any,
    question: Any,
    answer: Any,
    answer_type: Any = None,
    question_type: Any = None,
    **optional: Any,
) -> Row:
    """One checked question, mended as `manifests.mended_question` does; yes and no are CLOSED where
    the type is not said.

    Args:
        names: what the file calls ``text``, ``gpt4_answer``, ``image`` and ``answer_type``, for the
            errors.
    """
    answer = mended_text(answer)
    row = {
        "question_id": number,
        "image": image,
        "text": question,
        "gpt4_answer": answer,
        "answer_type": answer_type,
        **optional,
    }
    for key in ("text", "gpt4_answer", "image"):
        check_text(row[key], f"{where}: `{names.get(key, key)}`")
    row["gpt4_answer"] = answer.strip()
    if not answer_type:
        row["answer_type"] = "CLOSED" if is_yes_no(answer) else "OPEN"
    if question_type:
        row["question_type"] = str(question_type).strip()
    row = mended_question(row)
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


def _usable(
    path: Path,
    entries: Any,
    keys: tuple[str, ...],
    build: Callable[[str, dict[str, Any]], tuple[str, Row] | None],
    left_out: Unusable,
    questions: Questions,
    within: str = "",
) -> None:
    """Add what ``build`` makes of each entry of a JSON list, a split and its row, to ``questions``.

    Args:
        keys: what each entry must have, its id first.
        build: None leaves an entry out on purpose, an InputError because it cannot be used.
        left_out: is told of the latter.
        within: where in the file the list is, for the errors.
    """
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"{path}: expected a non-empty list of entries with {', '.join(keys)}, found "
            f"{'an empty list' if entries == [] else type(entries).__name__}; fetch the file again"
        )
    for number, entry in enumerate(entries):
        where = place(path, number, entry, keys[0]) + within
        try:
            check_fields(entry, where, keys)
            built = build(where, entry)
        except InputError as error:
            left_out.note(error)
        else:
            if built is not None:
                questions.setdefault(built[0], []).append(built[1])


def _count(questions: Questions) -> int:
    return sum(map(len, questions.values()))


def _read_vqa_rad(root: Path) -> Questions:
    """The list on OSF: test rows are those whose phrase_type begins with "test"."""
    path, questions = root / "VQA_RAD Dataset Public.json", {"train": [], "test": []}
    keys = ("qid", "image_name", "question", "answer", "answer_type", "phrase_type")
    names = {"text": "question", "gpt4_answer": "answer", "image": "image_name"}

    def build(where: str, row: dict[str, Any]) -> tuple[str, Row]:
        split = "test" if str(row["phrase_type"]).strip().startswith("test") else "train"
        return split, _row(
            where,
            names,
            row["qid"],
            row["image_name"],
            row["question"],
            row["answer"],
            row["answer_type"],
            row.get("question_type"),
        )

    left_out = Unusable(path)
    _usable(
        path, load_json(path, "the list of questions from OSF"), keys, build, left_out, questions
    )
    left_out.tell(_count(questions))
    return questions


def _read_slake(root: Path) -> Questions:
    """train.json, validate.json and test.json; the English rows only."""
    if (root / "validate.json").is_file() and (root / "validation.json").is_file():
        raise InputError(
            f"{root}: holds validate.json and validation.json, which are one split; keep the right "
            "one"
        )
    questions: Questions = {}
    keys = ("qid", "img_name", "question", "answer", "answer_type", "q_lang")
    names = {"text": "question", "gpt4_answer": "answer", "image": "img_name"}
    for file, split in (
        ("train", "train"),
        ("validate", "validation"),
        ("validation", "validation"),
        ("test", "test"),
    ):
        path = root / f"{file}.json"
        if not path.is_file():
            continue

        def build(where: str, row: dict[str, Any], split: str = split) -> tuple[str, Row] | None:
            if not _is_english(row["q_lang"]):
                return None
            return split, _row(
                where,
                names,
                row["qid"],
                row["img_name"],
                row["question"],
                row["answer"],
                row["answer_type"],
                row.get("content_type"),
            )

        left_out, read = Unusable(path), {}
        _usable(path, load_json(path, "a list of SLAKE's questions"), keys, build, left_out, read)
        left_out.tell(_count(read))
        questions |= read
    return questions


def _read_annotation(
    root: Path, patient: Callable[[dict[str, Any]], str], keys: tuple[str, ...]
) -> Questions:
    """R2Gen's annotation.json: reports per split; of several images of a study the first is asked
    about.
    """
    path = root / "annotation.json"
    splits, questions = load_json(path, "an object with train, val and test"), {}
    if not isinstance(splits, dict) or not splits:
        raise InputError(
            f"{path}: expected an object with train, val and test, found {type(splits).__name__}"
        )
    left_out = Unusable(path)
    for split, entries in splits.items():
        known = _split_name(split, str(path))

        def build(where: str, row: dict[str, Any], known: str = known) -> tuple[str, Row]:
            names = row["image_path"]
            if not isinstance(names, list) or not names:
                raise InputError(
                    f"{where}: `image_path`: expected a list of one image or more, found "
                    f"{names!r:.80}"
                )
            told = {"gpt4_answer": "report", "image": "image_path"}
            return known, _row(
                where,
                told,
                row["id"],
                names[0],
                REPORT_QUESTION,
                row["report"],
                "REPORT",
                "report",
                patient_id=patient(row),
            )

        wanted = ("id", "report", "image_path", *keys)
        _usable(path, entries, wanted, build, left_out, questions, f", split {split}")
    left_out.tell(_count(questions))
    return questions


def _read_iu_xray(root: Path) -> Questions:
    """A study CXR12_IM-0345 is of patient CXR12: Open-i has one report per patient."""
    return _read_annotation(root, lambda row: str(row["id"]).partition("_")[0], ())


def _read_mimic_annotation(root: Path) -> Questions:
    return _read_annotation(root, lambda row: str(row["subject_id"]), ("subject_id",))


def _read_mimic_split(root: Path) -> Questions:
    """The official split: one row per image; its report is the FINDINGS section of
    files/pNN/pSUBJECT/sSTUDY.txt.

    Warns how many images were left out because their study has no report file or no such section.
    """
    path = next(root / file for file in MIMIC_SPLITS if (root / file).is_file())
    questions: Questions = {}
    reports: dict[str, str] = {}
    without, number, left_out = 0, -1, Unusable(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", encoding="utf-8", newline=""
        ) as stream:
            for number, row in enumerate(csv.DictReader(stream)):
                where = place(path, number, row, "dicom_id")
                try:
                    study = _mimic_study(row, where)
                    if study not in reports:
                        # A study's images follow one another, so that one report is enough.
                        reports = {study: _mimic_report(root / "files", study)}
                    if not reports[study]:
                        without += 1
                        continue
                    split = _split_name(row["split"], where)
                    built = _row(
                        where,
                        {},
                        row["dicom_id"],
                        f"{study}/{row['dicom_id']}.jpg",
                        REPORT_QUESTION,
                        reports[study],
                        "REPORT",
                        "report",
                        patient_id=row["subject_id"],
                    )
                except InputError as error:
                    left_out.note(error)
                else:
                    questions.setdefault(split, []).append(built)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise InputError(
            f"{path}: cannot be read as a CSV table ({first_line(error)}); fetch the file again"
        ) from error
    left_out.tell(_count(questions))
    if without:
        warnings.warn(
            f"{path.name}: {without} of {number + 1} images left out: no report file with a "
            "FINDINGS section",
            stacklevel=3,
        )
    return questions


def _mimic_study(row: dict[str, Any], where: str) -> str:
    """The study's folder under files/, by the numbers of a row of the split."""
    check_fields(row, where, ("dicom_id", "study_id", "subject_id", "split"))
    if not (row["subject_id"].isdigit() and row["study_id"].isdigit()):
        raise InputError(
            f"{where}: `subject_id`, `study_id`: expected numbers, found {row['subject_id']!r}, "
            f"{row['study_id']!r}; fetch the file again"
        )
    return f"p{row['subject_id'][:2]}/p{row['subject_id']}/s{row['study_id']}"


def _mimic_report(files: Path, study: str) -> str:
    """The findings of a study's report; empty where there is no report. A link out of ``files`` is
    refused.
    """
    name = f"{study}.txt"
    return _findings(resolve_image(files, name)) if (files / name).is_file() else ""


# Sections of a report, however a heading is completed: IMPRESSION(S), REASON FOR EXAMINATION.
SECTIONS = re.compile(
    r"IMPRESSION|CONCLUSION|RECOMMENDATION|NOTIFICATION|ADDENDUM|(CLINICAL )?(HISTORY|INDICATION|"
    r"INFORMATION)|TECHNIQUE|COMPARISON|EXAM|REASON|PROCEDURE|WET READ|DOSE|OPINION|SUMMARY"
)
VIEWS = re.compile(r"\b(CHEST|AP|PA|LATERAL|FRONTAL|PORTABLE|SUPINE|UPRIGHT|VIEWS?|RADIOGRAPHS?)\b")
BETWEEN_READINGS = re.compile(r"_{4,}|FINAL REPORT$")


def _heading(line: str) -> str:
    """The heading that a line of a report begins with, in capitals; empty where it has none.

    A heading is capitals, digits, blanks and ( ) / , - before a colon. Two are known in any case,
    since a report that has them so has no other: Findings and Impression.
    """
    name = line.partition(":")[0].strip() if ":" in line else ""
    if name.lower() in ("findings", "impression"):
        return name.upper()
    return name if re.fullmatch(r"[A-Z][A-Z0-9 ()/,-]*", name) else ""


def _findings(path: Path) -> str:
    """The last FINDINGS section of a report file that says something, its white space joined; empty
    where there is none.

    A report that was read twice has two: a wet read first, then the final one. FINDINGS AND
    IMPRESSION (or with a slash) is one, and so is what has FINDINGS last, as in CHEST, FINDINGS;
    ADDITIONAL FINDINGS are a section of their own. Headings of views (PORTABLE AP CHEST) belong to
    the section where they follow FINDINGS at once.
    """
    found, section, of_views = "", None, False
    for line in [*read_text(path).splitlines(), "____"]:
        heading, between = _heading(line), BETWEEN_READINGS.match(line.strip())
        views = heading and VIEWS.search(heading) and not SECTIONS.match(heading)
        if section is not None and views and (of_views or not "".join(section).strip()):
            of_views = True
        elif section is not None and (heading or between):
            found = " ".join(" ".join(section).split()) or found
            section = None
        if section is not None:
            section.append(line)
        elif _is_findings(heading):
            section, of_views = [line.partition(":")[2]], False
    return found


def _is_findings(heading: str) -> bool:
    """Whether a heading is that of the findings."""
    names = re.split(r"[ /,]+", heading)
    others = ("ADDITIONAL", "INCIDENTAL", "OTHER")
    return names[0] == "FINDINGS" or (names[-1] == "FINDINGS" and names[0] not in others)


MIMIC_SPLITS = ("mimic-cxr-2.0.0-split.csv", "mimic-cxr-2.0.0-split.csv.gz")
LAYOUTS: dict[str, dict[str, Callable[[Path], Questions]]] = {
    "folder": {},
    "vqa-rad": {"VQA_RAD Dataset Public.json": _read_vqa_rad},
    "slake": dict.fromkeys(("train.json", "test.json"), _read_slake),
    "iu-xray": {"annotation.json": _read_iu_xray},
    "mimic-cxr": {"annotation.json": _read_mimic_annotation}
    | dict.fromkeys(MIMIC_SPLITS, _read_mimic_split),
}
