"""What training leaves: PEFT's own loader reads it, the card says what it is, and the merged folder
is the same model.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.settings import repository_root
from mmedpo_utils.lvlm import generate, load_lvlm
from mmedpo_utils.preference_rows import write_manifest
from mmedpo_utils.profiles import load_profile
from mmedpo_utils.programs.export import (
    add_scores,
    base_licence,
    main,
    merge,
    public_name,
    write_model_card,
)
from mmedpo_utils.programs.train import run

from .conftest import REPOSITORY
from .test_trainer import tiny_lvlm, tiny_pairs

PATH = re.compile(
    r"(?<![\w.<:/])/\w[\w.-]*/"
)  # the beginning of an absolute path; not of a closing tag or an address


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """A run folder that training filled, and the base model's folder."""
    folder = tmp_path_factory.mktemp("export")
    base, rows = tiny_lvlm(folder / "base-model"), tiny_pairs(folder, 40)
    write_manifest(folder / "run" / "pairs" / "train.json", rows)
    (folder / "noised").rename(folder / "run" / "pairs" / "noised")
    profile = load_profile(
        "phantom-smoke",
        {
            "data.source": "folder",
            "data.root": str(folder),
            "output": str(folder / "run"),
            "training.max_length": 64,
            "lvlm.model": str(base),
            "lvlm.device": "cpu",
            "training.learning_rate": 1e-2,
            "training.projector_learning_rate": 1e-2,
            "training.processes": 1,
        },
    )
    target = folder / "run" / "train" / "mmedpo-seed0"
    profile.save(target / "profile.yaml")
    run(profile, "mmedpo", 0, target)
    return target, base


def logits(model: torch.nn.Module, processor: LlavaProcessor, number: int = 0) -> torch.Tensor:
    """Logits of one fixed film and question. Shape: [T, V]."""
    image = Image.new("RGB", (28, 28), (20 * number, 90, 200))
    batch = processor(
        images=image, text="USER: <image>\nis there a nodule ? ASSISTANT: yes", return_tensors="pt"
    )
    with torch.no_grad():
        return model(**batch).logits[0]


def test_the_adapter_is_a_standard_peft_folder_with_the_projector(finished):
    folder, base = finished
    plain = LlavaForConditionalGeneration.from_pretrained(base).eval()
    processor = LlavaProcessor.from_pretrained(base)
    before = logits(plain, processor)
    projector = plain.model.multi_modal_projector.linear_1.weight.clone()
    loaded = PeftModel.from_pretrained(plain, folder / "adapter").eval()
    ours = load_lvlm(base, "cpu", adapter=folder / "adapter")
    for number in range(3):
        assert torch.equal(
            logits(loaded, processor, number), logits(ours.model, ours.processor, number)
        )
    assert (logits(loaded, processor) - before).abs().max() > 1e-3
    trained = loaded.base_model.model.model.multi_modal_projector.modules_to_save[
        "default"
    ].linear_1.weight
    assert not torch.equal(trained, projector)


def test_the_card_names_data_recipe_values_use_and_paper_and_no_path(finished):
    folder, base = finished
    card = ModelCard.load(folder / "adapter" / "README.md")
    assert card.data.base_model == "base-model" and card.data.library_name == "peft"
    assert (
        card.data.pipeline_tag == "image-text-to-text"
        and "mmedpo" in card.data.tags
        and card.data.license is None
    )
    text = card.content
    assert "20 text, 20 visual" in text and "Apache-2.0" in text and "Not for clinical use" in text
    assert "| training.learning_rate | 0.01 |" in text and "| variant.weights | rescaled |" in text
    last = json.loads((folder / "result.json").read_text())["last"]
    assert f"| loss | {last['loss']:.4g} |" in text and f"| step | {last['step']} |" in text
    entry = re.search(r"@inproceedings\{.*?\n\}", text, re.S)[0]
    assert "arXiv:2412.06141" in entry and entry.count("{") == entry.count("}")
    config = (folder / "adapter" / "adapter_config.json").read_text()
    assert json.loads(config)["base_model_name_or_path"] == "base-model"
    for written in (text, config):
        assert not PATH.search(written) and str(base.parent) not in written


def test_test_scores_are_added_once_and_replaced(finished, tmp_path):
    adapter = shutil.copytree(finished[0] / "adapter", tmp_path / "adapter")
    before = (adapter / "README.md").read_text()
    for mean in (61.2, 63.4):
        add_scores(
            adapter, {"closed_accuracy": {"mean": mean, "low": 60.0, "high": 70.04, "seeds": 3}}
        )
    after = (adapter / "README.md").read_text()
    assert (
        after.startswith(before)
        and "| closed accuracy | 63.4 (60.0 to 70.0) | 3 |" in after
        and "61.2" not in after
    )
    with pytest.raises(InputError, match="README.md: no such file"):
        add_scores(tmp_path, {})


