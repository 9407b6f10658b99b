"""What data may not do here: start a program, take the place of a shipped card, or hide whose it
is.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import datasets
import pytest
from PIL import Image

from mmedpo_utils.base import images, settings
from mmedpo_utils.base.cards import load_card
from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.images import open_image
from mmedpo_utils.base.privacy import check_origin, check_outputs
from mmedpo_utils.base.sections import LanguageModel
from mmedpo_utils.convert.layouts import import_hugging_face
from mmedpo_utils.dataset import prepare_dataset
from mmedpo_utils.judges.language_models import build_judges
from mmedpo_utils.preference_rows import pair_row, read_manifest, read_questions
from mmedpo_utils.profiles import load_profile

from .conftest import REPOSITORY

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """A program called gs, found first, that leaves a mark."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None, raising=False)
    return tmp_path / "ran"


def test_an_eps_named_png_starts_no_program(tmp_path, ghostscript):
    film = tmp_path / "a.png"
    film.write_bytes(EPS)
    with pytest.raises(InputError, match="a.png: cannot be opened as an image"):
        open_image(film)
    question = {
        "question_id": 1,
        "image": "a.png",
        "text": "Is it?\n<image>",
        "gpt4_answer": "yes",
        "answer_type": "CLOSED",
    }
    (tmp_path / "pairs.json").write_text(json.dumps([pair_row(question, "no", 0.5)]))
    with pytest.raises(InputError, match="`image`"):
        read_manifest(tmp_path / "pairs.json", tmp_path)
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": EPS, "path": None}], "question": ["Is it?"], "answer": ["no"]}
    )
    with pytest.raises(InputError, match="`image`"):
        import_hugging_face(datasets.DatasetDict({"train": table}), tmp_path / "out", "vqa-rad")
    assert not ghostscript.exists()
    with Image.open(film) as opened:  # the mark would have been left
        with pytest.raises(OSError):
            opened.load()
    assert ghostscript.exists(), "without the list of formats Pillow starts it"


def test_every_image_is_opened_by_the_list_of_formats():
    for file in (REPOSITORY / "mmedpo_utils").rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert "Image.open(" not in line or "formats=" in line, f"{file.name}: {line}"


def png_with(kind: bytes, content: bytes) -> bytes:
    """A PNG of one pixel with a chunk of its own."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(kind, content)
        + chunk(b"IDAT", zlib.compress(b"\0\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "content",
    [
        png_with(b"eXIf", b"II*\0\xff\xff\xff\xff"),
        png_with(b"iCCP", b"x\0\0broken"),
        png_with(b"IDAT", b"no zlib"),
        b"\xff\xd8\xff\xe1\x00\x10Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff\0\0",
        b"GIF89a",
        b"RIFF\0\0\0\0WEBPVP8 ",
    ],
    ids=["EXIF", "ICC profile", "no zlib", "JPEG", "TIFF", "GIF", "WEBP"],
)
def test_whatever_a_decoder_raises_is_one_error(tmp_path, content):
    (tmp_path / "film.png").write_bytes(content)
    try:
        open_image(tmp_path / "film.png")
    except InputError as error:
        assert "\n" not in str(error) and "fetch it again, or remove its row" in str(error)


@pytest.mark.parametrize("name", ["mimic-cxr", "slake"])
def test_a_file_in_the_working_folder_is_no_card(tmp_path, monkeypatch, name):
    """The privacy gate reads the shipped card's terms, whatever is called like it here."""
    shipped = load_card(name)
    text = (REPOSITORY / "data_manifests" / f"{name}.yaml").read_text()
    (tmp_path / name).write_text(
        text.replace("credentialed: true", "credentialed: false").replace("title:", "title: false")
    )
    (tmp_path / "phantom").write_text("name: phantom\n")
    monkeypatch.chdir(tmp_path)
    assert load_card(name) == shipped
    assert (
        load_profile("phantom").name
        == load_profile("phantom-smoke").name.removesuffix("-smoke")
        == "phantom"
    )
    (tmp_path / "own").mkdir()
    shutil.copy(REPOSITORY / "data_manifests" / f"{name}.yaml", tmp_path / "own")
    assert load_card(f"./own/{name}.yaml") == shipped, "a path is read as one"


def test_a_folder_called_phantom_is_no_model(tmp_path, monkeypatch):
    (tmp_path / "phantom").mkdir()
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(settings, "repository_root", lambda: tmp_path)
    profile = load_profile("phantom-smoke", {"visual_tool.checkpoint": "own"})
    assert profile.lvlm.model == "phantom" and profile.visual_tool.checkpoint == str(
        tmp_path / "own"
    )


def mimic_pairs(root: Path) -> Path:
    """A preference file whose rows name MIMIC-CXR's images, in a folder that says nothing of it."""
    name = "p10/p10000032/s50414267/film.jpg"
    (root / "images" / name).parent.mkdir(parents=True)
    Image.new("L", (16, 16), 90).save(root / "images" / name)
    Image.new("L", (16, 16), 90).save(root / "images" / "free.jpg")
    question = {
        "question_id": 1,
        "image": name,
        "text": "Describe it.\n<image>",
        "gpt4_answer": "Clear.",
        "answer_type": "REPORT",
    }
    (root / "train_preferences.json").write_text(
        json.dumps([pair_row(question, "An effusion.", 0.5)])
    )
    (root / "test_questions.jsonl").write_text(json.dumps(question | {"image": "free.jpg"}) + "\n")
    return root


