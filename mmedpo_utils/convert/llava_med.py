"""The original LLaVA layout, which LLaVA-Med 1.5 is published in, converted into a Hugging Face
folder shard by shard.

Converted folders lie under ``$HF_HOME/mmedpo`` (``~/.cache/huggingface/mmedpo`` by default). Each
holds `RECORD`, which names its source; as long as source and record agree, and what was written is
still there, the folder is used again. A conversion holds one shard in memory. A converted folder
may be deleted at any time: it is written again when it is next asked for.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from .. import __version__
from ..base.chat_templates import TEMPLATES
from ..base.errors import InputError, first_line
from ..base.files import atomic_write, read_sealed, write_json, write_sealed
from ..base.tensors import check_state
from .llava_text import IMAGE_TOKEN, image_tokenizer

RECORD = "conversion.json"
LAYOUT = 2  # raised when a conversion writes something else: earlier folders are done anew
TEXT_FILES = ["*.json", "*.jinja", "*.model"]
# Towers whose configuration need not be fetched: where the checkpoint holds the weights itself.
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
}
# What of an original configuration is the language model's.
LANGUAGE_KEYS = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range
    rms_norm_eps bos_token_id eos_token_id tie_word_embeddings rope_theta rope_scaling
    sliding_window attention_dropout attention_bias mlp_bias
    """.split()
# What is converted: other values of these settings mean another network.
SETTINGS = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "mm_vision_select_feature": ("patch", None),
    "image_aspect_ratio": ("pad", "square", None),
}
TOWER = "model.vision_tower.vision_tower.vision_model."
# Beginnings of names in the Hugging Face model, and in the original layout.
ORIGINAL = {
    "model.language_model.": "model.",
    "model.vision_tower.": TOWER,
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
}
# Beginnings of names in the original layout, and in the files that are written.
WRITTEN = {
    TOWER: "vision_tower.vision_model.",
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
TOWER_KEY = re.compile(
    r"(?:.*vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..*)"
)
# Computed from the configuration; only older files hold them.
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
# What a damaged file of weights makes its reader raise.
UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
)
# The small files that decide what a model's folder becomes.
DECIDING = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*token*",
    "*.jinja",
)
SAMPLE = 2**20  # bytes


def fetch(name: str, weights: bool = True, cached: bool = False) -> Path:
    """The local copy of a Hub repository, downloaded where needed: safetensors, or torch files
    where there are none.

    Args:
        weights: whether weights are wanted too, beside configuration and tokenizer.
        cached: never download.

    Raises:
        InputError: no such repository, no access, or not in the cache while the Hub cannot be
            reached.
    """
    wanted = [*TEXT_FILES, "*.safetensors"] if weights else TEXT_FILES
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=cached))
        if weights and not any(folder.glob("*.safetensors")):
            wanted = [*TEXT_FILES, "pytorch_model*.bin"]
            snapshot_download(name, allow_patterns=wanted, local_files_only=cached)
    except (OSError, ValueError, HfHubHTTPError) as error:
        if cached:
            raise InputError(
                f"{name}: is no folder, and was not downloaded yet; a run downloads it, or `hf "
                f"download {name}` does"
            ) from error
        raise InputError(
            f"{name}: no readable model configuration: no such folder, and not to be had from the "
            f'Hub ({first_line(error)}); expected "phantom", a folder, or a model\'s name on the '
            "Hub; without network, download it elsewhere (hf download NAME --local-dir FOLDER) and "
            "give that folder"
        ) from error
    return folder


def original_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a checkpoint in the original layout; None where the folder is of another kind
    or unreadable.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) and "mm_vision_tower" in config else None


def converted(source: Path, config: dict[str, Any], vision_tower: str, name: str) -> Path:
    """The Hugging Face folder of an original checkpoint; it is written on first use, whole or not
    at all.

    Processes that ask at the same time wait for one conversion. A warning says where the
    checkpoint's own vision tower and the one that its configuration names differ.

    Args:
        source: the checkpoint's folder.
        config: what `original_config` says of it.
        vision_tower: checkpoint (the weights inside it) | config (those of the tower that
            ``mm_vision_tower`` names, which the original loader takes).
        name: what the reader called the checkpoint: it names the folder.

    Raises:
        InputError: a setting that the layout does not allow, tensors missing or left over, no
            tower, no room on the disk.
    """
    tower = _find_tower(source, config, weights=vision_tower == "config")
    record = _record(source, config, vision_tower, name, tower)
    target = _target(record)

    def write(draft: Path) -> dict[str, Any]:
        return _convert(inspect_original(source, config, vision_tower), draft, record)

    found = cached(target, record, write)
    if found["difference"]:
        warnings.warn(found["difference"], stacklevel=4)
    return target


