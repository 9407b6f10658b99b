"""The views in a real browser: the engine computes what numpy does, and every control changes the
picture, by mouse and by keys, without a kernel and without a request to any host.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmedpo_utils.base.images import resize_bilinear
from mmedpo_utils.lvlm import (
    MedLVLM,
    embed,
    generate,
    image_attention,
    image_features,
    load_lvlm,
    prompt,
)
from mmedpo_utils.medklip import MedKLIPOutput, confidence, pointing_hit
from mmedpo_utils.noise import lesion_mask, noised_pixels
from mmedpo_utils.show.answer_attention import read_answer
from mmedpo_utils.show.answer_view import ShownQuestion, answer_view, as_seen
from mmedpo_utils.show.attention_view import medklip_view
from mmedpo_utils.show.lesion_attention import attention_share
from mmedpo_utils.show.noise_view import RELEASED, SIGNALS, noise_view
from mmedpo_utils.show.pages import BROWSER, Packed, map_colours, pack

EVIL = "<img src=x onerror=alert(1)>"
RNG = np.random.default_rng(0)
SIZE = 224


@pytest.fixture()
def engine(tab):
    tab.set_content("<p></p>")
    tab.add_script_tag(content=(BROWSER / "engine.js").read_text("utf-8"))
    return tab


def opened(tab, page, folder: Path):
    page.save(folder / "view.html")
    tab.goto(f"file://{folder / 'view.html'}")
    tab.wait_for_selector("[data-live] :is(canvas, svg)")
    return tab


def pictures(tab) -> list[str]:
    """What all canvases show now, after the next frame."""
    return tab.evaluate(
        """() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() =>
            done([...document.querySelectorAll("canvas")].map((canvas) => canvas.toDataURL())))))"""
    )


def changes(tab, act) -> bool:
    before = pictures(tab)
    act()
    return pictures(tab) != before


def distance(canvas, film: np.ndarray) -> float:
    """Mean difference between a canvas and a film. The canvas is larger: what is compared is the
    mean of each 8 by 8 block.
    """
    shown = canvas.evaluate(
        """(canvas) => {
            const small = document.createElement("canvas");
            small.width = 224;
            small.height = 224;
            const context = small.getContext("2d");
            context.drawImage(canvas, 0, 0, 224, 224);
            const { data } = context.getImageData(0, 0, 224, 224);
            return [...data].filter((_, n) => n % 4 === 0);
        }"""
    )
    blocks = [np.reshape(pixels, (28, 8, 28, 8)).mean((1, 3)) for pixels in (shown, film)]
    return float(np.abs(blocks[0] - blocks[1]).mean())


def disc(row: int, column: int, radius: int) -> np.ndarray:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


@pytest.fixture(scope="module")
def read_films() -> dict:
    """Three films with MedKLIP's kind of output, two layers, two heads, one finding and disease."""
    films = [Image.fromarray(RNG.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)) for _ in range(3)]
    logits = torch.tensor(RNG.normal(size=(3, 2, 2)), dtype=torch.float32)
    maps = torch.tensor(RNG.normal(size=(3, 2, 2, 2, 196)) * 2, dtype=torch.float32).softmax(-1)
    masks = [{"nodule": disc(60, 90, 12)}, {}, {EVIL: disc(150, 60, 30), "nodule": disc(9, 9, 5)}]
    output = MedKLIPOutput(("nodule", "disease"), logits, maps, torch.zeros(3, 2, 4))
    return {"films": films, "output": output, "names": ["a", EVIL, "c"], "masks": masks}


def test_the_browser_reads_what_was_packed(engine):
    arrays = {
        "films": Packed(RNG.integers(0, 256, (2, 5, 7), dtype=np.uint8), "film"),
        "maps": Packed(np.float16([[0, 1, -2.5], [6e-8, 65504, 0.1]]), "half"),
        "masks": Packed(RNG.random((3, 5, 5)) > 0.5, "bits"),
        "colours": Packed(map_colours(), "bytes"),
    }
    packed = pack({"name": EVIL, "numbers": [1, None]}, arrays)
    found = engine.evaluate(
        """async (text) => {
            const { values, arrays } = await unpack(text);
            const read = {};
            for (const [name, { data, shape }] of Object.entries(arrays)) {
                read[name] = { data: [...data], shape };
            }
            return { values, read };
        }""",
        packed,
    )
    assert found["values"] == {"name": EVIL, "numbers": [1, None]}
    assert found["read"].keys() == arrays.keys()
    for name, array in arrays.items():
        assert found["read"][name]["shape"] == list(array.values.shape)
        np.testing.assert_array_equal(
            np.float64(found["read"][name]["data"]), np.ravel(array.values).astype(float)
        )


