"""The data sets' own folder layouts, read into questions in the format of
``preference_rows.read_questions``.

A report is a question too: ``REPORT_QUESTION``, answered by the report. Where a layout names no
patient, none is made up; the image's name is then taken for the patient (``rows.patient_of``). A
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
    corrected_question,
    corrected_text,
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
HUGGING_FACE_COLUMNS = ("image", "question", "answer")


def read_layout(name: str, root: str | os.PathLike, images: bool = True) -> Questions:
    """Read a data set from its own folder layout.

    Args:
        name: a name of ``LAYOUTS``: vqa-rad, slake, iu-xray or mimic-cxr, as they are published, or
            folder (one ``<split>_questions.jsonl`` per split, images in images/).
            ``import_hugging_face`` leaves question files too: they are read where the published
            files are not there.
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
    root = Path(root)
    published = [file for file in LAYOUTS[name] if (root / file).is_file()]
    if published:
        read = LAYOUTS[name][published[0]]
        questions = read(root)
    else:
        questions = {}
        for split in SPLITS:
            path = root / f"{split}_questions.jsonl"
            if path.is_file():
                questions[split] = read_questions(path)
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
    root = Path(root)
    folder = root / IMAGE_FOLDERS[name]
    questions: Questions = {}
    for split, table in _hugging_face_splits(source).items():
        known = _split_name(split, name)
        inside = Path(source) if isinstance(source, str | os.PathLike) else None
        rows = _import_split(f"{name}, split {split}", split, table, folder, inside)
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
    source: str, split: str, table: Iterable[dict[str, Any]], folder: Path, inside: Path | None
) -> list[Row]:
    """The questions of one split; their images are written into ``folder``.

    Args:
        source: what the split is called in messages.
        inside: where images that the table only names must lie; None: the reader's own table.
    """
    rows = []
    written: set[str] = set()
    left_out = Unusable(source)
    names = {"text": "question", "gpt4_answer": "answer"}
    for number, item in enumerate(table):
        where = f"{source}: row {number}"
        if not _is_english(item.get("q_lang")):
            continue
        try:
            check_fields(item, where, ("question", "answer", "image"))
            row = _row(
                where,
                names,
                number=item.get("qid", f"{split}-{number}"),
                image="not stored yet",
                question=item["question"],
                answer=item["answer"],
                answer_type=item.get("answer_type"),
                question_type=item.get("content_type"),
            )
            # Last: of a row that cannot be used no image is left.
            row["image"] = _store_image(item["image"], folder, where, written, inside)
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
        source = _open_hugging_face(Path(source))
    splits = source
    if isinstance(source, datasets.Dataset):
        splits = {str(source.split or "train"): source}
    if not isinstance(splits, dict) or not all(
        isinstance(table, datasets.Dataset) for table in splits.values()
    ):
        raise InputError(
            "Hugging Face data set: expected a Dataset, a DatasetDict or a folder, found "
            f"{type(source).__name__}"
        )
    undecoded: dict[str, Iterable[dict[str, Any]]] = {}
    for split, table in splits.items():
        missing = [name for name in HUGGING_FACE_COLUMNS if name not in table.column_names]
        if missing:
            raise InputError(
                f"Hugging Face data set, split {split}: no column {', '.join(missing)} among "
                f"{', '.join(table.column_names)}; where it holds img_name instead of image, "
                "unpack its imgs.zip and read the folder with read_layout"
            )
        undecoded[split] = table.cast_column("image", datasets.Image(decode=False))
    return undecoded


def _open_hugging_face(folder: Path) -> Any:
    """What a folder holds: saved by ``save_to_disk``, or a copy of a Hub repository."""
    import datasets

    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; download the Hugging Face data set first, and give its "
            "folder"
        )
    # `save_to_disk` leaves one of these.
    saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{folder}: cannot be read as a Hugging Face data set ({first_line(error)}); give "
            "a folder that save_to_disk wrote, or a copy of the Hub repository"
        ) from error


