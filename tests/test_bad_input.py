"""Bad input of every kind that a reader can give, in one table: each is told of once and clearly,
and writes nothing.

A case is a name, what it does in a folder of good things (``workspace``), and words that its
message must hold: the file or object, the place in it, and what to do. The message is an
InputError; of a row beside a good one it is a warning, and the good one is read.
"""

from __future__ import annotations

import gzip
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from mmedpo_utils import lvlm, medklip
from mmedpo_utils.base import cards
from mmedpo_utils.base.cards import load_card
from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.files import write_json
from mmedpo_utils.base.sections import IMAGE_FOLDERS
from mmedpo_utils.convert.layouts import import_hugging_face, read_layout
from mmedpo_utils.evaluate import read_predictions
from mmedpo_utils.lvlm import load_lvlm
from mmedpo_utils.medklip import load_medklip
from mmedpo_utils.noise import lesion_mask, localized_noise
from mmedpo_utils.phantom.texts import read_masks
from mmedpo_utils.preference_rows import pair_row, read_manifest, read_questions, write_manifest
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.relevance import normalise

QUESTION = {
    "question_id": "q1",
    "image": "a.png",
    "text": "Is there a nodule?\n<image>",
    "gpt4_answer": "yes",
    "answer_type": "CLOSED",
}
PREDICTION = {
    "question_id": "q1",
    "image": "a.png",
    "answer_type": "CLOSED",
    "answer": "yes",
    "prediction": "no",
}
HUMAN = {"from": "human", "value": "<image>\nIs there a nodule?"}
GPT = {"from": "gpt", "value": "yes"}
GONE = object()
DEEP = "[" * 20_000
HUGE = "9" * 5_000


class Case(NamedTuple):
    """``act`` prepares bad input in the workspace and returns what must raise; ``words`` must be in
    the message.

    ``left_out``: the bad thing is one of two rows, and the other is returned.
    """

    name: str
    act: Callable[[Path], Callable[[], Any]]
    words: tuple[str, ...]
    left_out: bool = False


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder of images, good and bad."""
    images = tmp_path / "images"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for name in ("images/a.png", "images/b.jpg", "outside.png"):
        Image.fromarray(noise).save(tmp_path / name)
    for name in ("a.png", "b.jpg"):
        (images / f"short_{name}").write_bytes((images / name).read_bytes()[:900])
    (images / "text.png").write_text("not an image", encoding="utf-8")
    (images / "empty.png").write_bytes(b"")
    (images / "link.png").symlink_to(tmp_path / "outside.png")
    return tmp_path


def changed(value: Any, path: tuple, new: Any) -> Any:
    """A copy of ``value`` with another value, or none (GONE), at one place."""
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


def put(path: Path, content: Any) -> Path:
    """Write bytes, text, or a value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode(
            "utf-8", "surrogatepass"
        )
    )
    return path


def pair(*path: Any, new: Any) -> dict[str, Any]:
    return changed(pair_row(QUESTION, "no", 0.5), path, new)


def manifest(name: str, row: Any, *words: str) -> Case:
    def act(folder: Path) -> Callable[[], Any]:
        file = put(folder / "pairs.json", [pair_row(QUESTION, "no", 0.5), row])
        return lambda: read_manifest(file, folder / "images", folder / "images")

    identity = f"(id {row.get('id')!r})" if isinstance(row, dict) else "row 1"
    return Case(
        f"manifest: {name}",
        act,
        ("pairs.json: 1 of 2 rows left out", "pairs.json: row 1", identity, *words),
        True,
    )


def file_case(name: str, file: str, content: Any, read: Callable[[Path], Any], *words: str) -> Case:
    """One file of the workspace with bad content; None: the file is not there."""

    def act(folder: Path) -> Callable[[], Any]:
        if content is not None:
            put(folder / file, content)
        return lambda: read(folder / file)

    return Case(f"{file}: {name}", act, (Path(file).name, *words))


