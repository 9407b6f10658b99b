"""What training leaves: the model card of an adapter, and adapter and base merged into a plain
Hugging Face folder.

    mmedpo export --adapter runs/phantom/train/mmedpo-seed0 --output mmedpo-merged

The adapter itself is a standard PEFT folder with the projector in it:
``PeftModel.from_pretrained(base, folder)`` loads it.
"""

from __future__ import annotations

import argparse
import html
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from yaml import YAMLError

from ..base.cards import load_card
from ..base.chat_templates import TEMPLATES
from ..base.errors import InputError, exit_status, first_line, one_line
from ..base.files import atomic_write, load_object, read_text, write_json
from ..base.locks import turn
from ..base.rows import Row
from ..base.sections import LanguageModel
from ..base.settings import repository_root
from ..convert.adapters import adapter_folder
from ..convert.model_folder import save_merged
from ..lvlm import PHANTOM_WEIGHTS, VISION_TOWERS, MedLVLM, load_lvlm
from ..preference_rows import row_source
from ..profiles import Profile, load_profile
from ..run_folder import last_values

TAGS = ["mmedpo", "dpo", "lora", "medical", "llava"]
SCORES_HEADING = "\n## Test scores\n"
BASE = "base.json"  # beside the adapter: how the base model was loaded that it was trained on
# Keys of the profile's section lvlm that say so.
LOADING = ("vision_tower", "template", "base_adapter")
LIBRARY = "library_name: {}\n"
USE = """For research and teaching on preference optimisation of medical vision-language models.
**Not for clinical use**: its answers are not checked by anyone, and no diagnosis or treatment may
rest on them."""
CITATION = """```bibtex
@inproceedings{zhu2025mmedpo,
  title     = {{MMedPO}: Aligning Medical Vision-Language Models with Clinical-Aware
               Multimodal Preference Optimization},
  author    = {Zhu, Kangyu and Xia, Peng and Li, Yun and Zhu, Hongtu and Wang, Sheng and
               Yao, Huaxiu},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  series    = {PMLR 267},
  year      = {2025},
  note      = {arXiv:2412.06141}
}
```"""


def write_model_card(
    folder: Path, profile: Profile, name: str, seed: int, rows: Sequence[Row]
) -> None:
    """Write ``adapter/README.md`` in a run folder: data, recipe, last logged values, use, citation;
    no path of this machine.

    The base model is called by its public name, in the card and in ``adapter_config.json``.

    Args:
        folder: the run folder, with ``adapter/`` and ``events.jsonl`` in it.
        name: the variant that was trained.
        rows: the variant's pairs.

    Raises:
        InputError: the adapter's configuration cannot be read, or the card cannot be written.
    """
    adapter = folder / "adapter"
    base = public_name(profile.lvlm.model)
    config = load_object(adapter / "adapter_config.json", "the configuration of a PEFT adapter")
    config["base_model_name_or_path"] = base
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()  # PEFT keeps a set, whose order is another each time
    write_json(adapter / "adapter_config.json", config)
    settings = {key: getattr(profile.lvlm, key) for key in LOADING}
    if settings["base_adapter"]:
        settings["base_adapter"] = public_name(settings["base_adapter"])
    write_json(adapter / BASE, settings)
    header = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=TAGS,
        license=base_licence(profile.lvlm.model),
    )
    logged = [(key, f"{value:.4g}") for key, value in last_values(folder).items()]
    sections = {
        "Data": _data_text(profile, rows),
        "Recipe": _table(("setting", "value"), _recipe(profile, name, seed)),
        "Last logged values": _table(("value", ""), logged),
        "Intended use": USE,
        "Citation": CITATION,
    }
    loading = ", ".join(f"{key} `{settings[key]}`" for key in LOADING)
    text = (
        f"---\n{header}\n---\n\n# {profile.name}: {name}\n\n"
        f"LoRA weights and projector for {base}, trained with the recipe `{name}` (seed {seed}) of "
        "the MMedPO notebooks (arXiv 2412.06141). Load it with `PeftModel.from_pretrained`.\n"
        f"The base model is loaded with {loading}, as `mmedpo_utils.lvlm.load_lvlm` takes them.\n"
    )
    for title, content in sections.items():
        text += f"\n## {title}\n\n{content}\n"
    _write(adapter / "README.md", text)


