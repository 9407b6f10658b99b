"""Where a Med-LVLM looks while it writes each word of an answer: raw attention by layer and head,
rollout, and gradient times attention.

None of the three is an explanation. Raw attention says which image tokens went into one head's
mixture; rollout multiplies the layers' means, as if information flowed through attention alone;
gradient times attention keeps what raises the word's log-probability to first order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ..lvlm import MedLVLM, embed, image_features, prompt

END = "(end)"  # how the mark after the last word is shown
WATCHED = "watched"  # the two attentions below, by transformers' names for them
WORDS_ALONE = "words alone"


@dataclass(frozen=True)
class AnswerReading:
    """One greedy answer, word by word. S tokens, the end mark among them; L layers, H heads; P
    image tokens.

    Attributes:
        words: each token as text.
        probabilities: of each token, given film, question and the tokens before. Shape: [S].
        attention: from the position that predicts a token to each image token; a row and what goes
            to the text sum to 1. Shape: [S, L, H, P].
        rollout: Abnar and Zuidema's attention rollout (arXiv 2005.00928), its row of that position.
            Shape: [S, P].
        gradient: the positive part of attention times the gradient of the token's log-probability,
            mean of the heads. Shape: [S, L, P].
    """

    words: list[str]
    probabilities: np.ndarray
    attention: np.ndarray
    rollout: np.ndarray
    gradient: np.ndarray

    @property
    def on_image(self) -> np.ndarray:
        """Share of each head's attention that goes to the image at all. Shape: [S, L, H]."""
        return self.attention.sum(-1)


