"""Will it load? The check says of a profile what loading it says later, and starts nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from mmedpo_utils.base.sections import LanguageModel
from mmedpo_utils.lvlm import PHANTOM_WEIGHTS, load_lvlm
from mmedpo_utils.profiles import Profile, load_profile
from mmedpo_utils.programs.check import Finding, check_profile, main
from mmedpo_utils.trainer import adapter_config

from .original_llava import CLIP, CONFIG, write_original, write_tower
from .servers import running
from .test_adapters import edit, llava_adapter


def found(lines: list[Finding]) -> dict[str, Finding]:
    return {line.what: line for line in lines}


def test_the_shipped_profile_is_right(monkeypatch, capsys):
    lines = found(check_profile(load_profile("phantom")))
    lvlm = load_lvlm("phantom", "cpu")
    assert lines["class"].found == type(lvlm.model).__name__
    assert lines["base"].found.startswith(f"{len(lvlm.model.state_dict())} tensors")
    assert lines["tokens per image"].found.startswith("64,")
    monkeypatch.setattr("sys.argv", ["check", "--profile", "phantom"])
    assert main() == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(lines) and all(line.startswith("right") for line in printed)


def test_a_checkpoint_and_adapters_in_llavas_layout(original, state, tmp_path, cache):
    llava_adapter(tmp_path / "theirs", state, tower="zero")
    llava_adapter(tmp_path / "torn", state)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    edit(tmp_path / "torn", lambda tensors: tensors.pop(name))
    profile = load_profile(
        "phantom",
        {
            "lvlm.model": str(original),
            "lvlm.template": "v1",
            "lvlm.vision_tower": "config",
            "lvlm.base_adapter": str(tmp_path / "theirs"),
            "evaluation.adapters": {"torn": str(tmp_path / "torn"), "gone": "some/one/slake"},
        },
    )
    lines = found(check_profile(profile))
    assert (
        lines["class"].found
        == "LlavaMistralForCausalLM in the original layout, converted on first use"
    )
    assert (
        "3 layers, 28 pixels; the one that its configuration names, in clip"
        in lines["vision tower"].found
    )
    assert lines["tokens per image"].found.startswith("4,") and lines["template"].found.startswith(
        "v1"
    )
    assert lines["adapter base_adapter"].found.startswith(
        "LLaVA layout: 28 LoRA tensors and 4 whole ones"
    )
    assert "18 without effect" in lines["adapter base_adapter"].found
    assert f"1 missing ({name})" in lines["adapter torn"].to_do
    assert "hf download some/one`" in lines["adapter gone"].to_do
    assert not cache.exists(), "nothing is converted"
    load_lvlm(original, "cpu", vision_tower="config")
    again = found(check_profile(profile))
    assert (
        again["class"].found == "LlavaMistralForCausalLM in the original layout, converted before"
    )
    assert again["adapter base_adapter"] == lines["adapter base_adapter"]
    count = len(load_lvlm(original, "cpu", vision_tower="config").model.state_dict())
    assert again["base"].found.startswith(f"{count} tensors") and lines["base"].found.startswith(
        f"{count} tensors"
    )


BROKEN = {
    "a tensor less": (
        lambda state: state.pop("model.layers.1.mlp.up_proj.weight"),
        {},
        "1 missing",
    ),
    "another shape": (
        lambda state: state.update({"model.norm.weight": torch.ones(9)}),
        {},
        "1 misshapen",
    ),
    "another projector": (lambda state: None, {"mm_projector_type": "linear"}, "mm_projector_type"),
    "an unknown tower": (
        lambda state: None,
        {"mm_vision_tower": "nobody/tower"},
        "mm_vision_tower",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_loading_would_refuse_is_said_before(state, tmp_path, fault):
    """The reason is the one that `load_lvlm` ends with."""
    change, keys, told = BROKEN[fault]
    change(state)
    write_tower(tmp_path / "clip", CLIP, state)
    source = write_original(tmp_path / "broken", CONFIG | keys, state)
    profile = load_profile(
        "phantom", {"lvlm.model": str(source), "lvlm.vision_tower": "checkpoint"}
    )
    if fault == "an unknown tower":
        profile = load_profile(
            "phantom", {"lvlm.model": str(source), "lvlm.vision_tower": "config"}
        )
    line = found(check_profile(profile))["base model"]
    assert told in line.to_do
    with pytest.raises(ValueError) as refused:
        load_lvlm(source, "cpu", vision_tower=profile.lvlm.vision_tower)
    assert str(refused.value)[:80] == line.to_do[:80]


def phantom_copy(folder: Path) -> Path:
    return Path(shutil.copytree(PHANTOM_WEIGHTS, folder))


def test_a_hugging_face_folder_with_something_wrong(tmp_path):
    folder = phantom_copy(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"model.extra.weight": torch.ones(3)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    profile = load_profile("phantom", {"lvlm.model": str(folder)})
    assert (
        "1 weights are left over, e.g. model.extra.weight"
        in found(check_profile(profile))["base model"].to_do
    )
    tuned = get_peft_model(load_lvlm("phantom", "cpu").model, adapter_config(2, 4, 0.0))
    tuned.save_pretrained(tmp_path / "adapter")
    profile = replace(
        profile, evaluation=replace(profile.evaluation, adapters={"a": str(tmp_path / "adapter")})
    )
    assert "before the base model is here" in found(check_profile(profile))["adapter a"].to_do


def with_judges(profile: Profile, *models: LanguageModel) -> Profile:
    panel = {f"member{number}": model for number, model in enumerate(models[1:])}
    return replace(
        profile,
        judge=replace(profile.judge, backend="models", judge=models[0], panel=panel, timeout=5),
    )


def test_judges_are_asked_whether_they_are_there(monkeypatch):
    profile = load_profile("phantom")
    with running() as server:
        ours = LanguageModel("openai", "ours", server.url, None, "none", 1.0, 1.0)
        server.models = ["ours", "another"]
        lines = found(check_profile(with_judges(profile, ours, replace(ours, model="third"))))
        assert lines["judge"].found == f"ours at {server.url}, which serves it"
        assert "serves ours, another and not third" in lines["panel member0"].to_do
        server.models = 404
        lines = found(check_profile(with_judges(profile, ours, ours)))
        assert "lists no models" in lines["judge"].found and not lines["judge"].to_do
        server.models = 401
        line = found(check_profile(with_judges(profile, ours, ours)))["judge"]
        assert "answers 401 (the key is not accepted)" in line.to_do
        assert not server.seen, "no completion was asked for"
    line = found(check_profile(with_judges(profile, ours, ours)))["judge"]
    assert "does not answer; start the server" in line.to_do
    local = LanguageModel("transformers", "no/such-model", None, None, "none", 0.0, 0.0)
    keyed = replace(ours, api_key_env="NOT_SET_HERE")
    lines = found(check_profile(with_judges(profile, local, keyed)))
    assert "hf download no/such-model" in lines["judge"].to_do
    assert "NOT_SET_HERE: is not set" in lines["panel member0"].to_do


def test_a_remote_judge_of_credentialed_data_is_not_asked(tmp_path):
    remote = LanguageModel("openai", "m", "https://judge.example/v1", None, "none", 1.0, 1.0)
    profile = load_profile(
        "phantom",
        {
            "data.source": "mimic-cxr",
            "data.card": "mimic-cxr",
            "data.root": str(tmp_path),
            "figures": "runs/phantom/figures",
        },
    )
    line = found(check_profile(with_judges(profile, remote, remote)))["judge"]
    assert "credentialed data" in line.to_do and "nothing was sent" in line.to_do


def test_a_data_set_is_held_against_its_card(tmp_path, capsys, monkeypatch):
    profile = load_profile(
        "phantom", {"data.source": "vqa-rad", "data.card": "vqa-rad", "data.root": str(tmp_path)}
    )
    line = found(check_profile(profile))["data set vqa-rad"]
    assert (
        "missing in" in line.found
        and "VQA_RAD Image Folder" in line.found
        and "fetch it" in line.to_do
    )
    row = {
        "qid": 1,
        "image_name": "a.jpg",
        "question": "Is it a CT?",
        "answer": "yes",
        "answer_type": "CLOSED",
        "phrase_type": "test_freeform",
    }
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps([row]))
    (tmp_path / "VQA_RAD Image Folder").mkdir()
    told = [str(line) for line in check_profile(profile) if line.what == "data set vqa-rad"]
    assert any("test: questions or reports: 1, the card says 451" in line for line in told)
    assert any("a.jpg first" in line for line in told)
    file = tmp_path / "p.yaml"
    profile.save(file)
    monkeypatch.setattr("sys.argv", ["check", "--profile", str(file)])
    assert main() == 1 and "to do  data set vqa-rad" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["check", "--profile", "nonsense"])
    assert main() == 2 and "unknown" in capsys.readouterr().err


def test_memory_is_held_against_what_is_free():
    lines = found(
        check_profile(
            load_profile(
                "phantom", {"training.processes": 2, "training.per_device_batch_size": 32_000}
            )
        )
    )
    assert (
        "each of 2 training processes" in lines["CPU memory"].found
        and "close other programs" in lines["CPU memory"].to_do
    )