def test_the_engine_computes_what_numpy_does(engine):
    heat = RNG.random((14, 14)).astype(np.float32)
    film = RNG.integers(0, 256, (20, 30))
    found = engine.evaluate(
        """([map, film, colours, one, other]) => {
            const heat = upsampled(Float32Array.from(map), 30, 20);
            const options = { opacity: 0.7, threshold: 0.3 };
            return {
                heat: [...heat],
                cells: [...inCells(Float32Array.from(map), 28, 28)],
                quantile: quantile(heat, 0.85),
                blend: [...blend(film, heat, 0.9, options, colours)],
                overlap: overlap(one, other),
                inside: shareInside(heat, one),
                cellsFilled: effectiveCells(Float32Array.from(map)),
            };
        }""",
        [
            heat.ravel().tolist(),
            film.ravel().tolist(),
            map_colours().ravel().tolist(),
            (film > 128).ravel().tolist(),
            (film > 90).ravel().tolist(),
        ],
    )
    expected = resize_bilinear(heat.astype(float), (20, 30))
    np.testing.assert_allclose(np.reshape(found["heat"], (20, 30)), expected, atol=1e-6)
    np.testing.assert_allclose(
        np.reshape(found["cells"], (28, 28)), np.kron(heat, np.ones((2, 2))), atol=1e-7
    )
    assert found["quantile"] == pytest.approx(np.quantile(expected, 0.85), abs=1e-6)
    share = np.clip(np.float32(found["heat"]).reshape(20, 30) / 0.9, 0, 1)
    alpha = np.where(share < 0.3, 0, 0.7 * share)[..., None]
    colour = map_colours()[np.floor(255 * share + 0.5).astype(int)]
    blended = film[..., None] * (1 - alpha) + colour * alpha
    pixels = np.reshape(found["blend"], (20, 30, 4))
    assert np.abs(pixels[..., :3] - blended).max() <= 1 and (pixels[..., 3] == 255).all()
    assert found["overlap"] == pytest.approx((film > 128).sum() / (film > 90).sum())
    inside = expected[film > 128].sum() / expected.sum()
    assert found["inside"] == pytest.approx(inside, abs=1e-6)
    shares = heat / heat.sum()
    entropy = -(shares * np.log(shares)).sum()
    assert found["cellsFilled"] == pytest.approx(np.exp(entropy), rel=1e-4)


def test_an_outline_runs_where_the_mask_ends(engine):
    mask = np.zeros((12, 16), bool)
    mask[3:8, 4:11] = True
    mask[5, 6] = False
    painted = engine.evaluate(
        """(mask) => {
            const canvas = document.createElement("canvas");
            canvas.width = 160;
            canvas.height = 120;
            const context = canvas.getContext("2d");
            context.scale(10, 10);
            context.lineWidth = 0.2;
            context.stroke(outline(mask, 16, 12));
            const { data } = context.getImageData(0, 0, 160, 120);
            return [...data].filter((_, n) => n % 4 === 3);
        }""",
        mask.ravel().tolist(),
    )
    drawn = np.reshape(painted, (120, 160)) > 0
    expected = np.zeros_like(drawn)
    # The border is where a pixel differs from its neighbour, 10 pixels to the unit.
    for row, column in zip(*np.nonzero(np.diff(mask, axis=0)), strict=True):
        expected[10 * row + 9 : 10 * row + 11, 10 * column : 10 * column + 10] = True
    for row, column in zip(*np.nonzero(np.diff(mask, axis=1)), strict=True):
        expected[10 * row : 10 * row + 10, 10 * column + 9 : 10 * column + 11] = True
    assert (drawn == expected).all()