def _store_image(
    value: dict[str, Any], folder: Path, where: str, written: set[str], inside: Path | None
) -> str:
    """Write an undecoded image {bytes, path} once; its file name."""
    if not value["bytes"] and inside is not None:
        named = Path(value["path"] or "").resolve()
        if not named.is_relative_to(inside.resolve()):
            raise InputError(
                f"{where}: `image`: names a file outside {inside}; fetch the data set again, with "
                "its images"
            )
    try:
        content = value["bytes"] or Path(value["path"]).read_bytes()
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            image.load()
            kind = str(image.format)
    except Exception as error:  # decoders of damaged files raise whatever they meet
        reason = first_line(error)
        raise InputError(
            f"{where}: `image`: cannot be opened as an image ({reason}); fetch the data set again"
        ) from error
    suffix = "jpg" if kind == "JPEG" else kind.lower()
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"
    if name not in written:
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)
        written.add(name)
    return name


def _row(
    where: str,
    names: dict[str, str],
    *,
    number: Any,
    image: Any,
    question: Any,
    answer: Any,
    answer_type: Any = None,
    question_type: Any = None,
    **optional: Any,
) -> Row:
    """One checked question, corrected as `rows.corrected_question` does; yes and no are
    CLOSED where the type is not said.

    Args:
        names: what the file calls ``text``, ``gpt4_answer``, ``image`` and ``answer_type``, for the
            errors.
        number: the question's id.
    """
    answer = corrected_text(answer)
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
    row = corrected_question(row)
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
        left_out: counts the latter.
        within: where in the file the list is, for the errors.
    """
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else type(entries).__name__
        raise InputError(
            f"{path}: expected a non-empty list of entries with {', '.join(keys)}, found {found}; "
            "fetch the file again"
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
                split, row = built
                questions.setdefault(split, []).append(row)


def _count(questions: Questions) -> int:
    return sum(map(len, questions.values()))


def _read_vqa_rad(root: Path) -> Questions:
    """The list on OSF: test rows are those whose phrase_type begins with "test"."""
    path = root / "VQA_RAD Dataset Public.json"
    questions: Questions = {"train": [], "test": []}
    keys = ("qid", "image_name", "question", "answer", "answer_type", "phrase_type")
    names = {"text": "question", "gpt4_answer": "answer", "image": "image_name"}

    def build(where: str, entry: dict[str, Any]) -> tuple[str, Row]:
        is_test = str(entry["phrase_type"]).strip().startswith("test")
        row = _row(
            where,
            names,
            number=entry["qid"],
            image=entry["image_name"],
            question=entry["question"],
            answer=entry["answer"],
            answer_type=entry["answer_type"],
            question_type=entry.get("question_type"),
        )
        return "test" if is_test else "train", row

    left_out = Unusable(path)
    entries = load_json(path, "the list of questions from OSF")
    _usable(path, entries, keys, build, left_out, questions)
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
    for file in ("train", "validate", "validation", "test"):
        path = root / f"{file}.json"
        if not path.is_file():
            continue
        split = OTHER_NAMES.get(file, file)

        # The split is bound as a default: a closure would see the last one of the loop.
        def build(where: str, entry: dict[str, Any], split: str = split) -> tuple[str, Row] | None:
            if not _is_english(entry["q_lang"]):
                return None
            row = _row(
                where,
                names,
                number=entry["qid"],
                image=entry["img_name"],
                question=entry["question"],
                answer=entry["answer"],
                answer_type=entry["answer_type"],
                question_type=entry.get("content_type"),
            )
            return split, row

        left_out = Unusable(path)
        read: Questions = {}
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
    splits = load_json(path, "an object with train, val and test")
    questions: Questions = {}
    if not isinstance(splits, dict) or not splits:
        raise InputError(
            f"{path}: expected an object with train, val and test, found {type(splits).__name__}"
        )
    left_out = Unusable(path)
    for split, entries in splits.items():
        known = _split_name(split, str(path))

        # The split is bound as a default: a closure would see the last one of the loop.
        def build(where: str, entry: dict[str, Any], known: str = known) -> tuple[str, Row]:
            images = entry["image_path"]
            if not isinstance(images, list) or not images:
                raise InputError(
                    f"{where}: `image_path`: expected a list of one image or more, found "
                    f"{images!r:.80}"
                )
            row = _row(
                where,
                {"gpt4_answer": "report", "image": "image_path"},
                number=entry["id"],
                image=images[0],
                question=REPORT_QUESTION,
                answer=entry["report"],
                answer_type="REPORT",
                question_type="report",
                patient_id=patient(entry),
            )
            return known, row

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
    left_out = Unusable(path)
    images = 0
    without = 0
    last_study = ""
    report = ""
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8", newline="") as stream:
            for number, entry in enumerate(csv.DictReader(stream)):
                images += 1
                where = place(path, number, entry, "dicom_id")
                try:
                    study = _mimic_study(entry, where)
                    # A study's images follow one another: its report is read once.
                    if study != last_study:
                        report = _mimic_report(root / "files", study)
                        last_study = study
                    if not report:
                        without += 1
                        continue
                    split = _split_name(entry["split"], where)
                    row = _mimic_row(entry, where, study, report)
                except InputError as error:
                    left_out.note(error)
                else:
                    questions.setdefault(split, []).append(row)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise InputError(
            f"{path}: cannot be read as a CSV table ({first_line(error)}); fetch the file again"
        ) from error
    left_out.tell(_count(questions))
    if without:
        warnings.warn(
            f"{path.name}: {without} of {images} images left out: no report file with a "
            "FINDINGS section",
            stacklevel=3,
        )
    return questions


def _mimic_row(entry: dict[str, Any], where: str, study: str, report: str) -> Row:
    """The question for one image of the official split; ``study`` is its folder under files/."""
    return _row(
        where,
        {},
        number=entry["dicom_id"],
        image=f"{study}/{entry['dicom_id']}.jpg",
        question=REPORT_QUESTION,
        answer=report,
        answer_type="REPORT",
        question_type="report",
        patient_id=entry["subject_id"],
    )


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
    found = ""
    section: list[str] | None = None  # the lines of the section that is being read
    of_views = False  # whether it has begun with headings of views
    # The last line ends a section that the file leaves open.
    for line in [*read_text(path).splitlines(), "____"]:
        heading = _heading(line)
        between = BETWEEN_READINGS.match(line.strip())
        views = heading and VIEWS.search(heading) and not SECTIONS.match(heading)
        if section is not None:
            if views and (of_views or not "".join(section).strip()):
                of_views = True
            elif heading or between:
                text = " ".join(" ".join(section).split())
                found = text or found
                section = None
        # Not an else: the heading that ends a section may begin another one.
        if section is not None:
            section.append(line)
        elif _is_findings(heading):
            section = [line.partition(":")[2]]
            of_views = False
    return found


def _is_findings(heading: str) -> bool:
    """Whether a heading is that of the findings."""
    names = re.split(r"[ /,]+", heading)
    others = ("ADDITIONAL", "INCIDENTAL", "OTHER")
    return names[0] == "FINDINGS" or (names[-1] == "FINDINGS" and names[0] not in others)


MIMIC_SPLITS = ("mimic-cxr-2.0.0-split.csv", "mimic-cxr-2.0.0-split.csv.gz")
# Per layout the files by which it is known, each with what reads the folder then. The first file
# that is there decides.
LAYOUTS: dict[str, dict[str, Callable[[Path], Questions]]] = {
    "folder": {},
    "vqa-rad": {"VQA_RAD Dataset Public.json": _read_vqa_rad},
    "slake": {"train.json": _read_slake, "test.json": _read_slake},
    "iu-xray": {"annotation.json": _read_iu_xray},
    "mimic-cxr": {
        "annotation.json": _read_mimic_annotation,
        MIMIC_SPLITS[0]: _read_mimic_split,
        MIMIC_SPLITS[1]: _read_mimic_split,
    },
}
