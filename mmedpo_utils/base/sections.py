"""The sections of a profile: what each key may hold, and the rules between the keys of one."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from .settings import AbsolutePath, Different, ModelName, Name, Sections, Values, require, section

IMAGE_FOLDERS = {
    "folder": "images",
    "vqa-rad": "VQA_RAD Image Folder",
    "slake": "imgs",
    "iu-xray": "images",
    "mimic-cxr": "files",
}
# Larger numbers are a slip: what they would allocate is on no machine.
Count = Annotated[StrictInt, Field(ge=1, le=10_000_000)]
Processes = Annotated[StrictInt, Field(ge=1, le=4096)]
Patients = Annotated[StrictInt, Field(ge=0, le=100_000)]
Amount = Annotated[StrictFloat, Field(ge=0)]
Share = Annotated[StrictFloat, Field(ge=0, le=1)]


@section
class Data:
    """Where films, questions and text pairs come from."""

    source: Literal["phantom", "folder", "vqa-rad", "slake", "iu-xray", "mimic-cxr"]
    card: StrictStr
    root: AbsolutePath | None
    train_patients: Patients
    validation_patients: Patients
    test_patients: Patients

    @model_validator(mode="after")
    def _the_source_has_what_it_needs(self) -> Self:
        its_own = self.source in ("folder", self.card)
        require(its_own, "card", "the source's own name, for every source but folder")
        drawn = self.source == "phantom"
        require(drawn or self.root, "root", "the data set's folder, for every source but phantom")
        require(not drawn or not self.root, "root", "null, for the source phantom")
        for key in ("train_patients", "test_patients"):
            require(not drawn or getattr(self, key), key, "1 or more, for the source phantom")
        return self


@section
class VisualTool:
    """MedKLIP: its checkpoint and the query whose attention is the heat map."""

    checkpoint: ModelName
    query: StrictStr
    batch_size: Count


@section
class Noise:
    """How the rejected image is made. ``signal`` is the square root of the schedule's product at
    step k.
    """

    kind: Literal["localized", "released", "global"]
    mask: Literal["quantile", "mean_std", "otsu", "soft"]
    quantile: Share
    signal: Share


@section
class LVLM:
    """The medical vision-language model that is trained."""

    model: ModelName
    base_adapter: ModelName | None
    vision_tower: Literal["checkpoint", "config"]
    template: Literal["mistral_instruct", "v1"] | None
    batch_size: Count
    max_new_tokens: Count
    device: Literal["auto", "cpu", "cuda"]
    quantization: Literal["none", "nf4"]


@section
class Curation:
    """Text pairs: how many, how many sampled answers each, and when a sampled answer counts as a
    conflict; and what becomes of visual pairs whose answer stays true on the noised film.
    """

    text_pairs: Count
    candidates: Count
    temperature: Annotated[StrictFloat, Field(ge=0, le=10)]
    conflict_threshold: Share
    rounds: Count
    still_true: Literal["keep", "leave_out"]


@section
class LanguageModel:
    """One language model: where it answers, and what it costs per million tokens (in the unit of
    ``max_cost``).
    """

    backend: Literal["openai", "transformers"]
    model: ModelName
    base_url: StrictStr | None
    api_key_env: StrictStr | None
    quantization: Literal["none", "nf4"]
    input_price: Amount
    output_price: Amount

    @model_validator(mode="after")
    def _an_endpoint_can_be_asked(self) -> Self:
        reached = self.backend == "transformers" or self.base_url
        require(reached, "base_url", "the endpoint's address, for the backend openai")
        named = self.api_key_env is None or re.fullmatch(r"[A-Z][A-Z0-9_]*", self.api_key_env)
        variable = "the NAME (A-Z, 0-9, _) of the environment variable that holds the key"
        require(named, "api_key_env", f"{variable}, never the key itself")
        return self


@section
class Judges:
    """Who judges and debates: the phantom's rules, or language models within limits of time, rate
    and money.
    """

    backend: Literal["phantom", "models"]
    judge: LanguageModel | None
    panel: Sections[LanguageModel] | None
    temperature: Annotated[StrictFloat, Field(ge=0, le=2)]
    max_tokens: Annotated[StrictInt, Field(ge=16)]
    timeout: Annotated[StrictFloat, Field(ge=0.01)]
    requests_per_minute: Count
    max_requests: Annotated[StrictInt, Field(ge=0)]
    max_cost: Amount
    agreement: StrictStr | None
    whole_sentences: Share

    @model_validator(mode="after")
    def _there_are_models(self) -> Self:
        rules = self.backend == "phantom"
        require(rules or self.judge, "judge", "a language model, for the backend models")
        several = "one language model or more, by name, for the backend models"
        require(rules or self.panel, "panel", several)
        return self


@section
class Relevance:
    """How raw scores become weights."""

    mean: StrictFloat
    variance: Amount
    low: Amount
    high: Amount

    @model_validator(mode="after")
    def _the_bounds_are_in_order(self) -> Self:
        require(self.low <= self.high, "low", "at most relevance.high")
        return self


@section
class Variant:
    """One training run of the comparison: its objective, its pairs, their weights, and what it
    trains.

    ``pairs`` names the preference manifest: ``output``/pairs/NAME.json.
    """

    objective: Literal["dpo", "sft"]
    pairs: Name
    sources: Different[Literal["text", "visual"]]
    weights: Literal["rescaled", "literal", "none", "uniform"]
    trains: Different[Literal["lora", "projector"]]

    @model_validator(mode="after")
    def _there_are_rejected_answers(self) -> Self:
        fits = self.objective == "sft" or self.pairs != "truth"
        require(fits, "objective", "sft for the pairs `truth`, which have no rejected answers")
        return self


@section
class Training:
    """What the method is, with the variants to compare; then what the machine needs.

    The global batch is ``per_device_batch_size`` x ``gradient_accumulation_steps`` x ``processes``.
    """

    # What the method is.
    beta: Amount
    reference: Literal["initial", "released"]
    learning_rate: Amount
    projector_learning_rate: Amount
    weight_decay: Amount
    optimizer: Literal["adamw", "paged_adamw_8bit"]
    warmup_ratio: Share
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"]
    lora_rank: Annotated[StrictInt, Field(ge=1, le=4096)]
    lora_alpha: Count
    lora_dropout: Share
    epochs: Annotated[StrictFloat, Field(ge=0.01)] | None
    max_steps: Count | None
    max_length: Count
    variants: Sections[Variant]

    # What the machine needs; the batch, over all processes, belongs to both.
    per_device_batch_size: Count
    gradient_accumulation_steps: Count
    processes: Processes
    nodes: Processes
    hostfile: AbsolutePath | None
    zero_stage: Annotated[StrictInt, Field(ge=0, le=3)]
    offload: Literal["none", "cpu"]
    precision: Literal["fp32", "bf16"]
    tf32: StrictBool
    attention: Literal["sdpa", "eager", "flex_attention"]
    gradient_checkpointing: StrictBool
    group_by_length: StrictBool
    shared_prefix: StrictBool
    cache_reference: StrictBool
    validation_every: Count
    samples: Annotated[StrictInt, Field(ge=0)]
    logging_steps: Count
    save_every: Count
    report_to: Literal["none", "tensorboard", "wandb", "trackio"]

    @model_validator(mode="after")
    def _the_keys_fit_together(self) -> Self:
        one_end = (self.max_steps is None) != (self.epochs is None)
        either = "a number here or in training.epochs, and null in the other"
        require(one_end, "max_steps", either)
        require(self.processes % self.nodes == 0, "processes", "a multiple of training.nodes")
        require(self.nodes > 1 or not self.hostfile, "hostfile", "null on one node")
        shards = self.offload == "none" or self.zero_stage >= 2
        require(shards, "offload", "none where training.zero_stage is below 2")
        still = self.reference == "initial" or not self.cache_reference
        drifts = "false where training.reference is released, since that reference drifts"
        require(still, "cache_reference", drifts)
        return self


@section
class Evaluation:
    """What is evaluated, how it answers, and how intervals are drawn.

    ``adapters``: somebody's adapters by name, compared with the base model instead of the profile's
    own variants. ``decoding`` released is that of the authors' evaluation
    (`evaluate.RELEASED_DECODING`).
    """

    adapters: Values[ModelName] | None
    decoding: Literal["greedy", "released"]
    batch_size: Count
    questions: Count | None
    bootstrap_samples: Count
    seeds: Different[Annotated[StrictInt, Field(ge=0)]]

    @model_validator(mode="after")
    def _no_adapter_is_called_base(self) -> Self:
        for name in self.adapters or {}:
            allowed = name != "base" and re.fullmatch(r"[\w-]+", name)
            require(allowed, f"adapters.{name}", "another name (letters, digits, _, -), not base")
        return self