def add_scores(adapter: Path, scores: dict[str, dict[str, float]]) -> None:
    """Put test scores into an adapter's model card, in place of earlier ones.

    Args:
        scores: one model's row of ``comparison.score_table``: mean, low, high and seeds per metric,
            in percent.

    Raises:
        InputError: the adapter has no model card.
    """
    card = Path(adapter) / "README.md"
    if not card.is_file():
        raise InputError(
            f"{card}: no such file; train the variant again, or call write_model_card first"
        )
    rows = []
    for metric, score in scores.items():
        value = f"{score['mean']:.1f} ({score['low']:.1f} to {score['high']:.1f})"
        rows.append((metric.replace("_", " "), value, score["seeds"]))
    table = _table(("score", "percent, with 95% interval", "training seeds"), rows)
    # The scores are the card's last section: earlier ones go with all that follows the title.
    before = card.read_text(encoding="utf-8").partition(SCORES_HEADING)[0]
    _write(card, f"{before}{SCORES_HEADING}\n{table}\n")


def public_name(model: str) -> str:
    """How a base model is called elsewhere: its Hub name, its path in the repository, or else its
    folder's own name.
    """
    path = Path(model)
    root = repository_root()
    if not path.is_absolute():
        return model
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def base_licence(model: str) -> str | None:
    """The licence in the model card of a base model's folder; None where there is none, as for a
    name on the Hub.
    """
    folder = PHANTOM_WEIGHTS if model == "phantom" else Path(model)
    file = folder / "README.md"
    try:
        return ModelCard.load(file).data.license if file.is_file() else None
    except (OSError, ValueError, YAMLError):  # somebody else's card, which no run shall fail of
        return None


def _data_text(profile: Profile, rows: Sequence[Row]) -> str:
    """The data set, its terms, and how many pairs of each source were trained on."""
    by_source = sorted(Counter(map(row_source, rows)).items())
    pairs = ", ".join(f"{count} {source}" for source, count in by_source)
    pairs_line = f"- preference pairs: {pairs}, validation pairs among them"
    try:
        card = load_card(profile.data.card)
    except InputError:
        # A cluster node may hold the pairs alone, and a finished run must not fail here.
        return f"- data set: {profile.data.card}; its card was not at hand\n{pairs_line}"
    lines = [
        f"- data set: {card.title} (card `{card.name}`)",
        f"- terms: {card.licence}",
        pairs_line,
    ]
    if card.credentialed:
        lines.append(
            "- the data is credentialed: this adapter has learnt from it, so that its terms hold "
            "for the adapter too"
        )
    return "\n".join(lines)


def _recipe(profile: Profile, name: str, seed: int) -> list[tuple[str, Any]]:
    """Every value that decides the weights, by its key in the profile. Addresses, key names and
    paths are left out.
    """
    values = profile.as_dict()
    training = values["training"]
    del training["hostfile"], training["variants"]
    sections = {
        "variant": asdict(profile.training.variants[name]),
        "training": training,
        "noise": values["noise"],
        "relevance": values["relevance"],
        "curation": values["curation"],
    }
    rows: list[tuple[str, Any]] = [("seed", seed)]
    for key in ("quantization", "vision_tower", "template"):
        rows.append((f"lvlm.{key}", values["lvlm"][key]))
    start = profile.lvlm.base_adapter
    rows.append(("lvlm.base_adapter", public_name(start) if start else None))
    for section, settings in sections.items():
        for key, value in settings.items():
            rows.append((f"{section}.{key}", value))
    judge = profile.judge
    if isinstance(judge.judge, LanguageModel):
        rows.append(("judge.judge", public_name(judge.judge.model)))
    for member, model in (judge.panel or {}).items():
        rows.append((f"judge.panel.{member}", public_name(model.model)))
    rows.append(("judge.backend", judge.backend))
    return rows


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = []
    for row in (head, ("---",) * len(head), *rows):
        cells = " | ".join(_cell(value) for value in row)
        lines.append(f"| {cells} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """A value for a table: what a name or a path holds is shown, and never read as Markdown or
    HTML.
    """
    if value is None:
        return "none"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return html.escape(one_line(text), quote=False).replace("|", "\\|")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def merge(
    adapter: str | Path,
    output: str | Path,
    base: str | None = None,
    device: str = "cpu",
    base_adapter: str | None = None,
) -> Path:
    """Write base model and adapter as one Hugging Face LLaVA folder, whole or not at all: usable as
    ``lvlm.model``.

    It holds the model with LoRA merged and the trained projector, the processor with its chat
    template, the generation settings and the adapter's model card. The base is never quantised
    here: an adapter that was trained on 4-bit weights is merged into the full ones, float32 on the
    CPU and bfloat16 on a GPU. That is not bit for bit the model it was trained on, but nearer to
    the original weights than a merge into the rounded ones.

    Args:
        adapter: a run folder, the adapter folder in it, or anybody's that `adapters.adapter_folder`
            finds.
        output: a folder that does not exist yet, or an empty one.
        base: the model that the adapter was trained on; None: what the run's profile or the adapter
            itself names.
        device: auto | cpu | cuda.
        base_adapter: the adapter that was merged into the base before; None: as for ``base``.

    Raises:
        InputError: no adapter, another base model, ``output`` holds something already, or no room
            to write.
    """
    adapter = adapter_folder(adapter)
    output = Path(output).resolve()
    _refuse_what_is_there(output)
    lvlm = _load(adapter, base, device, base_adapter)
    draft = output.with_name(f".{output.name}.mmedpo")
    try:
        with turn(output):
            _refuse_what_is_there(output)
            shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
            try:
                draft.mkdir()
                _save(lvlm, adapter, draft)
                os.replace(draft, output)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{output}: cannot be written ({reason}); free some disk space, or choose another "
            "output folder"
        ) from error
    return output


def _refuse_what_is_there(output: Path) -> None:
    """Raises InputError: the folder holds something."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(
            f"{output}: holds something already; remove it, or choose another output folder"
        )


