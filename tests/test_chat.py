"""Back ends, cache, retries and limits, against a real server on loopback that misbehaves on
demand.
"""

from __future__ import annotations

import json
import logging
import stat
import time
import traceback
from email.utils import formatdate

import numpy as np
import pytest

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.sections import LanguageModel
from mmedpo_utils.judges.chat import Chat, EndpointModel, Limits, Sampling
from mmedpo_utils.judges.language_models import LanguageModelJudge
from tests import servers
from tests.servers import running

KEY = "sk-very-secret-0123456789"
MESSAGES = [{"role": "user", "content": "Patient Jane Roe: how relevant?"}]
SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "number"}},
    "required": ["score"],
    "additionalProperties": False,
}
SAMPLING = Sampling(0.0, 3, 64)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with running() as server:
        yield server


@pytest.fixture
def waits():
    return []


def endpoint(server, **values) -> LanguageModel:
    return LanguageModel(
        **{
            "backend": "openai",
            "model": "m",
            "base_url": server.url,
            "api_key_env": "TEST_JUDGE_KEY",
            "quantization": "none",
            "input_price": 0.0,
            "output_price": 0.0,
        }
        | values
    )


def chat_of(server, folder, waits, timeout=60.0, prices=(0.0, 0.0), **limits) -> Chat:
    return Chat(
        EndpointModel(endpoint(server), timeout),
        folder,
        Limits(sleep=waits.append, **limits),
        *prices,
    )


def test_the_request_carries_model_messages_schema_sampling_and_key(server, tmp_path, waits):
    assert chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING) == server.usual
    ((headers, body),) = server.seen
    assert headers["authorization"] == f"Bearer {KEY}"
    assert (
        body["model"],
        body["messages"],
        body["temperature"],
        body["seed"],
        body["max_tokens"],
    ) == ("m", MESSAGES, 0, 3, 64)
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA


def test_no_other_key_of_the_environment_is_sent_where_none_is_named(
    server, tmp_path, waits, monkeypatch
):
    for variable in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(variable, KEY)
    Chat(EndpointModel(endpoint(server, api_key_env=None), 60), tmp_path)(
        MESSAGES, SCHEMA, SAMPLING
    )
    assert KEY not in json.dumps(server.seen)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (("slow", 5.0), "time-out"),
        (("drip", 0.05), "time-out"),
        (("endless", 5_000_000), "too long"),
        (("gzip", None), "compressed"),
        (("status", (429, {"Retry-After": "7"})), "429"),
        (("status", (500, {})), "500"),
        (("status", (503, {})), "503"),
        (("torn", None), "torn"),
        (("half", None), "half"),
        (("raw", '{"choices": []}'), "empty"),
        (("raw", '"prose"'), "text"),
        (("raw", "null"), "null"),
    ],
)
def test_a_failing_request_is_tried_again(server, tmp_path, waits, plan, reason):
    server.plan = [plan]
    timeout = 1.5 if reason == "time-out" else 60.0
    chat = chat_of(server, tmp_path, waits, timeout=timeout)
    begun = time.monotonic()
    assert chat(MESSAGES, SCHEMA, SAMPLING) == server.usual
    assert time.monotonic() - begun < 5, "a body that drips for 15 s is not waited for"
    assert (chat.counters.requests, chat.counters.retries, len(server.seen)) == (2, 1, 2)
    assert waits == [7.0] if reason == "429" else 0.5 <= waits[0] <= 1.5


def test_back_off_doubles_with_jitter_and_ends(server, tmp_path, waits):
    server.usual = ("status", (500, {}))
    with pytest.raises(InputError, match="no answer in 5 attempts.*status 500"):
        chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING)
    assert len(server.seen) == 5 and len(waits) == 4
    assert all(0.5 * 2**turn <= wait <= 1.5 * 2**turn for turn, wait in enumerate(waits))
    assert not list(tmp_path.glob("*.json")), "a failure is not cached"


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("0", 0, 0),
        ("2.5", 2.5, 2.5),
        ("86400", 300, 300),
        ("-4", 0, 0),
        ("nan", 0.5, 1.5),
        ("soon", 0.5, 1.5),
    ],
)
def test_retry_after(server, tmp_path, waits, header, low, high):
    server.plan = [("status", (429, {"Retry-After": header}))]
    chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING)
    assert low <= waits[0] <= high


def test_retry_after_as_a_date(server, tmp_path, waits):
    server.plan = [("status", (503, {"Retry-After": formatdate(time.time() + 30, usegmt=True)}))]
    chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING)
    assert 10 <= waits[0] <= 30


