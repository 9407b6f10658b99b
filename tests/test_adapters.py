"""Adapters of other makers: applied tensor by tensor as their arithmetic says, or refused by
name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlavaForConditionalGeneration

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.convert.adapters import adapter_folder, put_on
from mmedpo_utils.convert.model_folder import model_folder
from mmedpo_utils.lvlm import PHANTOM_WEIGHTS, generate, image_attention, load_lvlm
from mmedpo_utils.preference_rows import write_manifest
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.programs.export import merge
from mmedpo_utils.programs.train import run
from mmedpo_utils.run_folder import read_events
from mmedpo_utils.trainer import adapter_config

from .original_llava import CLIP, CONFIG, TOWER, random_state, write_original
from .test_llava_checkpoint import inputs
from .test_trainer import tiny_lvlm, tiny_pairs

RANK, ALPHA = 4, 8
LANGUAGE = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
WRAPPER = "base_model.model."


def llava_adapter(
    folder: Path,
    weights: dict[str, torch.Tensor],
    tower: str | None = None,
    kind: str = "safetensors",
    base: str = "original",
) -> dict[str, torch.Tensor]:
    """Write an adapter as LLaVA's scripts do, for a model whose original weights are ``weights``.

    Args:
        tower: LoRA on q, k, v of the vision tower too: zero (B as it began) or trained.
        kind: safetensors or bin.

    Returns:
        the original weights with W + (alpha / r) B A written into them, and the trained projector.
    """
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    lora, changed = {}, dict(weights)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        spoken = name.startswith("model.layers.") and module.endswith(LANGUAGE)
        seen = tower and name.startswith(TOWER) and module.endswith(("q_proj", "k_proj", "v_proj"))
        if spoken or seen:
            a, b = draw(RANK, weight.shape[1]), draw(weight.shape[0], RANK)
            if seen and tower == "zero":
                b = torch.zeros_like(b)
            lora[f"{WRAPPER}{module}.lora_A.weight"] = a
            lora[f"{WRAPPER}{module}.lora_B.weight"] = b
            changed[name] = weight + ALPHA / RANK * b @ a
    projector = {
        name: weight + draw(*weight.shape)
        for name, weight in weights.items()
        if name.startswith("model.mm_projector.")
    }
    folder.mkdir()
    if kind == "safetensors":
        save_file(lora, folder / "adapter_model.safetensors")
    else:
        torch.save(lora, folder / "adapter_model.bin")
    torch.save(
        {WRAPPER + name: value for name, value in projector.items()},
        folder / "non_lora_trainables.bin",
    )
    write_config(folder, base)
    return changed | projector


def write_config(folder: Path, base: str, **others: object) -> None:
    """The adapter_config.json that PEFT wrote for LLaVA's script."""
    modules = [name.rpartition(".")[2] for name in LANGUAGE]
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "lora_dropout": 0.05,
        "base_model_name_or_path": base,
        "target_modules": modules,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values | others))


def logits(lvlm, number: int = 0) -> torch.Tensor:
    """Logits of one fixed film and prompt. Shape: [T, V]."""
    image = Image.new("RGB", (28, 28), (20 * number, 90, 200))
    batch = lvlm.processor(images=image, text="<s><image>\nIs there a nodule?", return_tensors="pt")
    with torch.no_grad():
        return lvlm.model(**batch).logits[0]


@pytest.mark.parametrize(
    ("tower", "kind"), [(None, "safetensors"), ("zero", "bin"), ("trained", "safetensors")]
)
def test_golden_model_with_an_adapter_in_llavas_layout(golden, tmp_path, capsys, tower, kind):
    source, folder, _, cases = golden
    weights = {}
    for shard in source.glob("*.safetensors"):
        weights |= load_file(shard)
    changed = llava_adapter(tmp_path / "adapter", weights, tower, kind, base="tiny")
    config = json.loads((source / "config.json").read_text())
    wanted = load_lvlm(write_original(tmp_path / "changed", config, changed), "cpu")
    adapted, base = load_lvlm(source, "cpu", adapter=tmp_path / "adapter"), load_lvlm(source, "cpu")
    for case in cases.values():
        image = Image.open(folder / "images" / case["image"]).convert("RGB")
        with torch.no_grad():
            found, expected, before = (
                lvlm.model(**inputs(lvlm, image, case)).logits for lvlm in (adapted, wanted, base)
            )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert (found - before).abs().max() > 1e-2
    said = capsys.readouterr().out
    layers = config["num_hidden_layers"]
    assert (
        f"LLaVA layout: {14 * layers + (18 if tower == 'trained' else 0)} LoRA tensors and 4 whole"
        in said
    )
    assert ("18 without effect (B is zero) left out" in said) == (tower == "zero")