def question(name: str, new: dict[str, Any], *words: str) -> Case:
    content = f"{json.dumps(QUESTION)}\n\n{json.dumps(QUESTION | new)}\n"
    case = file_case(
        name,
        "questions.jsonl",
        content,
        lambda path: read_questions(path, path.parent / "images"),
        "questions.jsonl: 1 of 2 rows left out",
        "row 2 (question_id 'q1')",
        *words,
    )
    return case._replace(left_out=True)


def profile(name: str, key: str, value: Any, *words: str) -> Case:
    return Case(
        f"profile: {name}",
        lambda _: lambda: load_profile("phantom-smoke", {key: value}),
        ("phantom-smoke.yaml", key, *words),
    )


def card(name: str, path: tuple, new: Any, *words: str) -> Case:
    values = yaml.safe_load((cards.card_folder() / "slake.yaml").read_text(encoding="utf-8"))
    return file_case(
        name, "slake.yaml", yaml.safe_dump(changed(values, path, new)), load_card, *words
    )


def prediction(name: str, line: str, *words: str) -> Case:
    return file_case(
        name,
        "predictions.jsonl",
        f"{json.dumps(PREDICTION)}\n{line}\n",
        read_predictions,
        "line 2",
        *words,
    )


def layout(name: str, data_set: str, file: str, content: Any, *words: str) -> Case:
    return file_case(
        f"{data_set}: {name}",
        f"data/{file}",
        content,
        lambda path: read_layout(data_set, path.parent),
        *words,
    )


def call(name: str, function: Callable[[], Any], *words: str) -> Case:
    return Case(name, lambda _: function, words)


def checkpoint(
    name: str, load: Callable[[Path], Any], source: Path, file: str, content: Any, *words: str
) -> Case:
    """A copy of a shipped model with one file replaced, or gone (None)."""

    def act(folder: Path) -> Callable[[], Any]:
        shutil.copytree(source, folder / "model")
        if content is None:
            (folder / "model" / file).unlink()
        else:
            put(folder / "model" / file, content)
        return lambda: load(folder / "model")

    return Case(name, act, ("model", *words))


def adapter(name: str, files: dict[str, Any], *words: str) -> Case:
    def act(folder: Path) -> Callable[[], Any]:
        for file, content in files.items():
            put(folder / "adapter" / file, content)
        return lambda: load_lvlm("phantom", "cpu", folder / "adapter")

    return Case(f"adapter: {name}", act, ("adapter", *words))


LORA = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "task_type": None,
}
ENTRY = {
    "qid": 7,
    "image_name": "a.png",
    "question": "Is it?",
    "answer": "yes",
    "answer_type": "CLOSED",
    "phrase_type": "para",
}
SLAKE = {
    "qid": 7,
    "img_name": "a.png",
    "question": "Is there?",
    "answer": "yes",
    "answer_type": "CLOSED",
    "q_lang": "en",
}
STUDY = {"id": "CXR1_IM-1", "report": "Clear.", "image_path": ["a.png"]}
SCORE = "`weighted_score`: expected a number from 0 to 1"
OSF, CSV = "VQA_RAD Dataset Public.json", "mimic-cxr-2.0.0-split.csv"