def test_a_cut_off_answer_is_asked_for_again_with_more_room(server, tmp_path, waits):
    server.usual = ("length", '{"score": 0.')
    chat = chat_of(server, tmp_path, waits)
    assert chat(MESSAGES, SCHEMA, SAMPLING) == '{"score": 0.'
    assert [body["max_tokens"] for _, body in server.seen] == [64, 128, 256]
    server.plan = [("length", '{"sc'), '{"score": 1}']
    assert chat(MESSAGES, SCHEMA, Sampling(0.0, 4, 64)) == '{"score": 1}'
    assert chat.counters.retries == 3


def test_a_server_that_rejects_the_schema_is_asked_without_it(server, tmp_path, waits):
    server.usual = ("status", (400, {}))
    chat = chat_of(server, tmp_path, waits)
    with pytest.raises(InputError, match="answers 400"):
        chat(MESSAGES, SCHEMA, SAMPLING)
    assert ["response_format" in body for _, body in server.seen] == [True, False]
    server.usual = "fine"
    assert (
        chat(MESSAGES, SCHEMA, SAMPLING) == "fine" and "response_format" not in server.seen[-1][1]
    )


def refusal(parameter: str, code: str = "unsupported_parameter", named: bool = True) -> tuple:
    """A refusal in OpenAI's form; ``named``: in a field of its own, else in the message only."""
    error = {
        "message": f"Unsupported value: '{parameter}' is not a parameter of this model.",
        "type": "invalid_request_error",
        "param": parameter if named else None,
        "code": code,
    }
    return ("refuse", (400, json.dumps({"error": error})))


@pytest.mark.parametrize("named", [True, False])
def test_a_server_is_asked_again_the_way_it_wants(server, tmp_path, waits, named):
    """Each parameter that it refuses is renamed or left out, once, and stays so for the model."""
    server.plan = [refusal(name, named=named) for name in ("max_tokens", "temperature", "seed")]
    server.usual = "fine"
    chat = chat_of(server, tmp_path, waits)
    with pytest.warns(UserWarning, match="takes no") as told:
        assert chat(MESSAGES, SCHEMA, SAMPLING) == "fine"
    assert len(told) == 2, "temperature and seed, which decide the answers"
    bodies = [body for _, body in server.seen]
    assert len(bodies) == 4 and bodies[-1]["max_completion_tokens"] == SAMPLING.max_tokens
    assert (
        not {"max_tokens", "temperature", "seed"} & set(bodies[-1])
        and "response_format" in bodies[-1]
    )
    assert "temperature" in bodies[1] and "max_tokens" not in bodies[1]
    chat(MESSAGES, SCHEMA, Sampling(0.0, 9, 64))
    assert set(server.seen[-1][1]) == set(bodies[-1]), "learnt"
    chat(MESSAGES, SCHEMA, SAMPLING)
    assert chat.counters.cached == 1, "an answer is found again under what was asked for"


def test_a_refusal_that_goes_on_ends_with_the_servers_own_reason(server, tmp_path, waits):
    told = {
        "message": "This model's maximum context length is 8 tokens.\n\x1b[31mShorten the prompt",
        "param": None,
    }
    server.usual = ("refuse", (400, json.dumps({"error": told})))
    with pytest.raises(InputError) as refused:
        chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING)
    message = str(refused.value)
    assert "the server says: This model's maximum context length is 8 tokens." in message
    assert "\x1b" not in message and "\n" not in message and len(server.seen) == 1
    assert {"max_tokens", "temperature", "seed", "response_format"} <= set(server.seen[-1][1]), (
        "a prompt that is too long gives up no parameter"
    )


def test_an_empty_account_is_not_asked_again(server, tmp_path, waits):
    error = {
        "message": "You exceeded your current quota.",
        "code": "insufficient_quota",
        "type": "insufficient_quota",
    }
    server.usual = ("refuse", (429, json.dumps({"error": error})))
    with pytest.raises(
        InputError, match="answers 429.*the server says: You exceeded your current quota"
    ):
        chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING)
    assert len(server.seen) == 1


def test_a_server_that_counts_below_zero_gives_no_money_back(server, tmp_path, waits):
    answer = json.loads(servers.completion("fine"))
    answer["usage"] = {"prompt_tokens": -1_000_000, "completion_tokens": 5, "total_tokens": 5}
    server.usual = ("raw", json.dumps(answer))
    chat = chat_of(server, tmp_path, waits, prices=(1.0, 1.0))
    chat(MESSAGES, SCHEMA, SAMPLING)
    assert chat.counters.cost > 0 and chat.limits.cost > 0 and chat.counters.prompt_tokens == 0


