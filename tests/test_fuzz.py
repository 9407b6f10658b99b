"""Damaged files by the thousand, by seed: each is read, or refused in one sentence. What was found
once stays as a case in the tests of its reader.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from peft import get_peft_model
from PIL import Image

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.lvlm import PHANTOM_WEIGHTS, generate, load_lvlm
from mmedpo_utils.medklip import PHANTOM_CHECKPOINT, load_medklip
from mmedpo_utils.preference_rows import pair_row, read_manifest, read_questions
from mmedpo_utils.profiles import PROFILE_FOLDER, load_profile
from mmedpo_utils.programs.export import merge
from mmedpo_utils.trainer import adapter_config

from .conftest import REPOSITORY
from .test_manifests import QUESTION

ODD = [None, True, False, 0, -1, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\ud800"]
ODD += [[], {}, [[]], {"a": {}}, "<image>", "../../x", "a" * 10_000, "\x00", [None], "no", "010"]


def images(seed: int, count: int) -> dict:
    command = [sys.executable, "-m", "tests.fuzz_images", str(seed), str(count)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "count", [200, pytest.param(10_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_damaged_image_is_opened_or_refused(count):
    found = images(count, count)
    assert found["seeds"] == 46
    assert not found["wrong"], found["wrong"][:5]
    assert set(found["outcomes"]) == {"opened", "InputError"}
    assert found["outcomes"]["opened"] > count / 10, "some damages do not matter"
    assert found["peak_gib"] < 1


def changed(value, chance: random.Random):
    """A copy of plain values with one of them replaced, left out, doubled, or put elsewhere."""
    places: list[tuple] = []

    def walk(part, path: tuple) -> None:
        places.append(path)
        if isinstance(part, dict | list):
            keys = part if isinstance(part, dict) else range(len(part))
            for key in keys:
                walk(part[key], (*path, key))

    value = json.loads(json.dumps(value))
    walk(value, ())
    path = chance.choice(places[1:] or places)
    if not path:
        return chance.choice(ODD)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    way = chance.randrange(4)
    if way == 0 or isinstance(holder, list):
        holder[path[-1]] = chance.choice(ODD)
    elif way == 1:
        del holder[path[-1]]
    elif way == 2:
        holder[str(path[-1]) + chance.choice("sx_ ")] = holder.pop(path[-1])
    else:
        holder[path[-1]] = [holder[path[-1]]] * 2
    return value


def damaged_text(content: str, chance: random.Random) -> str:
    """JSON (or a line of JSON lines) with a value changed, or any text that is cut, has a stray
    byte, or is gone.
    """
    lines = content.split("\n")
    place = chance.choice([number for number, line in enumerate(lines) if line])
    if chance.random() < 0.7:
        with suppress(ValueError):
            return json.dumps(changed(json.loads(content), chance))
        with suppress(ValueError):
            lines[place] = json.dumps(changed(json.loads(lines[place]), chance))
            return "\n".join(lines)
    begun, rest = content[: len(content) // 2], content[len(content) // 2 :]
    return chance.choice(["", begun, begun + "\x00" + rest, rest, content * 2, "[" * 100_000])


def damage(file: Path, chance: random.Random) -> None:
    """Put a damaged text in a file's place, not through a link."""
    content = file.read_text(encoding="utf-8")
    file.unlink()
    file.write_text(damaged_text(content, chance), encoding="utf-8", errors="replace")


def few_or_many(few: int, many: int) -> list:
    """Seeds, of which all but a few are slow."""
    return [pytest.param(n, marks=[] if n < few else pytest.mark.slow) for n in range(many)]


def read_or_refused(read, file: Path) -> bool:
    """Whether a file was read. Anything but an InputError of one line that names it fails."""
    begun = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(file)
        return True
    except InputError as error:
        assert file.name in str(error) and "\n" not in str(error), str(error)[:300]
        return False
    finally:
        assert time.monotonic() - begun < 20


@pytest.mark.parametrize("seed", range(300))
def test_a_damaged_profile_is_read_or_refused(seed, tmp_path):
    chance = random.Random(seed)
    values = yaml.safe_load((PROFILE_FOLDER / "phantom.yaml").read_text(encoding="utf-8"))
    for _ in range(chance.choice((1, 1, 2))):
        values = changed(values, chance) if isinstance(values, dict) else values
    file = tmp_path / "a.yaml"
    try:
        file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    except UnicodeEncodeError:
        file.write_bytes(b"name: \xff\n")
    read_or_refused(load_profile, file)