BAD_PAIRS = [
    *[
        manifest(f"no {key}", pair(key, new=GONE), f"`{key}` is missing; every row needs")
        for key in ("id", "image", "conversations", "rejected_conversations")
    ],
    manifest(
        "several turns",
        pair("conversations", new=[HUMAN, GPT, {"from": "human", "value": "Where?"}, GPT]),
        "`conversations`: has 4 turns",
        "expected one question and one answer",
    ),
    manifest(
        "a question without words",
        pair("conversations", 0, "value", new="<image>"),
        "turn 0: asks nothing",
    ),
    manifest(
        "a noised side without an image",
        pair("rejected_noised", new=1),
        "`rejected_noised` is 1",
        "`rejected_image`",
    ),
    manifest("not an object", 1, "expected an object with id, image"),
    manifest("image null", pair("image", new=None), "`image` is missing"),
    manifest("image blank", pair("image", new="  "), "`image`: expected a non-empty text"),
    manifest("image a list", pair("image", new=["a.png"]), "`image`: expected a non-empty text"),
    manifest("id true", pair("id", new=True), "`id`: expected a text or a whole number"),
    manifest(
        "rejected image blank",
        pair("rejected_image", new=""),
        "`rejected_image`: expected a non-empty text",
    ),
    manifest(
        "one turn",
        pair("conversations", new=[HUMAN]),
        "`conversations`: expected an even number of turns",
    ),
    manifest("no turn", pair("conversations", new=[]), "expected an even number of turns"),
    manifest("turns a text", pair("conversations", new="yes"), "even number of turns", "found str"),
    manifest(
        "two human turns",
        pair("rejected_conversations", new=[HUMAN, HUMAN]),
        "turn 1: expected {from: gpt",
    ),
    manifest(
        "answer null",
        pair("conversations", 1, "value", new=None),
        "`conversations`: turn 1: expected {from: gpt",
    ),
    manifest(
        "answer blank",
        pair("rejected_conversations", 1, "value", new=" "),
        "turn 1: expected {from: gpt",
    ),
    manifest(
        "half a character",
        pair("conversations", 1, "value", new="yes \ud800"),
        "turn 1: expected {from: gpt",
    ),
    manifest(
        "two marks",
        pair("conversations", 0, "value", new="<image> <image> Is there?"),
        "one <image> mark",
        "found 2",
    ),
    manifest(
        "mark in the answer",
        pair("conversations", 1, "value", new="yes <image>"),
        "in the first turn, found 2",
    ),
    manifest(
        "another question",
        pair("rejected_conversations", 0, "value", new="<image>\nIs it?"),
        "asks another question",
    ),
    *[
        manifest(f"weight {value!r:.9}", pair("weighted_score", new=value), SCORE)
        for value in ("0.5", True, -0.1, 1.01, float("nan"), float("inf"), [0.5], 10**400)
    ],
]
BAD_IMAGES = [
    manifest(f"{key} {label}", pair(key, new=name), f"`{key}`", words, remedy)
    for key in ("image", "rejected_image")
    for label, name, words, remedy in [
        ("missing", "none.png", "is missing in", "put the file there, or correct the name"),
        ("a folder", ".", "is missing in", "put the file there"),
        ("short PNG", "short_a.png", "truncated", "fetch it again, or remove its row"),
        ("short JPEG", "short_b.jpg", "truncated", "fetch it again, or remove its row"),
        ("not an image", "text.png", "not an image", "fetch it again"),
        ("empty", "empty.png", "not an image", "fetch it again"),
        (
            "above the root",
            "../outside.png",
            "outside the image folder",
            "give a path relative to that folder",
        ),
        ("absolute", "/etc/hostname", "outside the image folder", "give a path relative"),
        ("a link out", "link.png", "is a link that leads outside the image folder", "cp -rL"),
        ("a zero byte", "a\0.png", "is not a usable file name", "correct the name"),
        ("too long", "x" * 5000, "is not a usable file name", "correct the name"),
    ]
]
BAD_FILES = [
    file_case(name, "pairs.json", content, read_manifest, words, remedy)
    for name, content, words, remedy in [
        ("half an object", "{", "is not JSON", "expected a list of preference pairs"),
        ("nothing in it", "", "is not JSON", "expected a list"),
        ("too deep", DEEP, "is not JSON", "expected a list"),
        ("a huge number", f"[{HUGE}]", "is not JSON", "expected a list"),
        ("not UTF-8", b"\xff\xfe\x00", "cannot be read as UTF-8", "save the file as UTF-8"),
        ("absent", None, "cannot be read", "check the path"),
        ("an empty list", "[]", "an empty list", "expected a non-empty list"),
        ("an object", "{}", "found dict", "expected a non-empty list"),
        ("null", "null", "NoneType", "expected a non-empty list"),
    ]
]
BAD_QUESTIONS = [
    question(
        "two marks", {"text": "<image> <image> Is there?"}, "`text`: expected one <image> mark"
    ),
    question("only the mark", {"text": "<image>"}, "`text`: asks nothing"),
    question("mark in the answer", {"gpt4_answer": "yes <image>"}, "`gpt4_answer`: holds the mark"),
    *[
        question(
            f"answer {value!r}", {"gpt4_answer": value}, "`gpt4_answer`: expected a non-empty text"
        )
        for value in (True, float("nan"), ["yes"], " ")
    ],
    file_case(
        "key twice",
        "questions.jsonl",
        f'{json.dumps(QUESTION)}\n{json.dumps(QUESTION)[:-1]}, "image": "b.jpg"}}\n',
        read_questions,
        "1 of 2 rows left out",
        "`image` is written twice",
        "take out the wrong one",
    )._replace(left_out=True),
    question(
        "odd answer type",
        {"answer_type": "MAYBE"},
        "`answer_type`: expected one of CLOSED, OPEN, REPORT",
    ),
    question(
        "answer type a list", {"answer_type": ["OPEN"]}, "`answer_type`: expected one of CLOSED"
    ),
    question("no answer", {"gpt4_answer": None}, "`gpt4_answer` is missing; every row needs"),
    question("image blank", {"image": ""}, "`image`: expected a non-empty text"),
    question("image missing", {"image": "none.png"}, "`image`", "put the file there"),
    *[
        file_case(name, "questions.jsonl", content, read_questions, *words)
        for name, content, words in [
            ("nothing in it", "", ("holds no question", "expected one JSON object per line")),
            ("half an object", "{", ("row 0", "expected one question per line")),
            ("a list", "[]", ("row 0", "expected an object")),
            ("too deep", DEEP, ("row 0", "is not JSON", "one question per line")),
            ("a huge number", HUGE, ("row 0", "is not JSON", "one question per line")),
            ("absent", None, ("check the path",)),
        ]
    ],
]
BAD_PROFILES = [
    profile(
        "misspelt key",
        "training.learning_rat",
        1e-5,
        "unknown key",
        "the nearest valid one is `learning_rate`",
    ),
    profile("misspelt section", "nois", {}, "unknown key `nois`", "`noise`"),
    profile("negative rate", "training.learning_rate", -1e-5, "expected a value from 0", "-1e-05"),
    profile(
        "rate in words", "training.learning_rate", "fast", "expected a finite number", "'fast'"
    ),
    profile("rate NaN", "training.learning_rate", float("nan"), "expected a finite number"),
    profile("rate beyond floats", "training.learning_rate", 10**400, "expected a finite number"),
    profile("half a step", "training.max_steps", 1.5, "expected a whole number"),
    profile("steps true", "training.max_steps", True, "expected a whole number"),
    profile(
        "misspelt source of pairs",
        "training.variants.mmedpo.sources",
        ["text", "visuel"],
        "`visual`",
    ),
    profile(
        "no source of pairs",
        "training.variants.mmedpo.sources",
        [],
        "expected a list of different values",
    ),
    profile(
        "variant outside its folder", "training.variants", {"../up": {}}, "expected named sections"
    ),
    profile(
        "manifest outside its folder",
        "training.variants.dpo.pairs",
        "../up",
        "expected a name of letters",
        "'../up'",
    ),
    profile("misspelt mask", "noise.mask", "quantil", "the nearest valid one is `quantile`"),
    profile("number for a section", "noise", 3, "section `noise`: expected keys and values"),
    profile("bounds crossed", "relevance.low", 1.5, "expected at most relevance.high"),
    profile("no question", "evaluation.questions", 0, "expected a value from 1"),
    profile("seed twice", "evaluation.seeds", [0, 0], "expected a list of different values"),
    call(
        "profile: no data folder",
        lambda: load_profile("phantom-smoke", {"data.source": "slake", "data.card": "slake"}),
        "phantom-smoke.yaml",
        "`data.root`: expected the data set's folder",
    ),
    profile("another data set's card", "data.card", "vqa-rad", "expected the source's own name"),
    profile("unknown data set", "data.source", "vqarad", "the nearest valid one is `vqa-rad`"),
    profile("data set a list", "data.source", ["slake"], "expected a non-empty text"),
    profile("no patient", "data.train_patients", 0, "expected 1 or more"),
    profile("no name", "name", "", "expected a non-empty text"),
    profile("override too deep", "training.deeper.key", 1, "no section `deeper`"),
    call(
        "profile: unknown name",
        lambda: load_profile("fantom"),
        "profile 'fantom'",
        "the nearest valid one is `phantom`",
    ),
    *[
        file_case(name, "p.yaml", content, load_profile, *words)
        for name, content, words in [
            ("key twice", "seed: 1\nseed: 2\n", ("key `seed` is written twice",)),
            ("half a list", "a: [", ("is not a YAML file",)),
            ("code", "a: !!python/object/apply:os.getcwd []\n", ("is not a YAML file",)),
            ("too deep", DEEP, ("is not a YAML file",)),
            ("a list", "- 1\n", ("expected keys and values",)),
            ("nothing in it", "", ("expected keys and values",)),
            ("absent", None, ("cannot be read", "give a YAML file or a profile's name")),
        ]
    ],
]
BAD_CARDS = [
    card("no licence", ("licence",), GONE, "missing key `licence`"),
    card("misspelt key", ("acces",), "free", "unknown key `acces`", "`access`"),
    card(
        "credentialed in words",
        ("credentialed",),
        "perhaps",
        "`credentialed`",
        "expected true or false",
    ),
    card("another name", ("name",), "slak", "`name`", "expected the file's own name, slake"),
    card(
        "negative count",
        ("splits", "test", "items"),
        -1,
        "`splits.test.items`",
        "expected a value from 0",
    ),
    card("count missing", ("splits", "test", "images"), GONE, "missing key `splits.test.images`"),
    card(
        "short hash",
        ("files", "test.json"),
        "abc",
        "`files.test.json`",
        "64 hexadecimal digits, or null",
    ),
    card("layout a text", ("layout",), "imgs", "`layout`", "expected keys and values"),
    call(
        "card: unknown name",
        lambda: load_card("slack"),
        "dataset card 'slack'",
        "the nearest valid one is `slake`",
    ),
]
BAD_LAYOUTS = [
    layout(
        "half an object",
        "vqa-rad",
        OSF,
        "[{",
        "is not JSON",
        "expected the list of questions from OSF",
    ),
    layout("an object", "vqa-rad", OSF, {}, "expected a non-empty list", "fetch the file again"),
    layout(
        "no image name",
        "vqa-rad",
        OSF,
        [changed(ENTRY, ("image_name",), GONE)],
        "row 0 (qid 7)",
        "`image_name` is missing",
    ),
    layout(
        "odd answer type",
        "vqa-rad",
        OSF,
        [ENTRY | {"answer_type": "HALF"}],
        "row 0 (qid 7)",
        "expected one of CLOSED",
    ),
    layout(
        "answer a list",
        "vqa-rad",
        OSF,
        [ENTRY | {"answer": ["yes"]}],
        "row 0 (qid 7)",
        "expected a non-empty text",
    ),
    layout(
        "question blank",
        "slake",
        "train.json",
        [SLAKE | {"question": " "}],
        "row 0 (qid 7)",
        "expected a non-empty text",
    ),
    layout(
        "no language",
        "slake",
        "test.json",
        [changed(SLAKE, ("q_lang",), GONE)],
        "row 0 (qid 7)",
        "`q_lang` is missing",
    ),
    layout(
        "a list",
        "iu-xray",
        "annotation.json",
        [STUDY],
        "expected an object with train, val and test",
    ),
    layout(
        "no image",
        "iu-xray",
        "annotation.json",
        {"train": [STUDY | {"image_path": []}]},
        "row 0 (id 'CXR1_IM-1'), split train",
        "`image_path`: expected a list of one image or more",
    ),
    layout(
        "unknown split",
        "iu-xray",
        "annotation.json",
        {"tset": [STUDY]},
        "split 'tset'",
        "the nearest valid one is `test`",
    ),
    layout(
        "no patient",
        "mimic-cxr",
        "annotation.json",
        {"test": [STUDY]},
        "row 0 (id 'CXR1_IM-1')",
        "`subject_id` is missing",
    ),
    layout(
        "a column missing",
        "mimic-cxr",
        CSV,
        "dicom_id,study_id,subject_id\na,1,2\n",
        "row 0 (dicom_id 'a')",
        "`split` is missing",
    ),
    layout(
        "a path for a patient",
        "mimic-cxr",
        CSV,
        "dicom_id,study_id,subject_id,split\na,1,../2,test\n",
        "row 0 (dicom_id 'a')",
        "expected numbers",
    ),
    layout(
        "not gzip",
        "mimic-cxr",
        f"{CSV}.gz",
        b"dicom_id",
        "cannot be read as a CSV table",
        "fetch the file again",
    ),
    layout(
        "half a gzip",
        "mimic-cxr",
        f"{CSV}.gz",
        gzip.compress(b"dicom_id,study_id\n")[:-4],
        "fetch the file again",
    ),
    Case(
        "data: empty folder",
        lambda folder: lambda: read_layout("slake", folder),
        ("holds no question of slake", "expected train.json", "how to get the data"),
    ),
    Case(
        "data: Hugging Face copy without images",
        lambda folder: (
            lambda: import_hugging_face(
                datasets.Dataset.from_dict({"question": ["Is it?"], "answer": ["no"]}),
                folder / "out",
                "slake",
            )
        ),
        ("split train", "no column image", "read the folder with read_layout"),
    ),
    Case(
        "data: Hugging Face copy absent",
        lambda folder: lambda: import_hugging_face(folder / "copy", folder / "out", "slake"),
        ("copy", "no such folder", "download the Hugging Face data set first"),
    ),
]
BAD_PREDICTIONS = [
    prediction("half an object", "{", "not a JSON object", "predict again"),
    prediction("a list", "[1]", "not a JSON object", "predict again"),
    prediction("a number", "1", "predict again"),
    prediction("a huge number", HUGE, "predict again"),
    prediction("too deep", DEEP, "predict again"),
    prediction(
        "no answer",
        json.dumps(changed(PREDICTION, ("answer",), GONE)),
        "needs answer",
        "predict again",
    ),
    prediction(
        "prediction a number",
        json.dumps(PREDICTION | {"prediction": 5}),
        "`prediction`",
        "predict again",
    ),
    prediction(
        "odd answer type",
        json.dumps(PREDICTION | {"answer_type": "HALF"}),
        "`answer_type`",
        "predict again",
    ),
    file_case(
        "nothing in it", "predictions.jsonl", "", read_predictions, "line 1", "predict again"
    ),
    file_case("absent", "predictions.jsonl", None, read_predictions, "check the path"),
    file_case(
        "not UTF-8", "predictions.jsonl", b"\xff", read_predictions, "save the file as UTF-8"
    ),
]
FLAT, RNG = np.zeros((4, 4)), np.random.default_rng(0)
BAD_ARRAYS = [
    call(
        "heat map: NaN",
        lambda: lesion_mask(np.full((4, 4), np.nan), (8, 8)),
        "heat map",
        "expected finite values of shape",
    ),
    call(
        "heat map: three axes",
        lambda: lesion_mask(np.zeros((2, 4, 4)), (8, 8)),
        "heat map",
        "found shape [2, 4, 4]",
    ),
    call(
        "heat map: empty",
        lambda: lesion_mask(np.zeros((0, 4)), (8, 8)),
        "heat map",
        "found shape [0, 4]",
    ),
    call(
        "heat map: unknown method",
        lambda: lesion_mask(FLAT, (8, 8), "median"),
        "mask method 'median'",
        "expected one of",
    ),
    call(
        "mask: another size",
        lambda: localized_noise(FLAT, np.zeros((4, 5)), 0.5, RNG),
        "mask",
        "(4, 4), found (4, 5)",
    ),
    call(
        "mask: negative",
        lambda: localized_noise(FLAT, FLAT - 1, 0.5, RNG),
        "mask",
        "expected values from 0 to 1",
    ),
    call(
        "mask: NaN",
        lambda: localized_noise(FLAT, FLAT * np.nan, 0.5, RNG),
        "mask",
        "expected values from 0 to 1",
    ),
    call(
        "noise: image of 8 bits",
        lambda: localized_noise(FLAT + 255, FLAT, 0.5, RNG),
        "image",
        "expected values from 0 to 1",
    ),
    call(
        "noise: signal above 1",
        lambda: localized_noise(FLAT, FLAT, 1.5, RNG),
        "alpha_bar",
        "expected values from 0 to 1",
    ),
    call(
        "weights: no score", lambda: normalise([]), "scores", "expected one finite number or more"
    ),
    call(
        "weights: infinite",
        lambda: normalise([0.5, np.inf]),
        "scores",
        "expected one finite number or more",
    ),
    call(
        "weights: unknown method",
        lambda: normalise([0.5], "soft"),
        "'soft'",
        "expected rescaled, literal, none or uniform",
    ),
    *[
        file_case(
            name, "mask.png", content, read_masks, "cannot be opened as an image", "fetch it again"
        )
        for name, content in [("absent", None), ("not an image", "text")]
    ],
]
MEDKLIP, LVLM = (load_medklip, medklip.PHANTOM_CHECKPOINT), (load_lvlm, lvlm.PHANTOM_WEIGHTS)
LORA_FILE, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SOME_WEIGHTS = save({"base_model.model.query_key_value.lora_A.weight": torch.zeros(4, 4)})
BAD_CHECKPOINTS = [
    checkpoint(
        "MedKLIP: not weights", *MEDKLIP, "model.safetensors", b"x", "expected MedKLIP weights"
    ),
    checkpoint(
        "MedKLIP: no weights", *MEDKLIP, "model.safetensors", None, "model.safetensors", "expected"
    ),
    checkpoint(
        "MedKLIP: half a configuration", *MEDKLIP, "config.json", "{", "config.json", "expected"
    ),
    checkpoint(
        "LVLM: no configuration",
        *LVLM,
        "config.json",
        None,
        "no readable model configuration",
        "expected",
    ),
    checkpoint(
        "LVLM: half a configuration",
        *LVLM,
        "config.json",
        "{",
        "no readable model configuration",
        "expected",
    ),
    checkpoint(
        "LVLM: another architecture",
        *LVLM,
        "config.json",
        {"model_type": "bert"},
        "'bert'",
        "expected 'llava'",
    ),
    checkpoint(
        "LVLM: no weights",
        *LVLM,
        "model.safetensors",
        None,
        "cannot be loaded",
        "the folder needs config.json",
    ),
    checkpoint(
        "LVLM: not weights",
        *LVLM,
        "model.safetensors",
        b"x" * 99,
        "the folder's files hold 99 bytes",
        "fetch the folder again",
    ),
    adapter("absent", {}, LORA_FILE, "no such file", "expected a PEFT adapter folder"),
    adapter(
        "half a configuration",
        {LORA_FILE: "{"},
        LORA_FILE,
        "is not JSON",
        "expected the configuration",
    ),
    adapter(
        "of no known kind",
        {LORA_FILE: {"peft_type": "MAGIC"}},
        LORA_FILE,
        "cannot be read",
        "fetch the adapter again",
    ),
    adapter("no weights", {LORA_FILE: LORA}, f"holds no {LORA_WEIGHTS}", "fetch the adapter again"),
    adapter(
        "not weights",
        {LORA_FILE: LORA, LORA_WEIGHTS: b"x" * 99},
        LORA_WEIGHTS,
        "cannot be read",
        "download it again",
    ),
    adapter(
        "another model's",
        {LORA_FILE: LORA | {"target_modules": ["query_key_value"]}, LORA_WEIGHTS: SOME_WEIGHTS},
        "does not fit phantom",
        "load the model that it was trained on",
    ),
]
UNWRITABLE = [
    file_case(
        "a file in the place of its folder",
        "taken",
        "x",
        lambda path: write_manifest(path / "pairs.json", [pair_row(QUESTION, "no", 0.5)]),
        "pairs.json: cannot be written",
        "choose another folder",
    ),
    Case(
        "write: a folder in the place of the file",
        lambda folder: lambda: write_json(folder / "images", 1),
        ("images", "cannot be written", "choose another"),
    ),
    file_case(
        "no pairs to write",
        "pairs.json",
        None,
        lambda path: write_manifest(path, []),
        "no preference pairs to write",
    ),
]
CASES = [
    *BAD_PAIRS,
    *BAD_IMAGES,
    *BAD_FILES,
    *BAD_QUESTIONS,
    *BAD_PROFILES,
    *BAD_CARDS,
    *BAD_LAYOUTS,
    *BAD_PREDICTIONS,
    *BAD_ARRAYS,
    *BAD_CHECKPOINTS,
    *UNWRITABLE,
]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_gives_one_clear_error_and_leaves_nothing(workspace: Path, case: Case) -> None:
    act = case.act(workspace)
    before = contents(workspace)
    if case.left_out:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert len(act()) == 1, "the good row is read"
        (message,) = [str(warning.message) for warning in said]
    else:
        with pytest.raises(InputError) as caught:
            act()
        message = str(caught.value)
    for word in case.words:
        assert word in message
    assert "\n" not in message and len(message) < 1200, "one message, not a report"
    assert contents(workspace) == before