@pytest.fixture
def adapter(tmp_path, state) -> Path:
    llava_adapter(tmp_path / "adapter", state)
    return tmp_path / "adapter"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


FIRST = f"{WRAPPER}model.layers.1.mlp.up_proj.lora_B.weight"
FAULTS = {
    "missing": (lambda tensors: tensors.pop(FIRST), f"1 missing .{FIRST}"),
    "a whole kind missing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "o_proj" in name],
        rf"4 missing .{WRAPPER}model\.layers\.0\.self_attn\.o_proj\.lora_A",
    ),
    "surplus": (
        lambda tensors: tensors.update(
            {FIRST.replace("layers.1", "layers.2"): torch.zeros(48, RANK)}
        ),
        r"1 unexpected .base_model\.model\.model\.layers\.2\.mlp\.up_proj",
    ),
    "misshapen": (
        lambda tensors: tensors.update({FIRST: torch.zeros(47, RANK)}),
        rf"1 misshapen .{FIRST} \[47, 4\] instead of \[48, 4\]",
    ),
    "no place in the tower": (
        lambda tensors: tensors.update(
            {f"{WRAPPER}{TOWER}encoder.layers.9.mlp.fc1.lora_B.weight": torch.zeros(24, RANK)}
        ),
        r"layers\.9\.mlp\.fc1\.lora_B\.weight has no place",
    ),
    "too wide for the tower": (
        lambda tensors: tensors.update(
            {f"{WRAPPER}{TOWER}encoder.layers.0.mlp.fc1.lora_B.weight": torch.zeros(25, RANK)}
        ),
        r"fc1\.lora_B\.weight \[25, 4\] is for another width than the vision tower's 24",
    ),
    "no matrix for the tower": (
        lambda tensors: tensors.update(
            {f"{WRAPPER}{TOWER}encoder.layers.0.mlp.fc1.lora_B.weight": torch.zeros(24)}
        ),
        r"fc1\.lora_B\.weight \[24\] is for another width",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_fit_is_refused_by_the_names_in_its_file(original, adapter, fault):
    change, told = FAULTS[fault]
    edit(adapter, change)
    with pytest.raises(InputError, match=f"does not fit.*{told}"):
        load_lvlm(original, "cpu", adapter=adapter)
    with pytest.raises(InputError, match="does not fit"):
        merge(adapter, adapter.parent / "merged", base=str(original), device="cpu")
    assert not (adapter.parent / "merged").exists()


def test_the_projector_has_to_be_there_and_to_fit(original, adapter):
    beside = adapter / "non_lora_trainables.bin"
    projector = torch.load(beside, weights_only=True)
    torch.save(projector | {f"{WRAPPER}model.norm.weight": torch.ones(32)}, beside)
    with pytest.raises(InputError, match=r"1 unexpected .base_model\.model\.model\.norm\.weight"):
        load_lvlm(original, "cpu", adapter=adapter)
    projector.pop(f"{WRAPPER}model.mm_projector.2.bias")
    torch.save(projector, beside)
    with pytest.raises(
        InputError, match=r"1 missing .base_model\.model\.model\.mm_projector\.2\.bias"
    ):
        load_lvlm(original, "cpu", adapter=adapter)
    beside.unlink()
    with pytest.raises(InputError, match=r"LLaVA's layout and holds no non_lora_trainables\.bin"):
        load_lvlm(original, "cpu", adapter=adapter)


def test_another_base_is_refused_by_its_shapes_and_told_by_its_name(
    original, adapter, state, tmp_path
):
    """The known trap: an adapter of a Mistral model on a LLaVA of the Vicuna kind, which has as
    many keys as queries.
    """
    vicuna = CONFIG | {"model_type": "llava_llama", "num_key_value_heads": 4}
    other = write_original(tmp_path / "vicuna", vicuna, random_state(vicuna, CLIP))
    with pytest.raises(InputError, match=r"does not fit.*4 misshapen.*k_proj.*it names original"):
        load_lvlm(other, "cpu", adapter=adapter)
    write_config(adapter, "liuhaotian/llava-v1.5-7b")
    with pytest.warns(
        UserWarning, match=r"was trained on liuhaotian/llava-v1\.5-7b, and the shapes fit"
    ):
        load_lvlm(original, "cpu", adapter=adapter)
    write_config(adapter, "original", not_known_yet=0.3, off=False)
    with pytest.warns(UserWarning, match="PEFT does not know not_known_yet and"):
        load_lvlm(original, "cpu", adapter=adapter)
    write_config(adapter, "original", peft_type="IA3")
    with pytest.raises(InputError, match="LORA"):
        load_lvlm(original, "cpu", adapter=adapter)


class Mark:
    """A pickle that would make a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_a_pickle_cannot_run_code(original, adapter, tmp_path):
    for name in ("non_lora_trainables.bin", "adapter_model.bin"):
        torch.save({"a": Mark(tmp_path / "ran")}, adapter / name)
        (adapter / "adapter_model.safetensors").unlink(missing_ok=True)
        with pytest.raises(InputError, match=rf"{name}.*cannot be read|adapter_model.bin"):
            load_lvlm(original, "cpu", adapter=adapter)
    assert not (tmp_path / "ran").exists()


def test_what_can_be_done_with_it(original, adapter, tmp_path):
    """Answers, attention, a merged folder, and a base to train on: all are the same model."""
    tuned = load_lvlm(original, "cpu", adapter=adapter)
    film, question = [Image.new("RGB", (28, 28), (9, 90, 200))], ["Is there a nodule?"]
    assert generate(tuned, film, question, 4, 1)
    assert image_attention(tuned, film, question, 1).sum() == pytest.approx(1, abs=1e-5)
    merged = load_lvlm(merge(adapter, tmp_path / "merged", base=str(original)), "cpu")
    started = load_lvlm(original, "cpu", base_adapter=adapter)
    assert not hasattr(started.model, "peft_config")
    for number in range(3):
        expected = logits(tuned, number)
        torch.testing.assert_close(logits(merged, number), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits(started, number), expected, atol=1e-5, rtol=0)


def test_a_base_with_an_adapter_is_merged_once_and_anew_where_the_adapter_changes(
    original, adapter, cache
):
    first = model_folder(original, "checkpoint", adapter)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert model_folder(original, "checkpoint", adapter) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    edit(adapter, lambda tensors: tensors[FIRST].mul_(2))
    assert model_folder(original, "checkpoint", adapter) == first
    assert (first / "model.safetensors").stat().st_mtime_ns > stamp


def test_the_names_of_earlier_transformers(original, adapter):
    expected = logits(load_lvlm(original, "cpu", adapter=adapter))
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors |= torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    (adapter / "non_lora_trainables.bin").unlink()
    earlier = {}
    for name, tensor in tensors.items():
        name = name.replace("model.mm_projector.0.", "multi_modal_projector.linear_1.")
        name = name.replace("model.mm_projector.2.", "multi_modal_projector.linear_2.")
        earlier[name.replace("model.layers.", "language_model.model.layers.")] = tensor
    save_file(earlier, adapter / "adapter_model.safetensors")
    assert torch.equal(logits(load_lvlm(original, "cpu", adapter=adapter)), expected)
    edit(adapter, lambda tensors: tensors.pop(f"{WRAPPER}multi_modal_projector.linear_2.bias"))
    with pytest.raises(
        InputError, match=r"1 missing .base_model\.model\.multi_modal_projector\.linear_2\.bias"
    ):
        load_lvlm(original, "cpu", adapter=adapter)


@pytest.mark.parametrize(
    "fault", ["without a tensor", "without the projector", "under other names"]
)
def test_an_adapter_of_this_kit_that_lost_something_is_refused(tmp_path, fault):
    tuned = get_peft_model(load_lvlm("phantom", "cpu").model, adapter_config(RANK, ALPHA, 0.0))
    tuned.save_pretrained(tmp_path)
    report = put_on(load_lvlm("phantom", "cpu").model, tmp_path, ("phantom", "lvlm"))[1]
    assert (report.layout, report.lora, report.whole, report.without_effect) == ("PEFT", 56, 4, 0)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = list(tensors)
        if fault == "without a tensor":
            tensors.pop(next(name for name in names if "lora_B" in name))
        elif fault == "without the projector":
            [tensors.pop(name) for name in names if "projector" in name]
        else:
            tensors |= {name.replace("layers", "blocks"): tensors.pop(name) for name in names}

    edit(tmp_path, change)
    with pytest.raises(InputError, match="does not fit phantom.*missing"):
        load_lvlm("phantom", "cpu", adapter=tmp_path)


def test_whether_an_adapter_fits_is_seen_without_weights(tmp_path):
    tuned = get_peft_model(load_lvlm("phantom", "cpu").model, adapter_config(RANK, ALPHA, 0.0))
    tuned.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(AutoConfig.from_pretrained(PHANTOM_WEIGHTS))
    model, report = put_on(empty, tmp_path, ("phantom", "lvlm"))
    assert (report.lora, report.whole) == (56, 4)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_where_an_adapter_is_looked_for(tmp_path, adapter):
    (tmp_path / "run").mkdir()
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    assert adapter_folder(tmp_path / "run") == tmp_path / "run" / "adapter"
    with pytest.raises(
        InputError, match="nobody/nothing/inside: no such folder, and not to be had"
    ):
        adapter_folder("nobody/nothing/inside")
    with pytest.raises(InputError, match="one-word: no such folder"):
        adapter_folder("one-word")
    (adapter / "adapter_config.json").write_text('{"peft_type": "NOT"}')
    with pytest.raises(InputError, match=r"adapter_config\.json: cannot be read"):
        load_lvlm("phantom", "cpu", adapter=adapter)


def test_training_starts_from_an_adapter(tmp_path):
    """The reference is base and adapter: the first loss is the mean weight times ln 2. The merge
    holds both.
    """
    base, rows = tiny_lvlm(tmp_path / "base-model"), tiny_pairs(tmp_path, 24)
    first = get_peft_model(
        LlavaForConditionalGeneration.from_pretrained(base), adapter_config(2, 4, 0.0)
    )
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    first.save_pretrained(tmp_path / "first")
    write_manifest(tmp_path / "run" / "pairs" / "train.json", rows)
    (tmp_path / "noised").rename(tmp_path / "run" / "pairs" / "noised")
    profile = load_profile(
        "phantom-smoke",
        {
            "data.source": "folder",
            "data.root": str(tmp_path),
            "output": str(tmp_path / "run"),
            "training.max_length": 64,
            "lvlm.model": str(base),
            "lvlm.base_adapter": str(tmp_path / "first"),
            "lvlm.device": "cpu",
            "training.processes": 1,
            "training.epochs": None,
            "training.max_steps": 2,
        },
    )
    target = tmp_path / "run" / "train" / "dpo-seed0"
    profile.save(target / "profile.yaml")
    run(profile, "dpo", 0, target)
    start = next(event for event in read_events(target) if "loss" in event)
    assert start["loss"] == pytest.approx(0.6931, abs=5e-3)
    both = load_lvlm(base, "cpu", target, base_adapter=tmp_path / "first")
    alone = load_lvlm(base, "cpu", target)
    merged = load_lvlm(merge(target, tmp_path / "merged"), "cpu")
    moved = load_lvlm(
        merge(
            shutil.copytree(target / "adapter", tmp_path / "moved"),
            tmp_path / "again",
            base=str(base),
            base_adapter=str(tmp_path / "first"),
        ),
        "cpu",
    )
    for number in range(2):
        expected = tiny_logits(both, number)
        torch.testing.assert_close(tiny_logits(merged, number), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(tiny_logits(moved, number), expected, atol=1e-5, rtol=0)
        assert (tiny_logits(alone, number) - expected).abs().max() > 1e-3


def tiny_logits(lvlm, number: int) -> torch.Tensor:
    image = Image.new("RGB", (28, 28), (20 * number, 90, 200))
    text = "USER: <image>\nis there a nodule ? ASSISTANT: yes"
    batch = lvlm.processor(images=image, text=text, return_tensors="pt")
    with torch.no_grad():
        return lvlm.model(**batch).logits[0]