def converted_before(
    source: Path, config: dict[str, Any], vision_tower: str, name: str
) -> Path | None:
    """The folder that `converted` would use as it is; None where it would be written. Nothing is
    downloaded.
    """
    tower = _find_tower(source, config, weights=vision_tower == "config", download=False)
    record = _record(source, config, vision_tower, name, tower)
    target = _target(record)
    return target if _read_record(target, record) else None


def _record(
    source: Path, config: dict[str, Any], vision_tower: str, name: str, tower: Path | None
) -> dict[str, Any]:
    """What a converted folder is made of: it is used again as long as all of this is the same."""
    return {
        "layout": LAYOUT,
        "source": str(source.resolve()) if Path(name).exists() else name,
        "vision_tower": vision_tower,
        "files": folder_record(source),
        "tower": config["mm_vision_tower"],
        "tower_files": folder_record(tower if vision_tower == "config" else None),
    }


def _target(record: dict[str, Any]) -> Path:
    """The folder that a conversion with this record is written to."""
    name = f"{Path(record['source']).name}-{record['vision_tower']}"
    return cache_folder(name, f"{record['source']} {record['vision_tower']}")


def cache_folder(name: str, identity: str) -> Path:
    """Where a folder that is made once of other files is kept; ``identity`` distinguishes
    namesakes.
    """
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return Path(constants.HF_HOME) / "mmedpo" / f"{name}-{digest}"


def cached(
    target: Path, record: dict[str, Any], write: Callable[[Path], dict[str, Any] | None]
) -> dict[str, Any]:
    """Fill ``target`` once, whole or not at all; processes that ask at the same time wait for one
    of them.

    Args:
        record: what the folder is made of; where the folder's own record agrees, and it still holds
            what was written, it is used as it is.
        write: fills a draft folder that it is given, and may return more to keep in the record.

    Returns:
        the folder's record, with what ``write`` added.

    Raises:
        InputError: no room, or the folder cannot be written.
    """
    found = _read_record(target, record)
    try:
        if found is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_name(f"{target.name}.lock")):
                found = _read_record(target, record) or _fill(target, record, write)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{target}: cannot be written ({reason}); free some disk space, or set HF_HOME to a "
            "folder with room for the converted model"
        ) from error
    return found


def _fill(
    target: Path, record: dict[str, Any], write: Callable[[Path], dict[str, Any] | None]
) -> dict[str, Any]:
    """Write a draft beside ``target`` and move it there; returns its record."""
    draft = target.with_name(f".{target.name}.draft")
    old = target.with_name(f".{target.name}.old")
    try:
        # A process that was killed may have left them.
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
        draft.mkdir()
        write_json(draft / RECORD, record)  # no folder that loads is without one
        record = record | (write(draft) or {})
        files = [file for file in sorted(draft.iterdir()) if file.name != RECORD]
        record["written"] = file_record(files)
        write_sealed(draft / RECORD, record)
        # A folder cannot be renamed onto another one.
        if target.exists():
            target.rename(old)
        draft.rename(target)
    finally:
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return record