def test_a_second_run_makes_no_request(server, tmp_path, waits):
    requests = [(MESSAGES, SCHEMA, Sampling(0.0, seed, 64)) for seed in range(4)]
    server.usual = lambda body: str(body["seed"])
    first = [chat_of(server, tmp_path, waits)(*request) for request in requests]
    assert first == ["0", "1", "2", "3"] and len(server.seen) == 4
    chat = chat_of(server, tmp_path, waits, max_requests=0)
    assert [chat(*request) for request in requests] == first
    assert len(server.seen) == 4 and (chat.counters.requests, chat.counters.cached) == (0, 4)


@pytest.mark.parametrize(
    "other",
    [
        ("m", MESSAGES, SCHEMA, Sampling(0.1, 3, 64)),
        ("m", MESSAGES, SCHEMA, Sampling(0.0, 4, 64)),
        ("m", MESSAGES, SCHEMA, Sampling(0.0, 3, 65)),
        ("m", MESSAGES, {"type": "object"}, SAMPLING),
        ("m", [*MESSAGES, *MESSAGES], SCHEMA, SAMPLING),
        ("n", MESSAGES, SCHEMA, SAMPLING),
    ],
)
def test_model_messages_schema_and_sampling_each_change_the_key(server, tmp_path, other):
    model, *request = other
    Chat(EndpointModel(endpoint(server), 60), tmp_path)(MESSAGES, SCHEMA, SAMPLING)
    Chat(EndpointModel(endpoint(server, model=model), 60), tmp_path)(*request)
    assert len(server.seen) == 2 and len(list(tmp_path.glob("*.json"))) == 2


def test_a_damaged_entry_is_asked_for_again(server, tmp_path, waits):
    chat = chat_of(server, tmp_path, waits)
    for damage in ("", "{", "[]", "{}", "\x00"):
        chat(MESSAGES, SCHEMA, SAMPLING)
        (entry,) = tmp_path.glob("*.json")
        entry.write_text(damage)
    assert chat(MESSAGES, SCHEMA, SAMPLING) == server.usual and len(server.seen) == 6


def test_cache_is_private_and_holds_neither_key_nor_header_nor_question(server, tmp_path, waits):
    folder = tmp_path / "run" / "judge_cache"
    server.usual = lambda body: f"I was sent {KEY}"
    assert KEY not in chat_of(server, folder, waits)(MESSAGES, SCHEMA, SAMPLING)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (entry,) = folder.iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    text = entry.read_text()
    assert not [word for word in (KEY, "Bearer", "uthorization", "Jane Roe") if word in text]
    assert set(json.loads(text)) == {
        "text",
        "complete",
        "prompt_tokens",
        "completion_tokens",
        "model",
    }


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500])
def test_neither_key_nor_question_is_in_an_error_or_a_log(server, tmp_path, waits, caplog, status):
    caplog.set_level(logging.INFO)
    server.usual = ("status", (status, {}))
    with pytest.raises(InputError) as caught:
        chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING)
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text + str(caught.value)
    assert str(status) in shown and KEY not in shown and "Jane Roe" not in shown


def test_key_is_not_logged_at_debug_level_either(server, tmp_path, waits, caplog):
    caplog.set_level(logging.DEBUG)
    server.plan = [("status", (500, {})), ("torn", None)]
    chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING)
    assert "chat/completions" in caplog.text and KEY not in caplog.text


def test_a_redirect_is_not_followed(server, tmp_path, waits):
    with running() as elsewhere:
        server.plan = [("status", (307, {"Location": f"{elsewhere.url}/chat/completions"}))]
        with pytest.raises(InputError, match="answers 307"):
            chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING)
        assert elsewhere.seen == []


def test_a_proxy_of_the_environment_is_not_used_for_loopback(server, tmp_path, waits, monkeypatch):
    with running() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING)
        assert proxy.seen == [] and len(server.seen) == 1


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_key_names_its_variable(server, monkeypatch, value):
    monkeypatch.delenv("TEST_JUDGE_KEY")
    if value is not None:
        monkeypatch.setenv("TEST_JUDGE_KEY", value)
    with pytest.raises(InputError, match="TEST_JUDGE_KEY: is not set"):
        EndpointModel(endpoint(server), 5)


def test_the_rate_is_kept(server, tmp_path):
    now, waits = [100.0], []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    limits = Limits(requests_per_minute=30, sleep=sleep, clock=lambda: now[0])
    chat = Chat(EndpointModel(endpoint(server), 60), tmp_path, limits)
    for seed in range(3):
        chat(MESSAGES, SCHEMA, Sampling(0.0, seed, 64))
    now[0] += 1.5
    chat(MESSAGES, SCHEMA, Sampling(0.0, 9, 64))
    assert waits == pytest.approx([2.0, 2.0, 0.5])


