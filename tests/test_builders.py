"""What the phantom models meet in training: noise that tells nothing, and lesions that it hides."""

from __future__ import annotations

import numpy as np
import torch

from mmedpo_utils.phantom.texts import pack_masks
from mmedpo_utils.phantom.world import FINDINGS, draw_film
from mmedpo_utils.programs.build_phantom_lvlm import (
    GRID,
    PATCH,
    build_model,
    build_processor,
    corpus,
    pack,
    text_loss,
    training_film,
    visible_coverage,
    vocabulary,
)
from mmedpo_utils.programs.noise_patches import AREAS, noise_patches


def test_half_of_the_films_are_noised_inside_the_stated_areas_and_nowhere_else():
    rng = torch.Generator().manual_seed(0)
    grey = torch.full((200, 224, 224), 0.5)
    noised, hidden = noise_patches(grey, rng)
    shares = hidden.float().mean((1, 2))
    blobs = shares >= AREAS[0]
    assert 0.4 <= blobs.float().mean() <= 0.6
    # The area is ranked on every fourth pixel, which leaves it a little wide of the mark.
    assert shares.max() <= AREAS[1] + 0.02 and shares[~blobs].median() < 0.0005
    assert torch.equal(noised[~hidden], grey[~hidden])
    assert noised.min() >= 0 and noised.max() <= 1 and noised[hidden].std() > 0.2


def test_noise_falls_everywhere_alike():
    rng = torch.Generator().manual_seed(1)
    where = torch.zeros(56, 56)
    for _ in range(40):
        where += noise_patches(torch.full((64, 56, 56), 0.5), rng)[1].float().mean(0) / 40
    quarters = where.unfold(0, 28, 28).unfold(1, 28, 28).mean((2, 3))
    assert quarters.max() - quarters.min() < 0.02, "no place is favoured"


def test_what_noise_hides_does_not_count_as_there():
    film = draw_film(3, 0, ("opacity", "effusion"))
    masks = torch.from_numpy(pack_masks(film.masks))[None]
    hidden = torch.zeros(1, 224, 224, dtype=torch.bool)
    hidden[:, :, :112] = True
    coverage = visible_coverage(masks, hidden)[0].numpy()
    for number, finding in enumerate(FINDINGS):
        mask = film.masks.get(finding, np.zeros((224, 224), bool)).copy()
        mask[:, :112] = False
        by_patch = mask.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).ravel()
        assert np.allclose(coverage[:, number], by_patch), finding


def test_one_training_film_in_four_is_as_the_world_draws_it():
    assert np.array_equal(training_film(8, 5).image, draw_film(8, 5).image)
    counts = [len(training_film(row, 5).zones) for row in range(1, 120) if row % 4]
    by_world = [len(draw_film(row, 5).zones) for row in range(1, 120) if row % 4]
    assert np.mean(counts) > 1.5 * np.mean(by_world)


def test_another_backbone_differs_in_the_language_model_alone_and_learns_from_the_same_batches():
    films = [draw_film(row, 0, ("opacity",)) for row in range(2)]
    processor = build_processor(vocabulary(films))
    shapes = {}
    for llama in (False, True):
        torch.manual_seed(0)
        model = build_model(processor.tokenizer, llama)
        shapes[llama] = {name: value.shape for name, value in model.state_dict().items()}
        packed = pack(corpus(films, np.random.default_rng(0), biased=False), processor)
        loss = text_loss(model, packed, torch.randn(2, GRID * GRID, 128))
        known = float(np.log(len(processor.tokenizer)))
        assert abs(loss.item() - known) < 1, "untrained, every word is about as likely"
        loss.backward()
        assert all(
            parameter.grad is not None
            for parameter in model.model.language_model.layers.parameters()
        )
    assert shapes[False].keys() == shapes[True].keys()
    differing = {name for name in shapes[True] if shapes[True][name] != shapes[False][name]}
    assert differing and all("language_model.layers" in name for name in differing)
    assert {name.split(".")[-2] for name in differing} == {
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
