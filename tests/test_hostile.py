"""What a stranger's file, a slip of the pen, or a second process must not do: each kind of fault
that was found once, and has no test elsewhere.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from datasets.arrow_writer import ArrowWriter
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from mmedpo_utils.base.checkpoints import MARKER, newest_checkpoint
from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.files import (
    atomic_write,
    file_sha256,
    read_or_compute,
    remove_temporaries,
    write_json,
)
from mmedpo_utils.base.images import MOST_PIXELS, open_image
from mmedpo_utils.base.locks import lock_file, locked, turn
from mmedpo_utils.base.privacy import check_outputs, private_folder
from mmedpo_utils.base.settings import read_yaml
from mmedpo_utils.base.words import LONGEST_REPORT
from mmedpo_utils.convert.layouts import import_hugging_face, read_layout
from mmedpo_utils.convert.llava_med import read_tensors, weight_files
from mmedpo_utils.lvlm import load_lvlm
from mmedpo_utils.metrics import answer_score
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.programs import run_notebooks
from mmedpo_utils.programs.export import _cell
from mmedpo_utils.run_folder import ADAPTER_FILES, finished_result, prepare_folder, read_events
from mmedpo_utils.scale.journal import Journal
from mmedpo_utils.show import figures

from .conftest import REPOSITORY

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MANY = "".join(f"key{number}: 1\n" for number in range(60_000))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "line 2: `*a` is an alias"),
        ("a: 010\n", "line 1: `010` does not mean in YAML what it looks like"),
        ("a: 1:30\n", "`1:30` does not mean"),
        ("a: 0x1F\n", "`0x1F` does not mean"),
        ("a: -0b11\n", "`-0b11` does not mean"),
    ],
)
def test_yaml_that_reads_otherwise_than_it_looks_is_refused(tmp_path, text, said):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_yaml(file, "a profile")
    assert said in str(caught.value) and str(file) in str(caught.value)


def test_numbers_that_look_like_what_they_mean_are_read(tmp_path):
    numbers = {"a": "0", "b": "-12", "c": "1_000", "d": "3e-5", "e": ".5", "f": "1.", "g": "+0.25"}
    (tmp_path / "a.yaml").write_text("".join(f"{key}: {text}\n" for key, text in numbers.items()))
    found = read_yaml(tmp_path / "a.yaml", "numbers")
    assert found == {key: float(text.replace("_", "")) for key, text in numbers.items()}
    assert isinstance(found["b"], int) and isinstance(found["f"], float)


def test_sixty_thousand_keys_end_in_an_error_at_once(tmp_path):
    (tmp_path / "a.yaml").write_text(MANY + "extends: phantom\n")
    begun = time.monotonic()
    with pytest.raises(InputError, match="unknown key `key0`"):
        load_profile(tmp_path / "a.yaml")
    assert time.monotonic() - begun < 30, "it took minutes: each key was looked for among all"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {variants: {no: {objective: dpo}}}", "write the name False in quotes"),
        ("training: {processes: 5000}", "training.processes"),
        ("training: {lora_rank: 1000000000}", "training.lora_rank"),
        ("evaluation: {batch_size: 99999999999}", "evaluation.batch_size"),
        ("name: ../../../escaped", "key `name`"),
        ('name: "a\\nb"', "key `name`"),
    ],
)
def test_a_profiles_slips_are_refused_before_anything_is_made(tmp_path, text, said):
    (tmp_path / "a.yaml").write_text(f"extends: phantom\n{text}\n")
    with pytest.raises(InputError) as caught:
        load_profile(tmp_path / "a.yaml")
    assert said in str(caught.value)


def test_literal_weights_need_a_variance():
    with pytest.raises(InputError, match=r"`relevance\.variance`: expected a value above 0"):
        variants = yaml.safe_load(Path("mmedpo_utils/profiles/phantom.yaml").read_text())
        mmedpo = variants["training"]["variants"]["mmedpo"] | {"weights": "literal"}
        changes = {"relevance.variance": 0.0, "training.variants": {"mmedpo": mmedpo}}
        load_profile("phantom", changes)


def test_one_variable_moves_what_is_written_and_nothing_else(tmp_path, monkeypatch):
    usual = load_profile("phantom")
    monkeypatch.setenv("MMEDPO_OUTPUT", str(tmp_path))
    moved = load_profile("phantom")
    assert moved.output == tmp_path / "runs" / "phantom"
    assert moved.figures.is_relative_to(tmp_path)
    assert moved.lvlm == usual.lvlm and moved.digest("lvlm", "data") == usual.digest("lvlm", "data")
    moved.save(tmp_path / "profile.yaml")
    assert load_profile(tmp_path / "profile.yaml").output == moved.output, "moved once, not twice"
    monkeypatch.setenv("MMEDPO_OUTPUT", str(REPOSITORY / "runs" / "mine"))
    inside = load_profile("phantom")
    assert inside.output == REPOSITORY / "runs" / "mine" / "runs" / "phantom"
    inside.save(tmp_path / "inside.yaml")
    assert load_profile(tmp_path / "inside.yaml").output == inside.output


def test_the_readers_umask_holds(tmp_path):
    before = os.umask(0o077)
    try:
        write_json(tmp_path / "a.json", {})
        with atomic_write(tmp_path / "b.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in sorted(tmp_path.iterdir())]
    assert modes == [0o600, 0o600]


def test_writing_replaces_a_link_and_never_writes_through_it(tmp_path):
    target = tmp_path / "outside.json"
    target.write_text("theirs")
    link = tmp_path / "run" / "a.json"
    link.parent.mkdir()
    link.symlink_to(target)
    write_json(link, {"ours": 1})
    assert target.read_text() == "theirs" and not link.is_symlink()
    # Nor is the temporary file a way out.
    (link.parent / ".b.json.mmedpo.json").symlink_to(target)
    with pytest.raises(InputError, match="b.json: cannot be written"):
        write_json(link.parent / "b.json", {"ours": 1})
    assert target.read_text() == "theirs"
    journal = link.parent / "journal.jsonl"
    journal.symlink_to(target)
    with pytest.raises(InputError, match="is a link"):
        Journal(journal, "inputs")
    assert target.read_text() == "theirs"


def test_a_link_does_not_make_another_folder_private_or_the_figures_public(tmp_path):
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    link = tmp_path / "run" / "judge_cache"
    link.parent.mkdir()
    link.symlink_to(other)
    with pytest.raises(InputError, match="is a link"):
        private_folder(link)
    assert stat.S_IMODE(other.stat().st_mode) == 0o755

    class Card:
        name = "mimic-cxr"
        credentialed = True

    (tmp_path / "run" / "figures").symlink_to(other)
    with pytest.raises(InputError, match="its figures stay in the run folder"):
        check_outputs(Card(), tmp_path / "run", tmp_path / "run" / "figures", in_place=False)


def test_a_report_outside_the_data_set_is_not_read(tmp_path):
    root = tmp_path / "mimic"
    study = root / "files" / "p10" / "p10000032" / "s50000001"
    study.parent.mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("FINDINGS: a secret")
    (study.parent / "s50000001.txt").symlink_to(tmp_path / "secret.txt")
    row = "dicom_id,study_id,subject_id,split\nabc,50000001,10000032,test\n"
    (root / "mimic-cxr-2.0.0-split.csv").write_text(row)
    with pytest.raises(InputError, match="link that leads outside"):
        read_layout("mimic-cxr", root, images=False)


def test_a_readers_own_files_are_left_alone(tmp_path):
    mine = [".env.deadbeef", "notes.txt", ".a.json.12345678.json"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    for name in (".a.json.mmedpo.json", ".b.png.mmedpo-0123abcd.png"):
        (tmp_path / name).write_text("half")
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine])
    (tmp_path / "my notes").mkdir()
    (tmp_path / "events.jsonl").write_text("{}\n")
    (tmp_path / "checkpoint-4").mkdir()
    prepare_folder(tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, "my notes"])


def test_a_result_is_known_by_what_it_holds_and_a_changed_one_is_kept(tmp_path, capsys):
    path, part = tmp_path / "base.jsonl", tmp_path / "part.json"
    calls = []

    def compute() -> None:
        calls.append(1)
        path.write_text("one\ntwo\n")
        part.write_text("beside")

    def made() -> bool:
        return read_or_compute(path, "inputs", compute, [part])

    assert made() and not made() and len(calls) == 1
    path.write_text("one\n")  # cut at a line's end
    assert made() and path.read_text() == "one\ntwo\n"
    assert (tmp_path / "base.jsonl.kept").read_text() == "one\n"
    assert "kept as base.jsonl.kept" in capsys.readouterr().out
    path.write_text("mine")

    def fail() -> None:
        raise InputError("no room")

    with pytest.raises(InputError, match="no room"):
        read_or_compute(path, "others", fail, [part])
    assert path.read_text() == "mine", "what was moved aside is put back"
    path.write_text("one\ntwo\n")
    assert made() and not list(tmp_path.glob("*.kept2"))
    part.unlink()
    assert made() and part.read_text() == "beside" and not made()
    (tmp_path / "base.sha256").write_bytes(b"\xff\xfe")
    assert made() and not made(), "a damaged record is no record"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "base.jsonl",
        "base.jsonl.kept",
        "base.sha256",
        "part.json",
    ]


def test_the_second_waits_for_the_first_and_reads(tmp_path, capsys):
    path = tmp_path / "a.json"
    entered, calls = threading.Event(), []

    def slow() -> None:
        calls.append(1)
        entered.set()
        time.sleep(0.5)
        path.write_text("made")

    first = threading.Thread(target=read_or_compute, args=(path, "inputs", slow))
    first.start()
    assert entered.wait(10)
    assert not read_or_compute(path, "inputs", slow)
    first.join()
    said = capsys.readouterr().out
    assert len(calls) == 1 and f"process {os.getpid()}" in said and "waiting for it" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.sha256"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a.json"
    with atomic_write(path) as one, atomic_write(path) as other:
        assert one != other
        one.write_text("one" * 1000)
        other.write_text("other")
    assert path.read_text() == "one" * 1000 and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_taken_over_empty(tmp_path):
    left = tmp_path / ".a.json.mmedpo.json"
    left.write_text("half of something")
    with atomic_write(tmp_path / "a.json") as temporary:
        assert temporary == left and not temporary.read_bytes()
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_lock_that_was_taken_away_is_no_lock(tmp_path):
    """Whoever waits for a lock whose file its holder removes takes a new one."""
    order, taken_late = [], []

    def hold(name: str) -> None:
        with turn(tmp_path / "a"):
            order.append(name)
            late = os.open(lock_file(tmp_path / "a", "compute"), os.O_RDWR)
            taken_late.append(locked(late))
            os.close(late)
            time.sleep(0.05)
            order.append(name)

    threads = [threading.Thread(target=hold, args=(str(number),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pairs = [order[place : place + 2] for place in range(0, 12, 2)]
    assert all(one == other for one, other in pairs), "nobody is in between"
    assert taken_late == [False] * 6, "nor anybody who comes later"
    assert not list(tmp_path.iterdir())


LOADING = """
import os, sys
os.environ["WORLD_SIZE"] = "2"
import torch
from mmedpo_utils.programs.train import load_data_alone
load_data_alone()
from deepspeed.runtime.fp16.loss_scaler import LossScaler
torch.save({"scaler": LossScaler(2.0), "values": torch.ones(2)}, sys.argv[2])
print(torch.load(sys.argv[2], weights_only=False)["scaler"].cur_scale)
torch.load(sys.argv[1], weights_only=False)  # as DeepSpeed loads its parts
"""


class Evil:
    """What a stranger's checkpoint may hold."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_a_program_in_a_checkpoint_is_not_run_where_its_own_parts_load(tmp_path):
    pytest.importorskip("deepspeed")
    torch.save({"optimizer": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    command = [sys.executable, "-c", LOADING, str(tmp_path / "evil.pt"), str(tmp_path / "own.pt")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert "2.0" in done.stdout and done.returncode != 0
    assert "Weights only load failed" in done.stderr and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["lost", "changed", "no list", "half a marker"])
def test_a_checkpoint_that_is_not_as_it_was_written_is_passed_over(tmp_path, damage, capsys):
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("optimizer.pt", "rng_state.pth"):
            (folder / name).write_text(f"{name} {step}")
        files = {name: file_sha256(folder / name) for name in ("optimizer.pt", "rng_state.pth")}
        marker = {"digest": "a", "step": step, "processes": 1, "files": files}
        write_json(folder / MARKER, marker)
    newest = tmp_path / "checkpoint-8"
    assert newest_checkpoint(tmp_path, "a", 1) == newest
    if damage == "lost":
        (newest / "optimizer.pt").unlink()
    elif damage == "changed":
        (newest / "rng_state.pth").write_text("other")
    elif damage == "no list":
        write_json(newest / MARKER, {"digest": "a", "step": 8, "processes": 1})
    else:
        (newest / MARKER).write_text('{"digest"')
    assert newest_checkpoint(tmp_path, "a", 1) == tmp_path / "checkpoint-4"
    said = capsys.readouterr().out
    assert ("checkpoint-8" in said) == (damage in ("lost", "changed"))


def test_a_run_whose_adapter_has_gone_is_not_finished(tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ADAPTER_FILES:
        (adapter / name).write_text(name)
    sums = {name: file_sha256(adapter / name) for name in ADAPTER_FILES}
    write_json(tmp_path / "result.json", {"digest": "a", "files": sums})
    assert finished_result(tmp_path, "a") and not finished_result(tmp_path, "b")
    weights = adapter / "adapter_model.safetensors"
    weights.write_text("cut")
    assert finished_result(tmp_path, "a") is None
    assert "adapter_model.safetensors is missing, or not" in capsys.readouterr().out
    write_json(tmp_path / "result.json", {"digest": "a"})  # of an earlier version
    assert finished_result(tmp_path, "a")
    weights.unlink()
    assert finished_result(tmp_path, "a") is None
    for content in ("[]", "{", "null", "\x00\x01"):
        (tmp_path / "result.json").write_text(content)
        assert finished_result(tmp_path, "a") is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1]\n", b'{"loss": 1}\n{"st'])
def test_damaged_events_are_no_events(tmp_path, content):
    (tmp_path / "events.jsonl").write_bytes(content + b'{"step": 1}\n' * (content == b"[1]\n"))
    assert read_events(tmp_path) == ([{"step": 1}] if content == b"[1]\n" else [])


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", 7])
def test_an_index_of_shards_stays_in_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="cannot be read as an index of weights"):
        weight_files(folder)


def test_a_tensor_in_two_files_is_nobodys(original):
    first, second = weight_files(original)
    tensors = read_tensors(second) | dict([next(iter(read_tensors(first).items()))])
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, second)
    with pytest.raises(InputError, match=f"{second.name}: holds .*, as an earlier file"):
        load_lvlm(original, "cpu")