def read_answer(
    lvlm: MedLVLM,
    image: Image.Image,
    question: str,
    max_new_tokens: int,
) -> AnswerReading:
    """Answer greedily, read the attention behind every word in one more forward pass, and its
    gradient in a pass forward and backward through the positions that predict a word alone.

    Of each layer's attention only the rows that predict a word are kept, so that a model of 32
    layers and heads needs little more memory than its forward pass.
    """
    with torch.no_grad():
        features, _ = image_features(lvlm, [image], 1)
        inputs = embed(lvlm, [prompt(lvlm.processor, question)], features)
        tokens = lvlm.llava.generate(
            inputs_embeds=inputs["inputs_embeds"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )[0]
    start = inputs["inputs_embeds"].shape[1]
    embeddings = lvlm.llava.get_input_embeddings()(tokens[None, :-1])
    whole = torch.cat([inputs["inputs_embeds"], embeddings], dim=1).detach()
    predicts = torch.arange(start - 1, start - 1 + len(tokens), device=whole.device)
    image_tokens = inputs["image_mask"][0].nonzero()[:, 0]
    watch = _Watch(predicts, image_tokens)
    language_model = lvlm.llava.model.language_model
    usual = language_model.config._attn_implementation
    try:
        language_model.set_attn_implementation(WATCHED)
        with torch.no_grad():
            states = language_model(inputs_embeds=whole, use_cache=False, watch=watch)
            logps = _logps(lvlm, states.last_hidden_state[:, predicts], tokens)
        language_model.set_attn_implementation(WORDS_ALONE)
        with torch.enable_grad():
            alone = language_model(
                inputs_embeds=whole[:, predicts],
                position_ids=predicts[None],
                use_cache=False,
                watch=watch,
            )
            gradient = watch.gradients(_logps(lvlm, alone.last_hidden_state, tokens))
    finally:
        language_model.set_attn_implementation(usual)
    words = []
    for token in tokens.tolist():
        text = lvlm.processor.tokenizer.decode([token], skip_special_tokens=True).strip()
        words.append(text or END)
    return AnswerReading(
        words,
        logps.exp().cpu().numpy(),
        torch.stack(watch.rows, dim=1).cpu().numpy(),
        watch.rollout[predicts][:, image_tokens].cpu().numpy(),
        gradient,
    )


def _logps(lvlm: MedLVLM, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of tokens. Shapes: states [1, S, D], tokens [S]; returns [S]."""
    logits = lvlm.llava.lm_head(states[0]).float()
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


class _Watch:
    """What is kept of every layer's attention.

    Args:
        predicts: positions that predict a word. Shape: [S].
        image_tokens: positions of the image. Shape: [P].
    """

    def __init__(self, predicts: torch.Tensor, image_tokens: torch.Tensor) -> None:
        self.predicts = predicts
        self.image_tokens = image_tokens
        self.rows: list[torch.Tensor] = []  # of each layer: [S, H, P]
        self.rollout = torch.empty(0)  # [T, T]
        self.keys: list[torch.Tensor] = []  # of each layer: [1, H of keys, T, D]
        self.values: list[torch.Tensor] = []
        self.hidden = torch.empty(0)  # added to the scores, -inf where not seen: [1, 1, S, T]
        self.probes: list[torch.Tensor] = []  # of each layer: zeros, [1, H, S, T]

    def see(self, attention: torch.Tensor) -> None:
        """Keep what is read of one layer's attention. Shape: [1, H, T, T]."""
        seen = attention[0].float()
        self.rows.append(seen[:, self.predicts][:, :, self.image_tokens].transpose(0, 1))
        mean = seen.mean(0)
        # Half of each position's information stays where it is: the residual connection.
        step = (mean + torch.eye(len(mean), device=mean.device)) / 2
        self.rollout = step @ self.rollout if self.rollout.numel() else step

    def gradients(self, logps: torch.Tensor) -> np.ndarray:
        """Positive part of attention times gradient, mean of the heads. Shape: [S, L, P].

        Each word's probes move its own log-probability alone, so one backward pass of the sum gives
        every word's gradient.
        """
        slopes = torch.autograd.grad(logps.sum(), self.probes)
        layers = []
        for slope, rows in zip(slopes, self.rows, strict=True):
            of_words = slope[0][:, :, self.image_tokens].float().transpose(0, 1)  # [S, H, P]
            layers.append((of_words * rows).relu().mean(1))
        return torch.stack(layers, dim=1).cpu().numpy()


def watched_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    watch: _Watch,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention written out, as transformers' own "eager" one, with a look at its weights."""
    watch.keys.append(key)
    watch.values.append(value)
    watch.hidden = attention_mask[:, :, watch.predicts]
    groups = module.num_key_value_groups
    scores = scaling * query @ key.repeat_interleave(groups, 1).transpose(2, 3)
    # In place: of LLaVA-Med's grid one layer's scores are 46 MB.
    weights = scores.add_(attention_mask).softmax(-1, dtype=torch.float32).to(query.dtype)
    watch.see(weights)
    output = weights @ value.repeat_interleave(groups, 1)
    return output.transpose(1, 2).contiguous(), None


def words_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    watch: _Watch,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The same attention for the positions that predict a word alone, with zeros added to its
    weights: what a word would gain from them is what it would gain from more attention there.

    A position's weights reach its own word through that position alone, since no earlier one sees
    it. So the keys and values of all others are those of the whole pass, and no gradient goes
    through them.
    """
    layer = len(watch.probes)
    groups = module.num_key_value_groups
    own = watch.predicts[None, None, :, None].expand(1, query.shape[1], -1, 1)
    keys = watch.keys[layer].repeat_interleave(groups, 1)
    live_keys = key.repeat_interleave(groups, 1)
    to_itself = (query * live_keys).sum(-1, keepdim=True)
    scores = (query @ keys.transpose(2, 3)).scatter(3, own, to_itself) * scaling + watch.hidden
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    probe = torch.zeros_like(weights).requires_grad_()
    watch.probes.append(probe)
    weights = weights + probe
    values = watch.values[layer].repeat_interleave(groups, 1)
    moved = value.repeat_interleave(groups, 1) - values[:, :, watch.predicts]
    output = weights @ values + weights.gather(3, own) * moved
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(WATCHED, watched_attention)
AttentionInterface.register(WORDS_ALONE, words_attention)
AttentionMaskInterface.register(WATCHED, eager_mask)
AttentionMaskInterface.register(WORDS_ALONE, eager_mask)