def test_medklips_controls_change_the_picture_by_mouse_and_by_keys(tab, read_films, tmp_path):
    view = opened(tab, medklip_view(**read_films), tmp_path)
    assert tab.locator("label").all_inner_texts()  # every control has a name
    for select in tab.locator("select").all():
        assert changes(tab, lambda select=select: select.select_option(index=0)) or changes(
            tab, lambda select=select: select.select_option(index=1)
        )
        select.focus()
        key = "ArrowDown" if select.evaluate("(box) => box.selectedIndex") == 0 else "ArrowUp"
        assert changes(tab, lambda key=key: view.keyboard.press(key))
    view.locator("select").nth(0).select_option(index=2)  # a film with lesions
    for slider in tab.locator("input[type=range]").all():
        box = slider.bounding_box()
        left, middle = box["x"] + 0.3 * box["width"], box["y"] + box["height"] / 2
        assert changes(tab, lambda x=left, y=middle: tab.mouse.click(x, y))
        slider.focus()
        assert changes(tab, lambda: (tab.keyboard.press("End"), tab.keyboard.press("PageDown")))
    for box in tab.locator("input[type=checkbox]").all():
        assert changes(tab, box.click)
        box.focus()
        assert changes(tab, lambda: tab.keyboard.press("Space"))
    tile = tab.get_by_role("radio", name="layer 1, head 2", exact=True)
    assert changes(tab, tile.click) and tile.get_attribute("aria-checked") == "true"
    assert changes(tab, lambda: tab.keyboard.press("ArrowDown"))
    chosen = tab.locator("[role=radio][aria-checked=true]")
    assert chosen.get_attribute("aria-label") == "layer 2, head 2"
    for control in tab.locator("select, input, [role=radio]").all():
        assert control.get_attribute("data-lm-suppress-shortcuts") == "true"


def test_the_numbers_beside_medklips_map_are_those_of_the_package(tab, read_films, tmp_path):
    view = opened(tab, medklip_view(**read_films, quantile=0.8), tmp_path)
    view.locator("select").nth(1).select_option("nodule")
    maps = read_films["output"].attentions.half().float()[0].mean((0, 1)).view(2, 14, 14)
    mask = read_films["masks"][0]["nodule"]
    sure = confidence(read_films["output"], "nodule")[0]
    said = tab.locator("figcaption").nth(0)
    pictures(tab)
    inside = attention_share(maps[0].numpy(), mask)
    hit = "hits" if pointing_hit(maps[0], mask) else "misses"
    told = float(re.search(r"nodule: confidence ([0-9.]+)", said.inner_text())[1])
    assert told == pytest.approx(sure.item(), abs=0.0011)  # three digits of a 16-bit number
    assert f"{100 * inside:.0f}% of it in the true lesion" in said.inner_text()
    assert f"the peak {hit}" in said.inner_text()
    cut = lesion_mask(maps[1].numpy(), (SIZE, SIZE), quantile=0.8) > 0
    shared = (cut & mask).sum() / (cut | mask).sum()
    assert f"over union {shared:.2f}" in tab.locator("figcaption").nth(2).inner_text()


def test_the_pointer_reads_the_map_and_a_larger_picture_is_the_same_picture(
    tab, read_films, tmp_path
):
    view = opened(tab, medklip_view(**read_films), tmp_path)
    tab.get_by_label("smooth").click()  # plain cells: the value under the pointer is one cell's
    pictures(tab)
    canvas = tab.locator("figure canvas").nth(1)
    maps = read_films["output"].attentions[0, :, :, 1].mean((0, 1)).view(14, 14)
    film = read_films["films"][0]
    before = distance(canvas, np.asarray(film))
    for factor in (1, 2):
        if factor == 2:
            view.get_by_label("size").select_option("200%")
            pictures(tab)
        box = canvas.bounding_box()
        assert box["width"] == 300 * factor and box["height"] == 300 * factor
        for row, column in ((0, 0), (3, 11), (13, 13)):
            place = {
                "x": (column + 0.5) / 14 * box["width"],
                "y": (row + 0.5) / 14 * box["height"],
            }
            canvas.hover(position=place)
            told = float(
                re.match(r"([0-9.]+) times the mean cell", canvas.get_attribute("title"))[1]
            )
            assert told == pytest.approx(maps[row, column].item() * 196, abs=0.02)
    assert distance(canvas, np.asarray(film)) == pytest.approx(before, abs=1)
    assert not tab.locator("figure canvas").nth(3).get_attribute("title"), "no map lies over it"