def test_mimics_preference_file_puts_the_privacy_gate_on(tmp_path):
    root = mimic_pairs(tmp_path / "data")
    values = {
        "data.root": str(root),
        "output": str(tmp_path / "run"),
        "figures": str(tmp_path / "run" / "figures"),
    }
    with pytest.raises(
        InputError,
        match=r"train_preferences\.json: its images are named like MIMIC-CXR's.*`card: mimic-cxr`",
    ):
        prepare_dataset(load_profile("vqa-rad-mini", values))
    rows = [
        json.loads((root / "test_questions.jsonl").read_text())
        | {"image": "files/p19/p19999999/s59999999/a.jpg"}
    ]
    (root / "images" / "files/p19/p19999999/s59999999").mkdir(parents=True)
    shutil.copy(
        root / "images" / "free.jpg", root / "images" / "files/p19/p19999999/s59999999/a.jpg"
    )
    (root / "test_questions.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(InputError, match="split test: its images are named like MIMIC-CXR's"):
        prepare_dataset(load_profile("vqa-rad-mini", values))
    remote = {
        "backend": "openai",
        "model": "m",
        "base_url": "https://judge.example/v1",
        "api_key_env": None,
        "quantization": "none",
        "input_price": 0.0,
        "output_price": 0.0,
    }
    profile = load_profile(
        "vqa-rad-mini",
        values
        | {
            "data.card": "mimic-cxr",
            "judge.backend": "models",
            "judge.judge": remote,
            "judge.panel": {"a": remote},
        },
    )
    dataset = prepare_dataset(profile)
    assert len(dataset.questions["test"]) == 1 and isinstance(profile.judge.judge, LanguageModel)
    with pytest.raises(InputError, match="credentialed data.*nothing was sent"):
        build_judges(profile, load_card(profile.data.card))
    with pytest.raises(InputError, match="its figures stay in the run folder"):
        check_outputs(
            load_card("mimic-cxr"), tmp_path / "run", tmp_path / "figures", in_place=False
        )


IMAGE = "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.jpg"


@pytest.mark.parametrize(
    "name",
    [
        f"p10/p10000032/s50414267/{IMAGE}",
        f"mimic\\p10\\p10000032\\s50414267\\{IMAGE}",
        f"p10_p10000032_s50414267_{IMAGE}",
        IMAGE,
    ],
)
def test_mimics_images_are_known_however_they_are_laid_out(name):
    with pytest.raises(InputError, match="named like MIMIC-CXR's"):
        check_origin(load_card("slake"), ["free.jpg", name], "file")


def test_no_message_shows_a_word_of_mimics_rows(tmp_path):
    """Whoever audits a preference file sees counts; a warning is kept with a notebook's output."""
    image, words = "p10/p10000032/s50414267/film.jpg", "THE HEART IS ENLARGED"
    question = {
        "question_id": "known-only-here",
        "image": image,
        "text": "Describe it.\n<image>",
        "gpt4_answer": words,
        "answer_type": "REPORT",
    }
    good, same = pair_row(question, "An effusion.", 0.5), pair_row(question, words, 0.5)
    bad = pair_row(question, "No.", 0.5)
    bad["conversations"][1] = {"from": "human", "value": words}
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([good, same, bad]))
    with pytest.warns(UserWarning) as said:
        assert len(read_manifest(path)) == 2
    texts = [str(warning.message) for warning in said]
    path.write_text(json.dumps([bad]))
    with pytest.raises(InputError) as refused:
        read_manifest(path)
    texts.append(str(refused.value))
    lines = json.dumps(question) + "\n" + json.dumps(question | {"answer_type": words})
    (tmp_path / "questions.jsonl").write_text(lines)
    with pytest.warns(UserWarning) as said:
        read_questions(tmp_path / "questions.jsonl")
    texts.append(str(said[0].message))
    assert len(texts) == 4
    assert not any(secret in text for text in texts for secret in (words, "known-only-here"))
    assert "row 2: `conversations`" in texts[0] and "row 1: `answer_type`" in texts[3]


def test_other_data_sets_images_are_not_taken_for_mimics():
    names = [
        "p10/film.jpg",
        "xmlab10/source.jpg",
        "CXR1_IM-0001/0.png",
        "p10000032/s50414267/a.jpg",
        "p1/p10000032/s5/a.jpg",
    ]
    check_origin(load_card("slake"), names, "file")
    check_origin(load_card("mimic-cxr"), ["p10/p10000032/s50414267/a.jpg"], "file")


def test_a_picture_of_pillow_that_is_on_no_list_is_refused(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png", format="PCX")
    with pytest.raises(InputError, match="PNG, JPEG, TIFF"):
        open_image(tmp_path / "a.png")
    for kind in images.IMAGE_FORMATS:
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "b.png", format=kind)
        assert open_image(tmp_path / "b.png").size == (8, 8)