def test_requests_stop_at_their_limit_which_two_models_share(server, tmp_path, waits):
    limits = Limits(max_requests=3, sleep=waits.append)
    one, two = (
        Chat(EndpointModel(endpoint(server, model=name), 60), tmp_path, limits) for name in "ab"
    )
    one(MESSAGES, SCHEMA, SAMPLING)
    two(MESSAGES, SCHEMA, SAMPLING)
    server.plan = [("status", (500, {})), "never asked"]
    with pytest.raises(InputError, match="judge.max_requests` is 3"):
        one(MESSAGES, SCHEMA, Sampling(0.0, 8, 64))
    assert len(server.seen) == 3, "retries count, and the fourth request is not made"


def test_cost_stops_before_it_is_passed(server, tmp_path, waits):
    price = (
        100 * 10 + 10 * 40
    ) / 1_000_000  # what the server counts: 100 prompt and 10 completion tokens
    chat = chat_of(server, tmp_path, waits, prices=(10.0, 40.0), max_cost=0.02)
    with pytest.raises(InputError, match="judge.max_cost` 0.02"):
        for seed in range(100):
            chat(MESSAGES, SCHEMA, Sampling(0.0, seed, 64))
    assert (
        chat.counters.cost == pytest.approx(len(server.seen) * price)
        and 0 < chat.counters.cost <= 0.02
    )
    assert chat.counters.cost + (64 * 40 + len(json.dumps([MESSAGES, SCHEMA])) * 10) / 1e6 > 0.02, (
        "one more could have passed it"
    )
    assert (chat.counters.prompt_tokens, chat.counters.completion_tokens) == (
        100 * len(server.seen),
        10 * len(server.seen),
    )


def test_an_answer_that_never_came_is_paid_for_in_full(server, tmp_path, waits):
    server.plan = [("torn", None)]
    chat = chat_of(server, tmp_path, waits, prices=(0.0, 1e6))
    chat(MESSAGES, SCHEMA, SAMPLING)
    assert chat.counters.cost == pytest.approx(64 + 10)


def test_nothing_is_asked_with_no_money(server, tmp_path, waits):
    with pytest.raises(InputError, match="max_cost"):
        chat_of(server, tmp_path, waits, prices=(1.0, 1.0), max_cost=0.0)(
            MESSAGES, SCHEMA, SAMPLING
        )
    assert server.seen == []
    assert chat_of(server, tmp_path, waits, max_cost=0.0)(MESSAGES, SCHEMA, SAMPLING), (
        "a free endpoint needs none"
    )


def refused_as(parameter: str | None, code: str | None, text: str) -> dict:
    """The body of a refusal in OpenAI's form."""
    error = {"message": text, "type": "invalid_request_error", "param": parameter, "code": code}
    return {"error": error}


def of_a_check(kind: str, message: str, *place: str) -> dict:
    """The body of a refusal in FastAPI's form."""
    return {"detail": [{"type": kind, "loc": ["body", *place], "msg": message}]}


GOOGLE = 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'
DEFAULT = "'temperature' does not support 0.0 with this model. Only the default (1) is supported."
WORDED = [  # how servers word it
    ("max_tokens", {"error": {"message": "max_tokens is unknown here"}}),
    ("temperature", refused_as("temperature", "unsupported_value", DEFAULT)),
    ("temperature", {"object": "error", "message": "temperature isn't supported", "code": 400}),
    ("seed", of_a_check("extra_forbidden", "Extra inputs are not permitted", "seed")),
    ("seed", [{"error": {"code": 400, "message": GOOGLE}}]),
    ("response_format", refused_as("response_format", None, "of type 'json_schema' is not there")),
    ("response_format", of_a_check("literal_error", "Should be text", "response_format", "type")),
    ("response_format", {"error": "bad request"}),
]


@pytest.mark.filterwarnings("ignore:judge model")
@pytest.mark.parametrize(("parameter", "body"), WORDED)
@pytest.mark.parametrize("status", [400, 422])
def test_each_servers_way_of_refusing_is_understood(
    server, tmp_path, waits, parameter, body, status
):
    refusal = ("refuse", (status, json.dumps(body)))
    server.usual = lambda sent: refusal if parameter in sent else "fine"
    assert chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING) == "fine"
    first, second = (sent for _, sent in server.seen)
    renamed = {"max_completion_tokens"} if parameter == "max_tokens" else set()
    assert second.keys() == first.keys() - {parameter} | renamed and waits == []