def test_names_and_texts_are_shown_and_never_read_as_html(tab, read_films, tmp_path):
    page = medklip_view(**read_films)
    assert EVIL not in page.html()
    view = opened(tab, page, tmp_path)
    view.locator("select").nth(0).select_option(index=1)
    pictures(tab)
    assert EVIL in tab.locator("[role=status]").inner_text()
    assert tab.locator("img").count() == 0  # the still picture has given its place to the view


def test_without_scripts_the_still_picture_stays(browser, read_films, tmp_path):
    page = medklip_view(**read_films)
    page.save(tmp_path / "view.html")
    context = browser.new_context(java_script_enabled=False)
    still = context.new_page()
    still.goto(f"file://{tmp_path / 'view.html'}")
    assert still.locator("img").get_attribute("alt") == page.alt
    assert still.locator("img").bounding_box()["width"] > 300
    context.close()
    bundle, metadata = page._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == page.alt
    assert set(bundle) == {"text/html", "image/png", "text/plain"} and bundle["text/plain"]


def test_films_of_any_shape_are_shown_as_the_network_sees_them(tab, read_films, tmp_path):
    wide = read_films["films"][0].resize((300, 200))
    masks = [{"nodule": np.ones((200, 300), bool)}, {}, {}]
    page = medklip_view(**(read_films | {"films": [wide] * 3, "masks": masks}))
    opened(tab, page, tmp_path)
    assert "100% of it in the true lesion" in tab.locator("figcaption").first.inner_text()


def test_the_same_view_is_the_same_text(read_films):
    assert medklip_view(**read_films).html() == medklip_view(**read_films).html()


@pytest.fixture(scope="module")
def phantom() -> MedLVLM:
    return load_lvlm("phantom", "cpu")


@pytest.fixture(scope="module")
def asked() -> list[ShownQuestion]:
    found = []
    for number, question in enumerate(("Is there a nodule?", f"Where is it? {EVIL}")):
        pixels = RNG.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        masks = {"nodule": disc(60, 90, 20)} if number == 0 else {}
        film = Image.fromarray(pixels)
        found.append(ShownQuestion(film, f"film {number}", question, EVIL, masks))
    return found


def test_a_words_attention_is_that_of_the_position_that_predicts_it(phantom, asked):
    one = asked[0]
    reading = read_answer(phantom, one.film, one.question, 8)
    count = len(reading.words)
    assert reading.attention.shape[:3] == (count, 4, 4) and reading.rollout.shape[0] == count
    assert (reading.on_image <= 1 + 1e-6).all() and (reading.on_image > 0).all()
    first = image_attention(phantom, [one.film], [one.question], 1)[0].numpy()
    mean = reading.attention[0].mean((0, 1))
    np.testing.assert_allclose(mean / mean.sum(), first.ravel(), atol=1e-6)


def test_probabilities_and_gradients_are_those_of_the_whole_model(phantom, asked):
    """Against one plain forward pass each, with the answer's words appended to the prompt."""
    one = asked[0]
    reading = read_answer(phantom, one.film, one.question, 6)
    text = prompt(phantom.processor, one.question)
    inputs = phantom.processor(images=one.film, text=text, return_tensors="pt")
    model = phantom.llava
    model.model.language_model.set_attn_implementation("eager")
    try:
        for number in range(len(reading.words)):
            output = model(**inputs, output_attentions=True)
            logps = output.logits[0, -1].log_softmax(-1)
            token = logps.argmax()
            assert reading.probabilities[number] == pytest.approx(logps[token].exp().item(), 1e-4)
            slopes = torch.autograd.grad(logps[token], output.attentions)
            patches = inputs["input_ids"][0] == model.config.image_token_id
            for layer, (slope, weights) in enumerate(zip(slopes, output.attentions, strict=True)):
                rows = (slope * weights)[0, :, -1].relu().mean(0)[patches]
                np.testing.assert_allclose(
                    reading.gradient[number, layer], rows.detach(), rtol=1e-3, atol=1e-7
                )
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token.view(1, 1)], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    finally:
        model.model.language_model.set_attn_implementation("sdpa")