def _load(adapter: Path, base: str | None, device: str, base_adapter: str | None) -> MedLVLM:
    """The unquantised base model with the adapter on top."""
    config = load_object(adapter / "adapter_config.json", "the configuration of a PEFT adapter")
    record = adapter.parent / "profile.yaml"
    settings: dict[str, Any] = {}
    if record.is_file():
        values = load_profile(record).lvlm
        base = base or values.model
        settings = {key: getattr(values, key) for key in LOADING}
    elif (adapter / BASE).is_file():
        settings = _stored_loading(adapter / BASE)
    if base_adapter is not None:
        settings["base_adapter"] = base_adapter
    base = base or config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{adapter / 'adapter_config.json'}: `base_model_name_or_path` names no model; give "
            "the base model"
        )
    return load_lvlm(base, device, adapter, **settings)


def _stored_loading(file: Path) -> dict[str, str | None]:
    """How the base model of an adapter is loaded, as `write_model_card` has left it."""
    stored = load_object(file, "how the adapter's base model is loaded")
    settings = {key: stored[key] for key in LOADING if key in stored}
    known = {"vision_tower": VISION_TOWERS, "template": (None, *TEMPLATES)}
    for key, value in settings.items():
        if key in known and value not in known[key]:
            raise InputError(
                f"{file}: `{key}`: {one_line(repr(value))} is not known; expected one of "
                f"{known[key]}: correct it, or remove the file"
            )
        if not isinstance(value, str | None):
            raise InputError(
                f"{file}: `{key}`: expected an adapter's folder or name, or null; found "
                f"{one_line(repr(value))}: correct it, or remove the file"
            )
    return settings


# How the card of an adapter becomes the card of the merged model.
MERGED = {
    LIBRARY.format("peft"): LIBRARY.format("transformers"),
    "LoRA weights and projector for": "LoRA weights and projector merged into",
    "`PeftModel": "`LlavaForConditionalGeneration",
}


def _save(lvlm: MedLVLM, adapter: Path, folder: Path) -> None:
    """Write the merged model and, where the adapter has one, its card."""
    save_merged(lvlm, folder)
    card = adapter / "README.md"
    if card.is_file():
        text = read_text(card)
        for of_adapter, of_merged in MERGED.items():
            text = text.replace(of_adapter, of_merged, 1)
        _write(folder / "README.md", text)


def main() -> int:
    """Command line of ``merge``."""
    parser = argparse.ArgumentParser(
        description="Merge an adapter into its base model: a plain Hugging Face folder."
    )
    parser.add_argument(
        "--adapter", type=Path, required=True, help="a run folder, or a PEFT adapter folder"
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--base",
        help="the base model, where the run's profile or the adapter does not name it rightly",
    )
    parser.add_argument(
        "--base-adapter", help="the adapter that was merged into the base before, in the same case"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        choices=("auto", "cpu", "cuda"),
        help="cpu: float32; cuda: bfloat16",
    )
    options = parser.parse_args()

    def action() -> None:
        folder = merge(
            options.adapter, options.output, options.base, options.device, options.base_adapter
        )
        print(f"written: {folder}")

    return exit_status(action)


if __name__ == "__main__":
    sys.exit(main())