@pytest.mark.filterwarnings("ignore:judge model")
def test_a_server_that_refuses_everything_may_still_fail_in_passing(server, tmp_path, waits):
    def picky(sent: dict) -> tuple | str:
        for name in ("seed", "max_tokens", "response_format", "temperature"):
            if name in sent:
                body = refused_as(name, "unsupported_parameter", "no")
                return ("refuse", (400, json.dumps(body)))
        return "fine"

    server.plan, server.usual = [("status", (500, {}))] * 4, picky
    assert chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING) == "fine"
    assert server.seen[-1][1].keys() == {"model", "messages", "max_completion_tokens"}
    assert len(server.seen) == 9 and len(waits) == 4, "a refused form is no failed attempt"


TOO_LONG = [
    refused_as("messages", "context_length_exceeded", "The maximum context length is 4 tokens."),
    {
        "error": {
            "message": "'max_tokens' or 'max_completion_tokens' is too large: 64. This model's "
            "maximum context length is 50 tokens, and more is not supported",
            "code": 400,
        }
    },
    {"error": {"code": 400, "message": "the request exceeds the available context size"}},
]


@pytest.mark.parametrize("body", TOO_LONG)
def test_a_prompt_that_is_too_long_is_no_refused_parameter(server, tmp_path, waits, body):
    server.usual = ("refuse", (400, json.dumps(body)))
    with pytest.raises(InputError, match="too long for the model; the server says: .*context"):
        chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING)
    assert len(server.seen) == 1


QUOTA = {"error": {"message": "No quota", "type": "insufficient_quota"}}
PAUSE = {"error": {"message": "Slow down, or see /billing", "code": "rate_limit_exceeded"}}


@pytest.mark.parametrize(
    ("status", "body", "words", "requests"),
    [
        (404, refused_as(None, "model_not_found", "m is no model"), "says: m is no model", 1),
        (404, "<html>Not Found</html>", r"no such model or address; see .*base_url\)$", 1),
        (402, {"error": {"message": "Pay first"}}, "no credit left.*Pay first", 1),
        (405, "", "base_url usually ends in /v1", 1),
        (429, QUOTA, "no credit left; waiting does not help.*No quota", 1),
        (429, PAUSE, "no answer in 5 attempts.*status 429: Slow down", 5),
        (400, refused_as(None, "content_filter", "It is filtered"), "says: It is filtered", 1),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(
    server, tmp_path, waits, status, body, words, requests
):
    server.usual = ("refuse", (status, body if isinstance(body, str) else json.dumps(body)))
    with pytest.raises(InputError, match=words):
        chat_of(server, tmp_path, waits)(MESSAGES, SCHEMA, SAMPLING)
    assert len(server.seen) == requests


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"wrong key {KEY}", "wrong key ***"),
        (f"wrong key {KEY[:15]}...", None),
        (f"wrong key {KEY[4:].upper()}", None),
        ("blocked: jane ROE", None),
        ("blocked: 1234567", None),
        ('wrong: {"content": "J\\u00e4ne Roe"}', "wrong:"),
        ("\x1b]0;title\x07a\x1b[31mred\x1b[0m\nline \x9b2J\u202e", "ared line"),
        ("x" * 5000, "x" * 200),
    ],
)
def test_a_servers_words_hold_no_part_of_key_or_question(server, tmp_path, waits, text, shown):
    server.usual = ("refuse", (403, json.dumps({"error": {"message": text}})))
    messages = [{"role": "user", "content": "Patient Jane Roe, number 1234567: how relevant?"}]
    with pytest.raises(InputError) as caught:
        chat_of(server, tmp_path, waits)(messages, SCHEMA, SAMPLING)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    assert ("the server says" in message) == (shown is not None) and (shown or "") in message
    parts = [part.lower() for part in (KEY[:10], KEY[-10:], "Roe", "1234567")]
    assert not [part for part in parts if part in message.lower()]


@pytest.mark.parametrize("body", [body for _, body in WORDED[:6]] + TOO_LONG)
def test_the_usual_words_are_shown_beside_the_kits_own_prompts(server, tmp_path, waits, body):
    server.usual = ("refuse", (403, json.dumps(body)))
    judge = LanguageModelJudge(chat_of(server, tmp_path, waits), SAMPLING)
    with pytest.raises(InputError, match="the server says"):
        judge.conflict("Is there a nodule?", "yes", "no")
    with pytest.raises(InputError, match="the server says"):
        judge.write("Is there a nodule?", "yes", np.random.default_rng(0))