@pytest.mark.parametrize("seed", range(200))
def test_damaged_rows_are_read_or_refused(seed, tmp_path):
    chance = random.Random(seed)
    pairs = [pair_row(QUESTION | {"question_id": f"q{n}"}, "no", 0.5) for n in range(3)]
    rows = changed(pairs, chance)
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    read_or_refused(read_manifest, tmp_path / "pairs.json")
    text = "".join(json.dumps(changed(QUESTION, chance)) + "\n" for _ in range(3))
    place = chance.randrange(len(text))
    text = chance.choice([text, text[:place], text[:place] + chance.choice('"{\n\x00') + text])
    (tmp_path / "q.jsonl").write_text(text, encoding="utf-8", errors="replace")
    read_or_refused(read_questions, tmp_path / "q.jsonl")


SETTINGS = ("config.json", "processor_config.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize("seed", few_or_many(24, 300))
def test_damaged_settings_of_a_model_load_or_are_refused(seed, tmp_path):
    chance = random.Random(seed)
    for file in PHANTOM_WEIGHTS.iterdir():
        (tmp_path / file.name).symlink_to(file)
    file = tmp_path / SETTINGS[seed % len(SETTINGS)]
    damage(file, chance)
    try:
        lvlm = load_lvlm(str(tmp_path), "cpu")
    except InputError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error), str(error)[:300]
    else:
        film = Image.new("RGB", (224, 224), (90, 90, 90))
        assert generate(lvlm, [film], ["Is there a nodule?"], 4, 1)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter of the phantom Med-LVLM, with the record of its base model beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load_lvlm("phantom", "cpu").model
    get_peft_model(model, adapter_config(rank=2, alpha=4, dropout=0.0)).save_pretrained(folder)
    (folder / "base.json").write_text('{"vision_tower": "config", "template": null}')
    return folder


@pytest.mark.parametrize("seed", few_or_many(16, 200))
def test_damaged_settings_of_an_adapter_load_or_are_refused(seed, adapter, tmp_path):
    chance = random.Random(seed)
    shutil.copytree(adapter, tmp_path / "adapter")
    damage(tmp_path / "adapter" / ("base.json" if seed % 8 == 7 else "adapter_config.json"), chance)
    begun = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merge(tmp_path / "adapter", tmp_path / "merged", base="phantom")
    except InputError as error:
        assert str(tmp_path / "adapter") in str(error) and "\n" not in str(error), str(error)[:300]
        assert not (tmp_path / "merged").exists()
    else:
        merged = load_lvlm(str(tmp_path / "merged"), "cpu").model
        assert all(weight.isfinite().all() for weight in merged.parameters())
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("adapter_config.json", "r", 10**9, "`r`: 1000000000 is no rank"),
        ("adapter_config.json", "r", True, "`r`: True is no rank"),
        (
            "adapter_config.json",
            "rank_pattern",
            {"q_proj": 0},
            "`rank_pattern.q_proj`: 0 is no rank",
        ),
        ("adapter_config.json", "rank_pattern", {"r": 10**9}, "`rank_pattern.r`: 1000000000"),
        ("adapter_config.json", "rank_pattern", 7, "the adapter does not fit"),
        ("adapter_config.json", "lora_alpha", float("nan"), "`lora_alpha`: nan is no scale"),
        ("adapter_config.json", "lora_alpha", 1e308, "is no scale"),
        ("adapter_config.json", "target_modules", [7], "the adapter does not fit"),
        ("base.json", "template", ["v1"], "`template`: ['v1'] is not known"),
        ("base.json", "base_adapter", 7, "`base_adapter`: expected an adapter's folder"),
    ],
)
def test_what_the_settings_of_an_adapter_cannot_be(name, key, value, said, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(InputError) as caught:
        merge(tmp_path / "adapter", tmp_path / "merged", base="phantom")
    assert said in str(caught.value) and str(tmp_path / "adapter") in str(caught.value)


@pytest.mark.parametrize("seed", few_or_many(6, 60))
def test_a_damaged_cache_is_made_anew(seed, original, cache):
    chance = random.Random(seed)
    load_lvlm(str(original), "cpu")
    files = {path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}
    small = [path for path in files if path.suffix in (".json", ".jinja")]
    damage(chance.choice(small), chance)
    load_lvlm(str(original), "cpu")
    assert {path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()} == files


@pytest.mark.parametrize("seed", range(60))
def test_damaged_settings_of_medklip_load_or_are_refused(seed, tmp_path):
    chance = random.Random(seed)
    (tmp_path / "model.safetensors").symlink_to(PHANTOM_CHECKPOINT / "model.safetensors")
    shutil.copy(PHANTOM_CHECKPOINT / "config.json", tmp_path)
    damage(tmp_path / "config.json", chance)
    begun = time.monotonic()
    try:
        load_medklip(tmp_path)
    except InputError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error), str(error)[:300]
    assert time.monotonic() - begun < 20
