"""Profiles: what is shipped parses, each missing key is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from mmedpo_utils import profiles
from mmedpo_utils.base import settings
from mmedpo_utils.base.environment import check_device
from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.older_profiles import ADDED_KEYS
from mmedpo_utils.base.settings import repository_root
from mmedpo_utils.profiles import load_profile, profile_names
from mmedpo_utils.scale import estimate

PHANTOM = profiles.PROFILE_FOLDER / "phantom.yaml"


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profile_parses_and_every_key_is_explained(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    compared = {"sft"} if name.endswith("-sft") else {"sft", "dpo", "stage1", "stage2", "mmedpo"}
    assert compared <= set(profile.training.variants)
    lines = (profiles.PROFILE_FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    values = [
        line for line in lines if ":" in line and not line.rstrip().endswith(":") and line[0] != "#"
    ]
    assert [line for line in values if " # " not in line] == []


RECIPE = {
    "learning_rate": 1e-7,
    "projector_learning_rate": 2e-5,
    "lora_rank": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.05,
    "epochs": 3,
    "weight_decay": 0,
    "warmup_ratio": 0.03,
    "scheduler": "cosine",
    "max_length": 1024,
    "beta": 0.1,
    "precision": "bf16",
    "tf32": True,
    "gradient_checkpointing": True,
    "group_by_length": True,
    "logging_steps": 1,
    "report_to": "tensorboard",
}


@pytest.mark.parametrize(
    "name",
    [name for name in profile_names() if name.startswith(("paper", "qlora", "zero3", "multi"))],
)
def test_recipes_keep_the_papers_values_and_its_global_batch(name: str) -> None:
    training = load_profile(name).training
    changed = {"learning_rate"} if name.endswith("-sft") else set()
    assert {key for key, value in RECIPE.items() if getattr(training, key) != value} == changed
    assert (
        training.processes * training.gradient_accumulation_steps * training.per_device_batch_size
        == 4
    )


def trains_on_a_gpu(name: str) -> bool:
    profile = load_profile(name)
    return profile.lvlm.device == "cuda" and profile.evaluation.adapters is None


@pytest.mark.parametrize("name", filter(trains_on_a_gpu, profile_names()))
def test_the_head_of_each_recipe_states_the_memory_that_is_estimated(name: str) -> None:
    head = re.search(
        r"^# Estimated: (\S+) GiB on each GPU for `(\w+)`\.",
        (profiles.PROFILE_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    parts, _ = estimate.profile_memory(load_profile(name), head[2])
    assert f"{sum(parts.values()):.1f}" == head[1]


def test_recipes_train_on_as_many_pairs_as_table_5_says(shared: Path) -> None:
    rows = json.loads((shared / "paper" / "tables.json").read_text(encoding="utf-8"))["table5"][
        "rows"
    ]
    for dataset, (_, text, _) in rows.items():
        assert load_profile(f"paper-{dataset.lower()}").curation.text_pairs == text


def test_the_three_profiles_of_the_tutorial_are_shipped() -> None:
    assert {"phantom", "phantom-smoke", "vqa-rad-mini"} <= set(profile_names())


def test_resolved_profile_reads_back_equal(tmp_path: Path) -> None:
    profile = load_profile(
        "phantom",
        {"training.epochs": None, "training.max_steps": 7, "output": str(tmp_path / "run")},
    )
    profile.save(tmp_path / "profile.yaml")
    assert load_profile(tmp_path / "profile.yaml") == profile
    assert profile.training.max_steps == 7
    assert profile.image_root == tmp_path / "run" / "data" / "images"


def test_a_profile_extends_a_shipped_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nextends: phantom\ntraining:\n  beta: 0.3\n  variants:\n    one: "
        "{objective: dpo, pairs: train, "
        "sources: [text], weights: none, trains: [projector]}\n",
        encoding="utf-8",
    )
    mine, phantom = load_profile(file), load_profile("phantom")
    assert mine.training.beta == 0.3 and list(mine.training.variants) == ["one"]
    assert dataclasses.replace(mine, name="phantom", training=phantom.training) == phantom
    file.write_text("name: mine\nextends: fantom\n", encoding="utf-8")
    with pytest.raises(InputError, match="mine.yaml: key `extends`.*'fantom'.*`phantom`"):
        load_profile(file)


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"training.max_steps": 3}, "training.max_steps"),
        ({"training.epochs": None}, "training.max_steps"),
        ({"training.nodes": 3}, "training.processes"),
        ({"training.hostfile": "hosts"}, "training.hostfile"),
        ({"training.offload": "cpu", "training.zero_stage": 1}, "training.offload"),
        ({"lvlm.quantization": "nf4", "training.zero_stage": 3}, "training.zero_stage"),
        ({"training.reference": "released"}, "training.cache_reference"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict, key: str) -> None:
    with pytest.raises(InputError, match=f"key `{key}`: expected"):
        load_profile("phantom", changes)


def test_digest_follows_the_named_sections_only() -> None:
    base, other = load_profile("phantom"), load_profile("phantom", {"noise.signal": 0.4})
    assert base.digest("data", "seed") == other.digest("data", "seed")
    assert base.digest("noise") != other.digest("noise")
    assert base.digest() != other.digest()


def test_profile_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_profile("phantom").training.beta = 1.0


def _keys(values: dict, prefix: str = "") -> list[str]:
    inner = [
        _keys(value, f"{prefix}{key}.") for key, value in values.items() if isinstance(value, dict)
    ]
    return [prefix + key for key in values] + sum(inner, [])


def test_each_missing_key_is_named(tmp_path: Path) -> None:
    text = PHANTOM.read_text(encoding="utf-8")
    named_freely = "training.variants."
    keys = [
        key
        for key in _keys(yaml.safe_load(text))
        if not (key.startswith(named_freely) and key.count(".") == 2)
        and tuple(key.split(".")) not in ADDED_KEYS
    ]
    for key in keys:
        values = yaml.load(text, Loader=settings._Loader)
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        del section[last]
        file = tmp_path / "broken.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        with pytest.raises(InputError, match="broken.yaml: missing key") as caught:
            load_profile(file)
        assert f"`{key}`" in str(caught.value)


def test_a_profile_of_before_a_key_loads_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    values = yaml.load(PHANTOM.read_text(encoding="utf-8"), Loader=settings._Loader)
    for (outer, key), before in ADDED_KEYS.items():
        values[outer][key] = before
    today = tmp_path / "today.yaml"
    today.write_text(yaml.safe_dump(values), encoding="utf-8")
    for outer, key in ADDED_KEYS:
        del values[outer][key]
    older = tmp_path / "older.yaml"
    older.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert load_profile(older) == load_profile(today)
    said = capsys.readouterr().out
    for (outer, key), before in ADDED_KEYS.items():
        assert f"older.yaml: key `{outer}.{key}` is new, and taken as {before}" in said
    # What was curated then is known by its digest still, and another value makes another one.
    changed = load_profile(today, {"judge.whole_sentences": 0.5})
    resolved = load_profile(older).as_dict()
    sections = {key: resolved[key] for key in ("curation", "judge")}
    for outer, key in ADDED_KEYS:
        del sections[outer][key]
    before = hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()
    assert load_profile(older).digest("curation", "judge") == before
    assert changed.digest("curation", "judge") != before


def test_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(PHANTOM.read_text(encoding="utf-8").replace("4e-4", "1e-7"), encoding="utf-8")
    assert load_profile(file).training.learning_rate == 1e-7


def test_a_checkpoint_inside_the_repository_is_found_from_everywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    inside = "mmedpo_utils/phantom/weights/lvlm"
    profile = load_profile(
        "phantom", {"lvlm.model": inside, "visual_tool.checkpoint": "someone/on-the-hub"}
    )
    assert Path(profile.lvlm.model) == repository_root() / inside
    assert (
        profile.visual_tool.checkpoint == "someone/on-the-hub"
        and load_profile("phantom").lvlm.model == "phantom"
    )


def test_data_root_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEDPO_DATA_ROOT", str(tmp_path))
    assert load_profile("vqa-rad-mini").data.root == tmp_path
    assert load_profile("vqa-rad-mini").image_root == tmp_path / "images"
    assert load_profile("phantom").data.root is None


def test_repository_root_holds_the_package() -> None:
    assert (repository_root() / "mmedpo_utils").is_dir()


def test_gpu_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_device("auto") == check_device("cpu") == "cpu"
    with pytest.raises(InputError, match="lvlm.device"):
        check_device("cuda")


def test_a_key_that_profiles_have_no_more_is_left_out_with_a_line(tmp_path, capsys):
    profile = load_profile("phantom-smoke")
    profile.save(tmp_path / "profile.yaml")
    values = yaml.safe_load((tmp_path / "profile.yaml").read_text())
    values["training"]["reuse_vision_features"] = True
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(values))
    assert load_profile(tmp_path / "profile.yaml") == profile
    assert "`training.reuse_vision_features` is read no more" in capsys.readouterr().out
