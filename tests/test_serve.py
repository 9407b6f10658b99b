"""Judge and panel on a real model: in this process, and behind a real `transformers serve` on
loopback.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.sections import LanguageModel
from mmedpo_utils.judges.chat import Chat, EndpointModel, LocalModel, Sampling
from mmedpo_utils.judges.language_models import (
    LanguageModelJudge,
    LanguageModelMember,
    build_judges,
    usage_table,
)
from mmedpo_utils.pairs import text_pairs
from mmedpo_utils.profiles import load_profile
from tests.tiny_chat import train_tiny_chat

SAMPLING = Sampling(0.0, 0, 64)
PLAIN, GRAVE = "5 left nodule lung", "5 left nodule lung pneumothorax"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train_tiny_chat(tmp_path_factory.mktemp("tiny_chat"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def url(model, tmp_path_factory) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        model,
        "--device",
        "cpu",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with open(log, "w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        _wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def _wait_until_healthy(process: subprocess.Popen, address: str, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(600):
        try:
            with opener.open(address, timeout=1):
                return
        except (urllib.error.URLError, TimeoutError):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def language_model(model: str, url: str | None = None, quantization: str = "none") -> LanguageModel:
    return LanguageModel(
        "openai" if url else "transformers", model, url, None, quantization, 0.0, 0.0
    )


def ask_everything(chat: Chat) -> list:
    judge, member = LanguageModelJudge(chat, SAMPLING), LanguageModelMember("m", chat, SAMPLING)
    rng = np.random.default_rng(0)
    return [
        judge.conflict("left lung nodule", "yes clear heart", "7 no opacity upper"),
        judge.write("no left heart", PLAIN, rng),
        member("q", "a", PLAIN, None),
        member("q", "a", GRAVE, None),
        member("q", "a", PLAIN, 0.8),
    ]


EXPECTED = [
    0.9,
    "no nodule",
    (0.3, False, "plausible"),
    (0.8, False, "plausible"),
    (0.8, True, "fits"),
]


def test_a_model_in_this_process(model, tmp_path):
    chat = Chat(LocalModel(language_model(model), "cpu"), tmp_path)
    assert ask_everything(chat) == EXPECTED
    assert (chat.counters.requests, chat.counters.unreadable, chat.counters.fallbacks) == (5, 0, 0)
    assert chat.counters.prompt_tokens > 500 and 25 < chat.counters.completion_tokens < 100


def test_a_cut_off_answer_of_a_local_model_gets_more_room(model, tmp_path):
    chat = Chat(LocalModel(language_model(model), "cpu"), tmp_path)
    member = LanguageModelMember("m", chat, Sampling(0.0, 0, 4))
    assert member("q", "a", PLAIN, None) == (0.3, False, "plausible") and chat.counters.retries == 2


def test_sampling_follows_its_seed_and_leaves_torch_alone(model):
    local, state = LocalModel(language_model(model), "cpu"), torch.get_rng_state()
    messages = [{"role": "user", "content": "lung heart"}]
    texts = [local(messages, {}, Sampling(5.0, seed, 12)).text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_a_local_model_that_cannot_serve_is_named(model, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="nowhere.*cannot be loaded"):
        LocalModel(language_model(str(tmp_path / "nowhere")), "cpu")
    with pytest.raises(InputError, match="nf4 needs a GPU"):
        LocalModel(language_model(model, quantization="nf4"), "cpu")
    for file in Path(model).iterdir():
        if file.is_file() and "chat_template" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(InputError, match="no chat template"):
        LocalModel(language_model(str(tmp_path)), "cpu")


def test_served_answers_are_those_of_the_model_itself(model, url, tmp_path):
    chat = Chat(EndpointModel(language_model(model, url), 60), tmp_path)
    assert ask_everything(chat) == EXPECTED
    assert (chat.counters.requests, chat.counters.unreadable, chat.counters.fallbacks) == (5, 0, 0)
    assert chat.counters.prompt_tokens > 500 and 25 < chat.counters.completion_tokens < 100


def test_text_pairs_with_a_served_judge_and_a_mixed_panel(model, url, tmp_path):
    values = {
        "backend": "openai",
        "model": model,
        "base_url": url,
        "api_key_env": None,
        "quantization": "none",
        "input_price": 0.0,
        "output_price": 0.0,
    }
    profile = load_profile(
        "phantom-smoke",
        {
            "output": str(tmp_path),
            "lvlm.device": "cpu",
            "judge.backend": "models",
            "judge.judge": values,
            "judge.requests_per_minute": 60_000,
            "judge.panel": {
                "served": values,
                "here": values | {"backend": "transformers", "base_url": None},
            },
        },
    )
    questions = [
        {
            "question_id": 1,
            "image": "a.png",
            "text": "lung nodule left",
            "gpt4_answer": "yes clear heart",
        }
    ]

    def pairs():
        judge, panel = build_judges(profile, SimpleNamespace(name="mimic-cxr", credentialed=True))
        return *text_pairs(questions, [[GRAVE]], judge, panel, 0.5, 5, 0), usage_table(judge, panel)

    rows, debates, usage = pairs()
    assert rows[0]["rejected_conversations"][1]["value"] == GRAVE and rows[0]["origin"] == "sampled"
    assert [(turn["member"], turn["agrees"]) for turn in debates[0]["history"]] == [
        ("served", False),
        ("here", True),
    ]
    assert (
        rows[0]["weighted_score"] == 0.8
        and debates[0]["conflict"] == 0.9
        and debates[0]["consensus"]
    )
    assert [(row["requests"], row["fallbacks"]) for row in usage] == [(2, 0), (1, 0)]
    again = pairs()
    assert again[:2] == (rows, debates) and [row["requests"] for row in again[2]] == [0, 0]