def test_rollout_is_the_product_of_the_layers_means(phantom, asked):
    one = asked[1]
    reading = read_answer(phantom, one.film, one.question, 6)
    features, _ = image_features(phantom, [one.film], 1)
    inputs = embed(phantom, [prompt(phantom.processor, one.question)], features)
    language_model = phantom.llava.model.language_model
    language_model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            layers = language_model(
                inputs_embeds=inputs["inputs_embeds"], output_attentions=True
            ).attentions
    finally:
        language_model.set_attn_implementation("sdpa")
    product = np.eye(layers[0].shape[-1])
    for layer in layers:
        product = (layer[0].mean(0).numpy() + np.eye(len(product))) / 2 @ product
    expected = product[-1][inputs["image_mask"][0].numpy()]
    np.testing.assert_allclose(reading.rollout[0], expected, atol=1e-6)


def test_a_word_is_clicked_and_both_models_answer_to_the_controls(tab, phantom, asked, tmp_path):
    view = opened(tab, answer_view({"base": phantom, "again": phantom}, asked, 8), tmp_path)
    words = tab.get_by_role("radiogroup", name="words of again").get_by_role("radio")
    assert words.count() >= 2 and changes(tab, words.nth(1).click)
    assert changes(tab, lambda: view.keyboard.press("ArrowLeft"))
    for index, label in enumerate(("question", "method", "layer", "head")):
        select = tab.locator("select").nth(index)
        assert label in select.locator("xpath=..").inner_text()
        if label != "question":
            select.focus()
            assert changes(tab, lambda: view.keyboard.press("ArrowDown")), label
            tab.locator("select").nth(1).select_option(index=0)
    tile = tab.get_by_role("radio", name="base, layer 2, head 3")
    assert changes(tab, tile.click)
    assert tab.locator("select").nth(2).input_value() == "layer 2"
    assert changes(tab, lambda: tab.locator("select").nth(0).select_option(index=1))
    assert EVIL in tab.locator(".note").first.inner_text() and tab.locator("img").count() == 0
    said = json.dumps(tab.locator("figcaption").all_inner_texts())
    assert "of the attention on the image" in said


def test_a_film_is_shown_as_the_vision_tower_gets_it(tab, phantom, tmp_path):
    """A wide film is padded to a square, so its left half is a quarter of what the model sees."""
    film = Image.fromarray(RNG.integers(0, 256, (SIZE, 2 * SIZE, 3), dtype=np.uint8))
    mask = np.zeros((SIZE, 2 * SIZE), bool)
    mask[:, :SIZE] = True
    one = ShownQuestion(film, "wide", "Is there a nodule?", masks={"left half": mask})
    opened(tab, answer_view({"base": phantom}, [one], 4), tmp_path)
    assert "which are 25% of the film" in tab.locator("figcaption").first.inner_text()


def test_between_two_equal_models_nothing_is_coloured(tab, phantom, asked, tmp_path):
    opened(tab, answer_view({"one": phantom, "other": phantom}, asked[1:], 8), tmp_path)
    coloured = tab.locator("canvas").evaluate_all(
        """(canvases) => canvases.slice(0, 3).map((canvas) => {
            const { width, height } = canvas;
            const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
            let count = 0;
            for (let n = 0; n < data.length; n += 4) count += data[n] !== data[n + 2];
            return count;
        })"""
    )
    assert coloured[0] > 0 and coloured[1] > 0 and coloured[2] == 0


