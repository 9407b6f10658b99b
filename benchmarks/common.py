"""What the training benchmarks share: a random LLaVA, pairs, stock TRL's trainer and ours, and the
processes that run them.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List
from datasets import Image as Picture
from memory import peak_resident_bytes
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mmedpo_utils.base.environment import provenance  # noqa: E402
from mmedpo_utils.base.precision import train_in_32_bits  # noqa: E402
from mmedpo_utils.base.rows import Row, question_text  # noqa: E402
from mmedpo_utils.base.tensors import model_digest  # noqa: E402
from mmedpo_utils.lvlm import MedLVLM, generate, load_lvlm  # noqa: E402
from mmedpo_utils.preference_rows import answer_text, read_manifest, write_manifest  # noqa: E402
from mmedpo_utils.scale.fast_trainer import FastTrainer, PackingCollator  # noqa: E402
from mmedpo_utils.trainer import adapter_config, preference_dataset  # noqa: E402

PATCH = 14  # pixels
MAX_LENGTH = 1024
SEED = 3
BETA = 0.1
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", ":")
TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for item in message['content'] %}{{ '<image>\n' if item['type'] == 'image' else "
    "item['text'] }}{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA: a Mistral language model, a CLIP tower of 14-pixel patches over square
    images.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tower_hidden_size: int
    tower_intermediate_size: int
    tower_layers: int
    tower_heads: int
    image_size: int = 336

    @property
    def image_tokens(self) -> int:
        """How many tokens one image becomes."""
        return (self.image_size // PATCH) ** 2


SHAPES = {
    "small": Shape(384, 1344, 6, 6, 2, 640, 96, 384, 3, 2),
    "tiny": Shape(32, 48, 2, 2, 1, 200, 32, 48, 3, 2, image_size=56),
    "llava-med-1.5": Shape(4096, 14336, 32, 32, 8, 32000, 1024, 4096, 24, 16),
}


@dataclass(frozen=True)
class Job:
    """One training to measure. ``side`` is trl or ours; the switches are ours alone.

    Attributes:
        data: text, mixed (text and visual pairs by turns) or lengths (text pairs, short answers and
            reports by turns).
        pairs: how many pairs, ``epochs``: how often each is seen, ``batch_size``: how many in a
            step.
        lora_rank: rank of the adapter; its alpha is twice as much.
        quantization, device, gradient_checkpointing, optimizer: as in a profile.
    """

    side: str
    data: str
    pairs: int
    epochs: int
    batch_size: int
    lora_rank: int
    learning_rate: float
    shared_prefix: bool = True
    cache_reference: bool = False
    group_by_length: bool = False
    attention: str = "sdpa"
    quantization: str = "none"
    device: str = "cpu"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw_torch"


def word(number: int) -> str:
    """One of the vocabulary's words."""
    return f"word{number}"


def lvlm_config(shape: Shape) -> LlavaConfig:
    """A LLaVA's configuration: features of the tower's last layer but one, without its class
    token.
    """
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.tower_hidden_size,
            intermediate_size=shape.tower_intermediate_size,
            image_size=shape.image_size,
            num_hidden_layers=shape.tower_layers,
            num_attention_heads=shape.tower_heads,
            patch_size=PATCH,
        ),
        text_config=MistralConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=2 * MAX_LENGTH,
            sliding_window=None,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=shape.image_tokens,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )


def save_lvlm(folder: Path, shape: Shape, device: str) -> None:
    """Write a LLaVA of random weights with its processor, in the Hugging Face layout: bf16 from a
    GPU, else float32.
    """
    names = [*SPECIAL, *(word(number) for number in range(shape.vocabulary - len(SPECIAL)))]
    ids = {name: number for number, name in enumerate(names)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    size = shape.image_size
    images = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    set_seed(SEED)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(lvlm_config(shape), dtype=dtype)
    model.save_pretrained(folder, max_shard_size="2GB")


def draw_pairs(folder: Path, job: Job, shape: Shape) -> None:
    """Write ``folder``/pairs.json, the manifest of ``job``, with its films under ``folder``/images
    and ``folder``/noised.
    """
    rng = np.random.default_rng(SEED)
    rows = []
    for number in range(job.pairs):
        _draw_film(folder / "images" / f"{number}.png", shape, rng)
        _draw_film(folder / "noised" / f"{number}.png", shape, rng)
        odd = number % 2 == 1
        is_visual = job.data == "mixed" and odd
        low, high = (100, 200) if job.data == "lengths" and odd else (3, 12)
        question = {"from": "human", "value": f"<image>\n{_draw_text(shape, rng, 10, 20)}"}
        chosen = _draw_text(shape, rng, low, high)
        rejected = _draw_text(shape, rng, low, high)
        # A visual pair is one answer about two images.
        if is_visual:
            rejected = chosen
        row = {
            "id": number,
            "image": f"{number}.png",
            "rejected_image": f"{number}.png" if is_visual else None,
            "conversations": [question, {"from": "gpt", "value": chosen}],
            "weighted_score": 1.0,
            "rejected_conversations": [question, {"from": "gpt", "value": rejected}],
        }
        rows.append(row)
    write_manifest(folder / "pairs.json", rows)


def _draw_text(shape: Shape, rng: np.random.Generator, low: int, high: int) -> str:
    """At least ``low`` and less than ``high`` words of the vocabulary."""
    length = rng.integers(low, high)
    numbers = rng.integers(0, shape.vocabulary - len(SPECIAL), length)
    return " ".join(word(number) for number in numbers)


def _draw_film(path: Path, shape: Shape, rng: np.random.Generator) -> None:
    """Write a grey film of smooth blobs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(rng.integers(0, 255, (24, 24), dtype=np.uint8))
    size = (shape.image_size, shape.image_size)
    coarse.resize(size, Image.Resampling.BICUBIC).save(path)


class RejectedImages:
    """TRL's collator repeats the images for the rejected half of a batch; this processor takes
    others there, and no more.
    """

    def __init__(self, processor: Any, images: list[list[Image.Image]]) -> None:
        self.processor = processor
        self.images = images

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, images: list[list[Image.Image]] | None = None, **others: Any) -> Any:
        if images:
            images = images[: len(self.images)] + self.images
        return self.processor(images=images, **others)


class TwoImageCollator(DataCollatorForVisionPreference):
    """TRL's vision collator, with the one thing that it cannot do: the rejected half of a batch has
    images of its own.
    """

    processor: Any

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows that carry ``rejected_images`` beside TRL's own columns."""
        own = self.processor
        rejected_images = [example.pop("rejected_images") for example in examples]
        self.processor = RejectedImages(own, rejected_images)
        try:
            return super().torch_call(examples)
        finally:
            self.processor = own


def arguments(job: Job, folder: Path) -> DPOConfig:
    """The trainer's arguments, the same for both sides. Pairs come in their own order, or grouped
    by length.
    """
    cuda = job.device == "cuda"
    return DPOConfig(
        output_dir=str(folder),
        seed=SEED,
        beta=BETA,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        num_train_epochs=job.epochs,
        per_device_train_batch_size=job.batch_size,
        per_device_eval_batch_size=job.batch_size,
        max_length=MAX_LENGTH,
        bf16=cuda or job.quantization == "nf4",
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        optim=job.optimizer,
        gradient_checkpointing=job.gradient_checkpointing,
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if job.group_by_length else "sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def trl_dataset(rows: list[Row], folder: Path, two_images: bool) -> Dataset:
    """The pairs as TRL documents them: images, and prompt, chosen and rejected as messages."""

    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    pairs = []
    for row in rows:
        image = str(folder / "images" / row["image"])
        pair = {
            "images": [image],
            "prompt": message("user", question_text(row)),
            "chosen": message("assistant", answer_text(row)),
            "rejected": message("assistant", answer_text(row, True)),
        }
        if two_images:
            rejected = row["rejected_image"]
            pair["rejected_images"] = [str(folder / "noised" / rejected) if rejected else image]
        pairs.append(pair)
    dataset = Dataset.from_list(pairs).cast_column("images", List(Picture()))
    if two_images:
        dataset = dataset.cast_column("rejected_images", List(Picture()))
    return dataset


def build(
    job: Job, lvlm: MedLVLM, rows: list[Row], folder: Path, callbacks: list[TrainerCallback]
) -> DPOTrainer:
    """The side's trainer over ``rows``; it writes to ``folder``."""
    processor = lvlm.processor
    data = folder.parent / job.data
    same: dict[str, Any] = {
        "args": arguments(job, folder / "run"),
        "processing_class": processor,
        "callbacks": callbacks,
        "peft_config": adapter_config(job.lora_rank, 2 * job.lora_rank, dropout=0.0),
    }
    trainer: Any
    if job.side == "trl":
        two_images = job.data == "mixed"
        trainer = DPOTrainer(
            lvlm.model,
            train_dataset=trl_dataset(rows, data, two_images),
            # None: TRL's own.
            data_collator=TwoImageCollator(processor, max_length=MAX_LENGTH)
            if two_images
            else None,
            **same,
        )
    else:
        weights = [1.0] * len(rows)
        padding = processor.tokenizer.pad_token_id
        trainer = FastTrainer(
            lvlm.model,
            projector_learning_rate=job.learning_rate,
            cache_reference=job.cache_reference,
            reference_cache=folder / "reference.json",
            train_dataset=preference_dataset(
                rows, weights, processor, data / "images", data / "noised", MAX_LENGTH
            ),
            data_collator=PackingCollator(padding, MAX_LENGTH, processor, job.shared_prefix),
            **same,
        )
        train_in_32_bits(trainer.model)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Clock(TrainerCallback):
    """Seconds before the first step, then of every step, its batch included."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def note(self) -> None:
        """Keep the time at which a GPU has finished what it was given."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Begin, before a reference is computed ahead."""
        self.note()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The first step begins."""
        if len(self.times) == 1:
            self.note()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """A step is done."""
        self.note()


def train_once(job: Job, folder: Path, rows: list[Row]) -> dict[str, Any]:
    """Train a fresh model on ``rows`` with the job's side.

    Returns:
        ``seconds``: the data set, the trainer around the loaded model, the reference where it is
        computed ahead, all steps; ``ahead_seconds`` before the first step; ``step_seconds`` and
        ``losses`` of every step; ``initial``: a digest of the untrained model.
    """
    clock = Clock()
    # A reference of an earlier round would be read instead of computed.
    (folder / "reference.json").unlink(missing_ok=True)
    lvlm = load_lvlm(folder.parent / "model", job.device, quantization=job.quantization)
    # One token, so that a GPU has loaded its kernels before the clock starts.
    generate(lvlm, [Image.new("L", (64, 64))], [word(0)], max_new_tokens=1, batch_size=1)
    if job.attention != "sdpa":
        lvlm.llava.model.language_model.set_attn_implementation(job.attention)
    began = time.perf_counter()
    trainer = build(job, lvlm, rows, folder, [clock])
    built = time.perf_counter()
    assert trainer.model is not None
    initial = model_digest(trainer.model)  # not in the time of the training
    ready = time.perf_counter()
    trainer.train()
    ended = time.perf_counter()
    ahead, *steps = (after - before for before, after in pairwise(clock.times))
    return {
        "seconds": (built - began) + (ended - ready),
        "ahead_seconds": ahead,
        "step_seconds": steps,
        "initial": initial,
        "losses": [event["loss"] for event in trainer.state.log_history if "loss" in event],
    }


def peak_bytes(device: str) -> int:
    """The most memory that this process has held: tensors on a GPU, else resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def work(job: Job, folder: Path, threads: int, pipe: Connection) -> None:
    """A worker's life: on the CPU two steps to warm up, then one training per message, until the
    pipe is closed.
    """
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(threads)
    rows = read_manifest(folder.parent / job.data / "pairs.json")[: job.pairs]
    if job.device == "cpu":
        train_once(replace(job, epochs=1), folder, rows[: 2 * job.batch_size])
    pipe.send("ready")
    with suppress(EOFError):
        while pipe.recv():
            gc.collect()
            pipe.send(train_once(job, folder, rows) | {"peak_bytes": peak_bytes(job.device)})


class Worker:
    """A process of its own for one job: ``run`` trains once and returns what `train_once` and
    `peak_bytes` say.

    Processes that stay on the CPU are forked from one that has imported the libraries; a GPU needs
    fresh ones.
    """

    def __init__(self, name: str, job: Job, folder: Path, threads: int) -> None:
        context: Any = multiprocessing.get_context(
            "spawn" if job.device == "cuda" else "forkserver"
        )
        context.set_forkserver_preload(["common"])
        # Where the process that preloads finds this module.
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)
        self.folder = folder / name
        self.folder.mkdir()
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=work, args=(job, self.folder, threads, other), daemon=True
        )
        self.process.start()
        other.close()
        self.receive()

    def receive(self) -> Any:
        """The worker's next message. Raises RuntimeError, with the end of its log, where it has
        died.
        """
        try:
            return self.pipe.recv()
        except EOFError as error:
            log = (self.folder / "log.txt").read_text()
            raise RuntimeError(f"{self.folder.name}: {log[-4000:]}") from error

    def run(self) -> dict[str, Any]:
        """Train once."""
        self.pipe.send("train")
        return self.receive()

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


def origin(threads: int | None) -> dict[str, Any]:
    """From what a benchmark's numbers come (see `provenance`)."""
    return provenance(processor=platform.machine(), system=platform.system(), cores_used=threads)