def test_a_figure_that_cannot_be_saved_is_shown_all_the_same(tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("mmedpo_utils.show.figures.display", shown.append)
    (tmp_path / "taken").write_text("a file, and no folder")
    figures.show(Figure(figsize=(1, 1)), "empty", save_as=tmp_path / "taken" / "a.png")
    assert len(shown) == 1 and "shown, and not saved" in capsys.readouterr().out


def test_a_long_report_ends():
    words = [f"w{number % 997}" for number in range(20_000)]
    row = {"answer": " ".join(words), "prediction": " ".join(words[::-1]), "answer_type": "REPORT"}
    begun = time.monotonic()
    score = answer_score(row)
    assert time.monotonic() - begun < 60
    first = {key: " ".join(row[key].split()[:LONGEST_REPORT]) for key in ("answer", "prediction")}
    assert score == answer_score(row | first)


def test_a_picture_of_absurd_size_is_refused_before_it_is_decoded(tmp_path):
    side = int(MOST_PIXELS**0.5) + 100
    Image.new("1", (side, side)).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size < 10_000
    with pytest.raises(InputError, match=f"{side} x {side} pixels"):
        open_image(tmp_path / "large.png")
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(tmp_path / "small.png")
    assert open_image(tmp_path / "small.png").size == (40, 30)


def test_what_a_card_shows_of_names_is_text():
    assert _cell("a|b\n<script>x</script>") == "a\\|b &lt;script&gt;x&lt;/script&gt;"
    assert _cell(None) == "none" and _cell([1, 2]) == "1, 2"


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_a_hugging_face_copy_names_no_file_elsewhere(form, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("L", (30, 40)).save(tmp_path / "private.png")
    columns = {name: datasets.Value("string") for name in ("question", "answer")}
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": None, "path": str(tmp_path / "private.png")}],
            "question": ["Is there a nodule?"],
            "answer": ["no"],
        },
        features=datasets.Features({"image": datasets.Image(), **columns}),
    )
    copy = tmp_path / "copy"
    if form == "saved":
        datasets.DatasetDict({"train": table}).save_to_disk(copy)
        # save_to_disk takes the image in; a stranger's table need not.
        arrow = next(copy.rglob("*.arrow"))
        with ArrowWriter(path=str(arrow), features=table.features) as writer:
            writer.write_table(table.data.table)
            writer.finalize()
    else:
        (copy / "data").mkdir(parents=True)
        parquet.write_table(table.data.table, copy / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(InputError, match="`image`: names a file outside"):
        import_hugging_face(copy, tmp_path / "root", "vqa-rad")
    assert not list((tmp_path / "root").rglob("*.png"))


def test_an_installed_package_says_where_the_notebooks_are(tmp_path, monkeypatch):
    monkeypatch.setattr(run_notebooks, "NOTEBOOKS", tmp_path / "site-packages" / "notebooks")
    profile = load_profile("phantom-smoke", {"output": str(tmp_path / "run")})
    with pytest.raises(InputError, match="holds no notebook.*clone the repository"):
        run_notebooks.run(profile, "phantom-smoke")