@pytest.mark.parametrize("case", BAD_PAIRS, ids=[case.name for case in BAD_PAIRS])
def test_a_bad_pair_is_not_written(workspace: Path, case: Case) -> None:
    case.act(workspace)
    rows = json.loads(
        (workspace / "pairs.json").read_text(encoding="utf-8", errors="surrogatepass")
    )
    (workspace / "pairs.json").unlink()
    before = contents(workspace)
    with pytest.raises(InputError, match="out.json: row 1"):
        write_manifest(workspace / "out.json", rows)
    assert contents(workspace) == before


def test_the_good_things_of_the_table_are_read(workspace: Path) -> None:
    """What the cases change is read without a complaint when unchanged."""
    pairs = put(workspace / "pairs.json", [pair_row(QUESTION, "no", 0.5)])
    assert len(read_manifest(pairs, workspace / "images")) == 1
    assert read_questions(put(workspace / "q.jsonl", QUESTION), workspace / "images") == [QUESTION]
    assert read_predictions(put(workspace / "p.jsonl", PREDICTION)) == [PREDICTION]
    for data_set, file, content in [
        ("vqa-rad", OSF, [ENTRY]),
        ("slake", "test.json", [SLAKE]),
        ("iu-xray", "annotation.json", {"test": [STUDY]}),
    ]:
        root = put(workspace / data_set / file, content).parent
        shutil.copytree(workspace / "images", root / IMAGE_FOLDERS[data_set])
        assert sum(len(rows) for rows in read_layout(data_set, root).values()) == 1