def test_the_card_of_credentialed_data_says_so_and_a_missing_card_does_not_fail_a_run(
    finished, tmp_path
):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    rows = tiny_pairs(tmp_path, 4)
    for changes, words in (
        (
            {"data.source": "mimic-cxr", "data.card": "mimic-cxr", "data.root": str(tmp_path)},
            "credentialed",
        ),
        ({"data.source": "folder", "data.card": "gone", "data.root": str(tmp_path)}, "not at hand"),
    ):
        write_model_card(folder, load_profile("phantom-smoke", changes), "dpo", 0, rows)
        card = ModelCard.load(folder / "adapter" / "README.md")
        assert (
            words in card.content
            and card.data.base_model == "phantom"
            and card.data.license == "apache-2.0"
        )


def test_base_models_have_names_that_travel():
    assert (
        public_name("microsoft/llava-med-v1.5-mistral-7b") == "microsoft/llava-med-v1.5-mistral-7b"
    )
    assert (
        public_name(str(repository_root() / "mmedpo_utils" / "phantom")) == "mmedpo_utils/phantom"
    )
    assert public_name("/somewhere/else/my-model") == "my-model"
    assert base_licence("someone/on-the-hub") is None


def test_the_merged_folder_is_the_model_with_the_adapter_on(finished, tmp_path):
    folder, base = finished
    target = merge(folder, tmp_path / "deep" / "merged")
    tuned = load_lvlm(base, "cpu", adapter=folder / "adapter")
    plain = LlavaForConditionalGeneration.from_pretrained(target).eval()
    assert not hasattr(plain, "peft_config") and not list(target.glob("adapter*"))
    for number in range(3):
        torch.testing.assert_close(
            logits(plain, LlavaProcessor.from_pretrained(target), number),
            logits(tuned.model, tuned.processor, number),
            atol=1e-5,
            rtol=0,
        )
    assert (target / "chat_template.jinja").read_text() == tuned.processor.chat_template
    assert (target / "generation_config.json").is_file()
    profile = load_profile("phantom-smoke", {"lvlm.model": str(target)})
    used = load_lvlm(profile.lvlm.model, "cpu")
    image, question = [Image.new("RGB", (28, 28), (9, 90, 200))], ["is there a nodule ?"]
    assert generate(used, image, question, 6, 1) == generate(tuned, image, question, 6, 1)
    card = ModelCard.load(target / "README.md")
    assert card.data.library_name == "transformers" and "merged into base-model" in card.content
    assert [path.name for path in target.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize("trains", ["lora", "projector"])
def test_an_adapter_of_one_part_alone_merges_too(finished, tmp_path, trains):
    from peft.tuners.tuners_utils import DUMMY_TARGET_MODULES

    base = finished[1]
    tuned = get_peft_model(
        LlavaForConditionalGeneration.from_pretrained(base),
        LoraConfig(
            target_modules=["q_proj"] if trains == "lora" else DUMMY_TARGET_MODULES,
            init_lora_weights=False,
            modules_to_save=["multi_modal_projector"] if trains == "projector" else None,
            exclude_modules=r".*vision_tower.*",
        ),
    ).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.05)
    tuned.save_pretrained(tmp_path / "adapter")
    target = merge(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    processor, plain = (
        LlavaProcessor.from_pretrained(base),
        LlavaForConditionalGeneration.from_pretrained(target).eval(),
    )
    torch.testing.assert_close(
        logits(plain, processor), logits(tuned, processor), atol=1e-5, rtol=0
    )
    untouched = LlavaForConditionalGeneration.from_pretrained(base).eval()
    assert (logits(plain, processor) - logits(untouched, processor)).abs().max() > 1e-3


def test_an_adapter_of_4_bit_weights_merges_into_the_full_ones(finished, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = finished[1]
    small = load_lvlm(base, "cpu", quantization="nf4").model
    tuned = get_peft_model(
        small, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter")
    merged = load_lvlm(merge(tmp_path / "adapter", tmp_path / "merged", base=str(base)), "cpu")
    expected = load_lvlm(base, "cpu", adapter=tmp_path / "adapter")
    found, wanted = (logits(lvlm.model, lvlm.processor) for lvlm in (merged, expected))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert getattr(merged.model.config, "quantization_config", None) is None


def test_a_failing_merge_leaves_nothing_and_a_full_folder_is_kept(finished, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlavaProcessor, "save_pretrained", full)
    with pytest.raises(InputError, match="cannot be written.*No space left"):
        merge(finished[0], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="holds something already"):
        merge(finished[0], tmp_path)
    with pytest.raises(InputError, match="adapter_config.json"):
        merge(tmp_path, tmp_path / "merged")
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_the_command_line_merges_and_says_what_is_wrong(finished, tmp_path, monkeypatch, capsys):
    arguments = [
        "-m",
        "mmedpo_utils.programs.export",
        "--adapter",
        str(finished[0]),
        "--output",
        str(tmp_path / "merged"),
    ]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0 and (tmp_path / "merged" / "model.safetensors").is_file(), (
        done.stderr
    )
    monkeypatch.setattr(sys, "argv", arguments[1:])
    assert main() == 2 and "holds something already" in capsys.readouterr().err