def test_what_rose_is_orange_in_a_box_and_what_fell_is_blue(tab, phantom, asked, tmp_path):
    film = ShownQuestion(Image.new("RGB", (SIZE, SIZE), (90, 90, 90)), "grey", "Is it clear?")
    readings = [read_answer(phantom, one.film, one.question, 4) for one in (film, asked[0])]
    maps = [reading.attention[0].mean((0, 1)) for reading in readings]
    # The second model's answer is one to another film.
    with pytest.MonkeyPatch.context() as patch:
        given = iter(readings)
        patch.setattr("mmedpo_utils.show.answer_view.read_answer", lambda *_: next(given))
        page = answer_view({"one": phantom, "other": phantom}, [film], 4)
    opened(tab, page, tmp_path)
    rise = maps[1] / maps[1].sum() - maps[0] / maps[0].sum()
    most, least = int(rise.argmax()), int(rise.argmin())
    change = tab.locator("figure canvas").nth(2)
    grid = int(rise.size**0.5)

    def colour(cell: int) -> list[int]:
        across, down = (cell % grid + 0.3) / grid, (cell // grid + 0.3) / grid
        return change.evaluate(
            """(canvas, [x, y]) => [...canvas.getContext("2d").getImageData(
                Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data]""",
            [across, down],
        )

    red, _, blue, _ = colour(most)
    assert red > 150 > 90 > blue, "orange over grey"
    strength = -rise[least] / np.abs(rise).max()
    red, _, blue, _ = colour(least)
    assert (blue > 120 and blue > red) if strength > 0.2 else red == blue
    opacity = tab.locator("label", has_text="opacity").locator("input")
    opacity.focus()
    tab.keyboard.press("Home")  # the box alone over the grey film
    pictures(tab)
    drawn = change.evaluate(
        """(canvas) => {
            const { width, height } = canvas;
            const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
            const places = [...Array(width * height).keys()].filter((n) => data[4 * n] !== 90);
            const [columns, rows] = [places.map((n) => n % width), places.map((n) => n / width)];
            const ends = [columns, rows].map((all) => [Math.min(...all), Math.max(...all)]);
            return ends.map((pair) => pair.map((end) => end / width));
        }"""
    )
    rows, columns = np.nonzero(rise.reshape(grid, grid) >= rise.max() / 2)
    for ends, cells in zip(drawn, (columns, rows), strict=True):
        borders = (cells.min() / grid, (cells.max() + 1) / grid)
        assert ends == pytest.approx(borders, abs=3 / 280), "half of the line and a pixel"


def test_the_noise_view_shows_what_the_package_draws_and_what_the_model_says(
    tab, phantom, asked, tmp_path
):
    heats = [RNG.random((14, 14)) for _ in asked]
    page = noise_view(phantom, asked, heats, batch_size=16, seeds=(3, 4))
    view = opened(tab, page, tmp_path)
    for label, option in (("noise on", "the true lesions"), ("seed", "4")):
        box = tab.locator("label", has_text=label).locator("select")
        assert changes(tab, lambda box=box, option=option: box.select_option(option)), label
        box.focus()
        key = "ArrowUp" if label == "seed" else "ArrowDown"
        assert changes(tab, lambda key=key: view.keyboard.press(key)), label
        box.select_option(option)
    slide = tab.locator("input[type=range]")
    slide.focus()
    assert changes(tab, lambda: view.keyboard.press("Home"))
    assert changes(tab, lambda: view.keyboard.press("ArrowRight"))
    pictures(tab)
    film = as_seen(phantom.processor.image_processor, asked[0].film)
    region = asked[0].masks["nodule"].astype(np.float32)
    noised = noised_pixels(film, region, "localized", SIGNALS[1], np.random.default_rng(4))
    ((said,),) = generate(phantom, [Image.fromarray(noised)], [asked[0].question], 16, 1)
    told = tab.locator("[role=status]").inner_text()
    assert f'The model says "{said}"' in told
    tab.locator("input[type=checkbox]").click()  # no outline in the picture
    pictures(tab)
    assert distance(tab.locator("canvas").nth(1), noised) < 5
    tab.locator("label", has_text="noise on").locator("select").select_option("everywhere")
    pictures(tab)
    assert distance(tab.locator("canvas").nth(0), film) < 5


def test_controls_without_effect_on_the_noise_are_disabled(tab, phantom, asked, tmp_path):
    page = noise_view(phantom, asked[:1], [RNG.random((14, 14))], batch_size=16)
    opened(tab, page, tmp_path)
    slide = tab.locator("input[type=range]")
    seed = tab.locator("label", has_text="seed").locator("select")
    assert slide.is_enabled() and seed.is_enabled()
    slide.focus()
    tab.keyboard.press("End")
    pictures(tab)
    assert seed.is_disabled(), "all of the signal is kept: no noise to draw"
    tab.locator("label", has_text="noise on").locator("select").select_option(RELEASED)
    pictures(tab)
    assert slide.is_disabled() and seed.is_enabled()