def _read_record(target: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The finished folder's record, where it is of the same source and the folder still holds what
    was written; else None.
    """
    found = read_sealed(target / RECORD)
    # The record may say more than is asked for.
    if found is None or {key: found.get(key) for key in wanted} != wanted:
        return None
    try:
        same = found["written"] == file_record(target / name for name in found["written"])
    except OSError:
        return None
    return found if same else None


@dataclass(frozen=True)
class Original:
    """What a checkpoint in the original layout becomes, before anything is written.

    Attributes:
        config: of the Hugging Face model; every tensor of it was found, in its shape.
        tower: the folder of the vision tower that the checkpoint's configuration names; None: not
            here.
        template: the name of the chat template in `chat_templates.TEMPLATES`.
        shards: per file, its keys and their names in the original layout.
    """

    source: Path
    config: LlavaConfig
    processor: LlavaProcessor
    tower: Path | None
    template: str
    shards: dict[Path, dict[str, str]]

    @property
    def bytes(self) -> int:
        """Size of the files that are read."""
        return sum(file.stat().st_size for file in self.shards)


def inspect_original(
    source: Path, config: dict[str, Any], vision_tower: str, download: bool = True
) -> Original:
    """Read all but the weights of a checkpoint in the original layout, and compare the shapes of
    these.

    Arguments and errors are those of `converted`; without ``download`` a vision tower has to be
    here.
    """
    tower = _find_tower(source, config, vision_tower == "config", download)
    called = f"{config.get('model_type')} {config.get('architectures')}".lower()
    backbone = "mistral" if "mistral" in called else "llama"
    template = "mistral_instruct" if backbone == "mistral" else "v1"
    vision, mean_std = _vision_config(config["mm_vision_tower"], tower)
    tokenizer = image_tokenizer(source, int(config.get("vocab_size", 0)))
    image_id = tokenizer.get_vocab()[IMAGE_TOKEN]
    llava = _llava_config(source, config, backbone, vision, image_id)
    shards = _plan(source, tower, vision_tower, llava)
    processor = _processor(config, vision, mean_std, tokenizer, template)
    return Original(source, llava, processor, tower, template, shards)


def _convert(found: Original, draft: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write the converted model into ``draft``. Returns what its record says beside its source."""
    difference = _difference(found.source, found.tower, record["tower"], record["vision_tower"])
    try:
        print(
            f"converting {record['source']} ({found.bytes / 1e9:.1f} GB), once, into "
            f"{draft.parent}",
            flush=True,
        )
        free = shutil.disk_usage(draft).free
        if free < found.bytes:
            raise OSError(f"{found.bytes / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        found.processor.save_pretrained(draft)
        text: Any = found.config.text_config
        generation = GenerationConfig(
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=found.processor.tokenizer.pad_token_id,
        )
        generation.save_pretrained(draft)
        _write_shards(found.shards, draft)
        found.config.save_pretrained(draft)
    except (SafetensorError, RuntimeError) as error:
        raise OSError(first_line(error)) from error
    return {"template": found.template, "package": __version__, "difference": difference}


def weight_files(folder: Path | None) -> list[Path]:
    """The files that hold a folder's weights: safetensors where there are any, else torch files.

    Raises:
        InputError: the folder's index names a file that is not there.
    """
    if folder is None:
        return []
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = _indexed_files(index)
        else:
            stem, suffix = name.rsplit(".", 1)
            files = sorted(folder.glob(f"{stem}*.{suffix}"))
        if files:
            return files
    return []


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index of shards names, each of which has to be there."""
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        elsewhere = [file for file in named if Path(file).name != file]
        if elsewhere:
            raise ValueError(f"it names {elsewhere[0]!r:.60}, which is no file beside it")
        files = [index.parent / file for file in sorted(named)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(
            f"{index}: cannot be read as an index of weights ({first_line(error)}); "
            "download it again"
        ) from error
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{file}: no such file, though {index.name} names it; download it again"
            )
    return files


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of one file, mapped and not loaded where its format allows. A pickle cannot run
    code.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: not to be mapped
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise InputError(
            f"{file}: cannot be read as weights ({first_line(error)}); the file is damaged or cut "
            "short: download it again"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, Tensor) for tensor in tensors.values()
    ):
        raise InputError(
            f"{file}: cannot be read as weights; expected a dictionary of tensors by name"
        )
    return tensors


def read_shapes(file: Path) -> dict[str, Tensor]:
    """Tensors of one file on the meta device: names and shapes. Of safetensors only the head is
    read.
    """
    if file.suffix != ".safetensors":
        return {name: tensor.to("meta") for name, tensor in read_tensors(file).items()}
    try:
        with safe_open(file, "pt") as opened:
            return {
                name: torch.empty(opened.get_slice(name).get_shape(), device="meta")
                for name in opened.keys()
            }
    except UNREADABLE as error:
        raise InputError(
            f"{file}: cannot be read as weights ({first_line(error)}); the file is damaged or cut "
            "short: download it again"
        ) from error


def folder_record(folder: Path | None) -> dict[str, list[Any]]:
    """`file_record` of every file of a model's folder that decides what it becomes; empty for
    None.
    """
    if folder is None:
        return {}
    texts: list[Path] = []
    for pattern in DECIDING:
        texts += sorted(folder.glob(pattern))
    return file_record([*texts, *weight_files(folder)])


def file_record(files: Iterable[Path]) -> dict[str, list[Any]]:
    """Size and a SHA-256 of each file; of a large one, of a MiB at its start, its middle and its
    end.
    """
    found = {}
    for file in files:
        size = file.stat().st_size
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            for start in (0, max(0, size // 2), max(0, size - SAMPLE)):
                stream.seek(start)
                digest.update(stream.read(SAMPLE))
        found[file.name] = [size, digest.hexdigest()]
    return found


def _find_tower(
    source: Path, config: dict[str, Any], weights: bool, download: bool = True
) -> Path | None:
    """The folder of the vision tower that the configuration names. None: not here, and its
    configuration is known.
    """
    name = str(config["mm_vision_tower"])
    for folder in (Path(name), source / name, source.parent / name):
        if (folder / "config.json").is_file():
            return folder
    known = not weights and name in KNOWN_TOWERS
    try:
        # A known configuration is not worth a download, but one in the cache is taken.
        folder = fetch(name, weights, cached=known or not download)
        return None if known and not (folder / "config.json").is_file() else folder
    except InputError as error:
        if known:
            return None
        own = ""
        if weights:
            own = "; or set lvlm.vision_tower to checkpoint, for the one inside the checkpoint"
        raise InputError(
            f"{source / 'config.json'}: `mm_vision_tower` names {name!r}, which is no folder "
            "(here, in the checkpoint or beside it) and not to be had from the Hub; download it, "
            f"and put it beside the checkpoint under that name{own}"
        ) from error


def _vision_config(name: str, tower: Path | None) -> tuple[CLIPVisionConfig, dict[str, Any]]:
    """The tower's configuration, and the mean and std of its images where its folder says them."""
    if tower is None:
        return CLIPVisionConfig(**KNOWN_TOWERS[name]), {}
    try:
        file = tower / "preprocessor_config.json"
        images = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        mean_std = {key: images[key] for key in ("image_mean", "image_std") if key in images}
        return CLIPVisionConfig.from_pretrained(tower), mean_std
    except (
        OSError,
        ValueError,
        AttributeError,
        TypeError,
        RecursionError,
        StrictDataclassError,
    ) as error:
        raise InputError(
            f"{tower}: cannot be read as a CLIP vision tower ({first_line(error)}); expected "
            "config.json of a CLIPVisionModel or CLIPModel"
        ) from error


def _llava_config(
    source: Path, config: dict[str, Any], backbone: str, vision: CLIPVisionConfig, image_id: int
) -> LlavaConfig:
    """The Hugging Face configuration of an original one. Raises InputError: a setting with another
    meaning than ours.
    """
    for key, expected in SETTINGS.items():
        if config.get(key) not in expected:
            raise InputError(
                f"{source / 'config.json'}: `{key}` is {config.get(key)!r}; expected "
                f"{expected[0]!r}, as in LLaVA-Med 1.5"
            )
    given = {key: config[key] for key in LANGUAGE_KEYS if key in config}
    try:
        llava = LlavaConfig(
            text_config=AutoConfig.for_model(backbone, **given),
            vision_config=vision,
            image_token_index=image_id,
            image_seq_length=_patches(vision),
            vision_feature_layer=config.get("mm_vision_select_layer", -2),
            dtype=config.get("torch_dtype"),
        )
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise InputError(
            f"{source / 'config.json'}: is not a {backbone} configuration ({first_line(error)})"
        ) from error
    llava.architectures = ["LlavaForConditionalGeneration"]
    return llava


def _patches(vision: CLIPVisionConfig) -> int:
    """How many patches a tower makes of an image. Raises TypeError: it is not for squares."""
    size = vision.image_size
    patch = vision.patch_size
    if not isinstance(size, int) or not isinstance(patch, int):
        raise TypeError("image_size and patch_size are one number each")
    return (size // patch) ** 2


def _processor(
    config: dict[str, Any],
    vision: CLIPVisionConfig,
    mean_std: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    template: str,
) -> LlavaProcessor:
    """The processor as the original code prepares images: padded to a square where it says so."""
    size: Any = vision.image_size
    images = LlavaImageProcessorPil(
        do_pad=config.get("image_aspect_ratio") == "pad",
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        **mean_std,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=TEMPLATES[template],
    )


def _plan(
    source: Path, tower: Path | None, vision_tower: str, llava: LlavaConfig
) -> dict[Path, dict[str, str]]:
    """What goes into which shard: ``{file: {its key: the original layout's key}}``.

    Raises:
        InputError: a tensor is missing, left over or of another shape.
    """
    plan: dict[Path, dict[str, str]] = {}
    shapes: dict[str, Tensor] = {}
    files = weight_files(source)
    if not files:
        raise InputError(
            f"{source}: holds no weights; expected model*.safetensors or pytorch_model*.bin"
        )
    own_tower = vision_tower == "checkpoint"
    for file in files:
        tensors = read_shapes(file)
        taken = [key for key in tensors if own_tower or not key.startswith(TOWER)]
        plan[file] = {key: key for key in taken if not key.endswith(BUFFERS)}
        twice = sorted(shapes.keys() & plan[file].keys())
        if twice:
            raise InputError(
                f"{file}: holds {twice[0]}, as an earlier file of the checkpoint does, and nobody "
                "knows which one is meant: download it again"
            )
        shapes |= {key: tensors[key] for key in plan[file]}
    if own_tower and not any(key.startswith(TOWER) for key in shapes):
        raise InputError(
            f"{source}: holds no vision tower ({TOWER}...); set lvlm.vision_tower to config, for "
            "the one that its configuration names"
        )
    if not own_tower:
        for file in weight_files(tower):
            tensors = read_shapes(file)
            plan[file] = _tower_names(tensors)
            shapes |= {name: tensors[key] for key, name in plan[file].items()}
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava)
    # Compared in the original layout's names, which the reader's files have.
    wanted = {renamed(key, ORIGINAL): tensor for key, tensor in model.state_dict().items()}
    check_state(source, shapes, wanted)
    return {file: keys for file, keys in plan.items() if keys}


def _tower_names(keys: Iterable[str]) -> dict[str, str]:
    """The keys of a CLIP model's file that are its vision tower's, by the original layout's."""
    names = {}
    for key in keys:
        match = TOWER_KEY.fullmatch(key)
        if match and not key.endswith(BUFFERS):
            names[key] = TOWER + match[1]
    return names


def renamed(key: str, prefixes: dict[str, str]) -> str:
    """``key`` with the first of ``prefixes`` that it begins with replaced; itself where none
    does.
    """
    for old, new in prefixes.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _write_shards(plan: dict[Path, dict[str, str]], folder: Path) -> None:
    """One safetensors shard per file of ``plan``, and their index."""
    places: dict[str, str] = {}
    size = 0
    for number, (file, keys) in enumerate(plan.items(), start=1):
        name = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = read_tensors(file)
        part = {renamed(keys[key], WRITTEN): tensors[key].contiguous() for key in keys}
        with atomic_write(folder / name) as temporary:
            save_file(part, temporary, {"format": "pt"})
        places |= dict.fromkeys(part, name)
        size += sum(tensor.nbytes for tensor in part.values())
        del tensors, part  # before the next shard is read
    index = {"metadata": {"total_size": size}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


def _difference(source: Path, tower: Path | None, name: str, vision_tower: str) -> str | None:
    """What to warn of where the checkpoint's own tower and the configuration's are both here and
    differ.
    """
    own: dict[str, Tensor] = {}
    for file in weight_files(source):
        for key, tensor in read_tensors(file).items():
            if key.startswith(TOWER):
                own[key.removeprefix(TOWER)] = tensor
    largest: list[float] = []
    for file in weight_files(tower):
        for key, tensor in read_tensors(file).items():
            match = TOWER_KEY.fullmatch(key)
            stored = own.get(match[1]) if match else None
            if stored is None or tensor.shape != stored.shape:
                continue
            # Rounded as the checkpoint's own is: a narrower type is no other tower.
            rounded = tensor.to(stored.dtype).float()
            largest.append(float((rounded - stored.float()).abs().max()))
    differing = [value for value in largest if value != 0]
    if not differing:
        return None
    return (
        f"{source}: the checkpoint's own vision tower differs from {name} in {len(differing)} "
        f"of {len(largest)} tensors (largest difference {max(differing):.2g}); "
        f"lvlm.vision_tower is {vision_tower}"
    )
