"""Language models that answer in text: two back ends, and around them a cache on disk, retries and
limits.

A back end answers one request once. ``Chat`` reads the cache first, and asks within limits of rate,
requests and money.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Protocol

import httpx2

from ..base.environment import check_device
from ..base.errors import InputError, first_line
from ..base.files import write_json
from ..base.privacy import is_loopback, private_folder
from ..base.sections import LanguageModel
from .refusals import ADAPTED, Refusal, hint

Messages = list[dict[str, str]]
ATTEMPTS = 5
LONGEST_WAIT = 300.0
MILLION = 1_000_000
LARGEST_ANSWER = 4 * MILLION  # bytes; the longest report has some thousand


@dataclass(frozen=True)
class Sampling:
    """Parameters of one answer: temperature (0 decodes greedily), seed, and the longest answer in
    tokens.
    """

    temperature: float
    seed: int
    max_tokens: int


@dataclass(frozen=True)
class Reply:
    """One answer. ``complete``: not cut off at the longest length. Tokens are None where the server
    counts none.
    """

    text: str
    complete: bool
    prompt_tokens: int | None
    completion_tokens: int | None


class Adapted(Exception):
    """The server does not take a parameter, and gets it no more; this happens once a parameter."""


class Unanswered(Exception):
    """A request that failed and may succeed later: after ``wait`` seconds where known; ``billed``
    if it may cost.
    """

    def __init__(self, reason: str, wait: float | None = None, billed: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.billed = billed


class Backend(Protocol):
    """What answers: a server or a model in this process."""

    name: str

    def __call__(self, messages: Messages, schema: dict[str, Any], sampling: Sampling) -> Reply:
        """Answer ``messages``, if it can as JSON by ``schema``.

        Raises:
            Unanswered: later it may.
            Adapted: it will be asked in another way.
            InputError: it never will.
        """


@dataclass
class Counters:
    """What one language model was asked, and what became of it; ``cost`` is in the unit of the
    prices.
    """

    requests: int = 0
    cached: int = 0
    retries: int = 0
    unreadable: int = 0
    fallbacks: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


@dataclass
class Limits:
    """Rate, requests and cost that several models share; a request that could pass a limit isn't
    made.
    """

    requests_per_minute: float = math.inf
    max_requests: float = math.inf
    max_cost: float = math.inf
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    requests: int = 0
    cost: float = 0.0
    _next: float = field(default=-math.inf, init=False)

    def admit(self, cost: float) -> None:
        """Wait for the rate, and count one request that costs ``cost`` at most. Raises InputError:
        a limit is reached.
        """
        kept = "raise it and run again: every answer so far is in the cache and costs nothing"
        if self.requests >= self.max_requests:
            raise InputError(
                f"judge: {self.requests} requests are made, and the profile's `judge.max_requests` "
                f"is {self.max_requests}; {kept}"
            )
        if self.cost + cost > self.max_cost:
            raise InputError(
                f"judge: {self.cost:.4f} is spent and the next request may cost {cost:.4f}, which "
                f"passes the profile's `judge.max_cost` {self.max_cost:g}; {kept}"
            )
        wait = self._next - self.clock()
        if wait > 0:
            self.sleep(wait)
        self._next = max(self._next, self.clock()) + 60 / self.requests_per_minute
        self.requests += 1


class EndpointModel:
    """A model behind an OpenAI-compatible endpoint. The key stays in the client; answers and errors
    are rid of it.
    """

    def __init__(self, model: LanguageModel, timeout: float) -> None:
        import openai

        # `load_profile` refuses an endpoint without an address.
        assert model.base_url is not None
        self.name = model.model
        self._url = model.base_url
        self._key = _api_key(model.api_key_env)
        self._refused: set[str] = set()  # parameters that the server does not take from this model
        # A proxy of the environment would see what is meant for this machine alone, and a redirect
        # could lead elsewhere.
        web = openai.DefaultHttpxClient(
            follow_redirects=False,
            trust_env=not is_loopback(model.base_url),
            event_hooks={"request": [_note_start], "response": [partial(_bound, timeout)]},
            # A few bytes of a compressed body can fill the memory.
            headers={"Accept-Encoding": "identity"},
        )
        self._client = openai.OpenAI(
            base_url=model.base_url,
            api_key=self._key or "none",
            timeout=timeout,
            max_retries=0,  # `Chat` asks again, and counts what each attempt may cost
            http_client=web,
        )
        # Else both are taken from the environment and sent along.
        self._client.organization = None
        self._client.project = None

    def __call__(self, messages: Messages, schema: dict[str, Any], sampling: Sampling) -> Reply:
        """Answer once; a parameter that the server refuses is left out, or renamed, from then
        on.
        """
        import openai

        try:
            answer = self._client.chat.completions.create(
                **self._request(messages, schema, sampling)
            )
        except openai.APITimeoutError:
            raise Unanswered("no answer in time", billed=True) from None
        except openai.APIConnectionError:
            raise Unanswered("no connection, or it broke", billed=True) from None
        except openai.APIStatusError as error:
            raise self._refusal(error, messages) from None
        except (openai.APIError, ValueError):
            raise Unanswered("half an answer", billed=True) from None
        return self._read(answer)

    def _request(
        self, messages: Messages, schema: dict[str, Any], sampling: Sampling
    ) -> dict[str, Any]:
        """The request as this server takes it. The cache names answers by what was wanted, whatever
        was left out.
        """
        request = {"model": self.name, "messages": messages, **asdict(sampling)}
        request["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": schema},
        }
        for refused in self._refused:
            value = request.pop(refused)
            other_name = ADAPTED[refused]
            if other_name:
                request[other_name] = value
        return request

    def _refusal(self, error: Any, messages: Messages) -> Exception:
        """What an answer with an error status means: ask again, ask in another way, or give up."""
        status = error.status_code
        refusal = Refusal.of(error.body)
        asked = " ".join(message["content"] for message in messages)
        said = refusal.shown(self._key, asked)
        passing = status in (408, 409, 429) or status >= 500
        if passing and not refusal.no_money:
            reason = f"status {status}: {said}" if said else f"status {status}"
            return Unanswered(reason, _retry_after(error.response.headers))
        if status in (400, 422):
            sent = [name for name in ADAPTED if name not in self._refused]
            refused = refusal.parameter(sent)
            if refused:
                self._leave_out(refused)
                return Adapted(refused)
        parts = [hint(status, refusal), f"the server says: {said}" if said else ""]
        why = "; ".join(part for part in parts if part)
        answer = f"{self._url}: answers {status} for the model {self.name!r}"
        return InputError(f"{answer} ({why})" if why else answer)

    def _leave_out(self, refused: str) -> None:
        self._refused.add(refused)
        if refused in ("temperature", "seed"):  # they decide what is answered, not only its form
            warnings.warn(
                f"judge model {self.name!r}: the server takes no {refused}; it answers with its "
                "own, and the profile's does not hold",
                stacklevel=2,
            )

    def reach(self) -> str:
        """Ask which models the endpoint serves, and say so in words; no completion is asked for.

        Raises:
            InputError: it does not answer, refuses the key, or serves other models only.
        """
        import openai

        try:
            served = [model.id for model in self._client.models.list()]
        except openai.APIStatusError as error:
            if error.status_code == 404:  # not every server lists its models
                return f"{self.name} at {self._url}, which answers and lists no models"
            why = hint(error.status_code, Refusal.of(error.body))
            answer = f"{self._url}: answers {error.status_code}"
            raise InputError(f"{answer} ({why})" if why else answer) from None
        except (openai.APIError, ValueError):
            raise InputError(
                f"{self._url}: does not answer; start the server, or correct the base_url"
            ) from None
        if served and self.name not in served:
            names = ", ".join(map(str, served[:5]))
            raise InputError(
                f"{self._url}: serves {names} and not {self.name}; correct the model's name"
            )
        return f"{self.name} at {self._url}, which serves it"

    def _read(self, answer: Any) -> Reply:
        """The reply in an answer of the protocol; what a server has put into it is not trusted."""
        try:
            choice = answer.choices[0]
            text = choice.message.content or ""
            if not isinstance(text, str):
                raise TypeError("the content is no text")
            complete = choice.finish_reason != "length"
            prompt_tokens, completion_tokens = _token_counts(answer.usage)
        except (AttributeError, IndexError, TypeError):
            raise Unanswered("an answer that is no chat completion", billed=True) from None
        if self._key:
            text = text.replace(self._key, "***")
        # Half a surrogate pair cannot be written to the cache.
        text = text.encode("utf-8", "replace").decode()
        return Reply(text, complete, prompt_tokens, completion_tokens)


def _note_start(request: httpx2.Request) -> None:
    request.extensions["begun"] = time.monotonic()


def _bound(seconds: float, response: httpx2.Response) -> None:
    """Bound the body that is about to be read. The client's own timeout is one between two bytes: a
    server that drips would never meet it.
    """
    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx2.ReadError("a compressed body, which was not asked for")
    assert isinstance(response.stream, httpx2.SyncByteStream)
    deadline = response.request.extensions["begun"] + seconds
    response.stream = _BoundedStream(response.stream, deadline)


@dataclass
class _BoundedStream(httpx2.SyncByteStream):
    """A body that is read until a deadline, and up to a size."""

    stream: httpx2.SyncByteStream
    deadline: float

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self.stream:
            size += len(part)
            if size > LARGEST_ANSWER:
                raise httpx2.ReadError(f"a body of more than {LARGEST_ANSWER:,} bytes")
            if time.monotonic() > self.deadline:
                raise httpx2.ReadTimeout("the body did not end in time")
            yield part

    def close(self) -> None:
        """Close the connection's own stream."""
        self.stream.close()


def _token_counts(usage: Any) -> tuple[int | None, int | None]:
    """Tokens of prompt and completion; None for both where one is not a count."""
    if not usage:
        return None, None
    counts = usage.prompt_tokens, usage.completion_tokens
    # A negative count would give money back, and no limit of cost be reached. A bool is an int too.
    if any(type(count) is not int or count < 0 for count in counts):
        return None, None
    return counts


class LocalModel:
    """A text-generation model in this process, prompted through its chat template;
    ``quantization``: none or nf4.
    """

    def __init__(self, model: LanguageModel, device: str = "auto") -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ..base.precision import nf4_config
        from ..base.quiet import quiet_loading

        target = torch.device(check_device(device))
        small = model.quantization == "nf4"
        if small and target.type != "cuda":
            raise InputError(
                f"judge model {model.model}: quantization nf4 needs a GPU and there is none in "
                "use; write none"
            )
        # The cache names answers by the model: rounded weights answer otherwise.
        self.name = f"{model.model} (nf4)" if small else model.model
        device_map: str | dict[str, Any] | None = None
        if small:
            # Quantised weights cannot be moved afterwards: they are placed while they are loaded.
            device_map = "auto" if torch.cuda.device_count() > 1 else {"": target}
        try:
            with quiet_loading():
                self._tokenizer = AutoTokenizer.from_pretrained(
                    model.model, trust_remote_code=False
                )
                self._model = AutoModelForCausalLM.from_pretrained(
                    model.model,
                    trust_remote_code=False,
                    dtype=torch.float32 if target.type == "cpu" else torch.bfloat16,
                    device_map=device_map,
                    quantization_config=nf4_config() if small else None,
                ).eval()
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(
                f"judge model {model.model}: cannot be loaded as a text-generation model "
                f"({first_line(error)}); give a folder, or a name on the Hub"
            ) from error
        if self._tokenizer.chat_template is None:
            raise InputError(
                f"judge model {model.model}: its tokenizer has no chat template; use an "
                "instruction-tuned model, or put chat_template.jinja into its folder"
            )
        if not small:
            self._model.to(target)

    def __call__(self, messages: Messages, schema: dict[str, Any], sampling: Sampling) -> Reply:
        """Answer once; ``schema`` is in the prompt's words only. torch's own random state is left
        as it was.
        """
        import torch

        model = self._model
        inputs: Any = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs = inputs.to(model.device)
        # Every way is set: the model's own generation settings would hold otherwise.
        ways: dict[str, Any]
        if sampling.temperature > 0:
            ways = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_k": 0,
                "top_p": 1.0,
            }
        else:
            ways = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):
            torch.manual_seed(sampling.seed)
            tokens = model.generate(**inputs, max_new_tokens=sampling.max_tokens, **ways)[0]
        prompt_tokens = inputs["input_ids"].shape[1]
        answer = tokens[prompt_tokens:]
        text = str(self._tokenizer.decode(answer, skip_special_tokens=True))
        return Reply(text, len(answer) < sampling.max_tokens, prompt_tokens, len(answer))


class Chat:
    """A back end with a cache in ``folder``, retries, limits and prices per million tokens;
    ``counters`` keeps score.

    An entry's name is the SHA-256 of model, messages, schema and sampling; it holds the answer, not
    the question.

    Retries are written out here, not left to the client's ``max_retries`` or to a library. Each
    attempt is admitted by the shared limits and paid for by what it may cost, an answer that was
    cut off is asked for with more room, and a parameter that the server refuses is no failed
    attempt. Those count retries only, out of sight of the limits.
    """

    def __init__(
        self,
        backend: Backend,
        folder: str | os.PathLike,
        limits: Limits | None = None,
        input_price: float = 0.0,
        output_price: float = 0.0,
    ) -> None:
        self.backend = backend
        self.limits = limits or Limits()
        self.counters = Counters()
        self._folder = private_folder(folder)
        self._input_price = input_price
        self._output_price = output_price

    @property
    def name(self) -> str:
        """The model's name."""
        return self.backend.name

    def __call__(self, messages: Messages, schema: dict[str, Any], sampling: Sampling) -> str:
        """The answer's text, from the cache where it is there.

        Raises:
            InputError: a limit is reached, the endpoint refuses, or there is no answer after
                several attempts.
        """
        request = {"model": self.name, "messages": messages, "schema": schema, **asdict(sampling)}
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        path = self._folder / f"{digest}.json"
        try:
            text = json.loads(path.read_text(encoding="utf-8"))["text"]
            if not isinstance(text, str):
                raise TypeError("the entry holds no text")
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            # No entry, or a damaged one.
            reply = self._ask(messages, schema, sampling)
            write_json(path, asdict(reply) | {"model": self.name}, mode=0o600)
            return reply.text
        self.counters.cached += 1
        return text

    def _ask(self, messages: Messages, schema: dict[str, Any], sampling: Sampling) -> Reply:
        """Ask ``ATTEMPTS`` times at most, with more room each time that an answer was cut off."""
        # A token is a byte at least, so that the prompt is never longer than this.
        prompt_bytes = len(json.dumps([messages, schema]).encode())
        longest = 4 * sampling.max_tokens
        reason = ""
        for attempt in range(ATTEMPTS):
            last = attempt + 1 == ATTEMPTS
            worst = self._price(prompt_bytes, sampling.max_tokens)
            wait: float | None
            try:
                reply = self._in_its_way(messages, schema, sampling, worst)
            except Unanswered as error:
                self._spend(worst if error.billed else 0.0)
                reason = str(error)
                wait = error.wait
            else:
                self._book(reply, worst)
                if reply.complete or sampling.max_tokens >= longest or last:
                    return reply
                sampling = replace(sampling, max_tokens=2 * sampling.max_tokens)
                wait = 0.0
            if not last:
                self.counters.retries += 1
                self.limits.sleep(_back_off(attempt) if wait is None else min(wait, LONGEST_WAIT))
        raise InputError(
            f"judge model {self.name!r}: no answer in {ATTEMPTS} attempts (the last: {reason}); "
            "check the server and run again: every answer so far is in the cache"
        )

    def _in_its_way(
        self, messages: Messages, schema: dict[str, Any], sampling: Sampling, worst: float
    ) -> Reply:
        """Ask until the server takes the request's form. That is no failed attempt, and it ends:
        see ``Adapted``.
        """
        while True:
            self.limits.admit(worst)
            self.counters.requests += 1
            try:
                return self.backend(messages, schema, sampling)
            except Adapted:
                self.counters.retries += 1

    def _book(self, reply: Reply, worst: float) -> None:
        """Pay for a reply: by the tokens that the server counts, else ``worst``."""
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            self._spend(worst)
        else:
            self._spend(self._price(reply.prompt_tokens, reply.completion_tokens))
        self.counters.prompt_tokens += reply.prompt_tokens or 0
        self.counters.completion_tokens += reply.completion_tokens or 0

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        prompt = prompt_tokens * self._input_price
        completion = completion_tokens * self._output_price
        return (prompt + completion) / MILLION

    def _spend(self, cost: float) -> None:
        self.counters.cost += cost
        self.limits.cost += cost


def _api_key(variable: str | None) -> str | None:
    """The key in an environment variable; None where the profile names none."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"environment variable {variable}: is not set; it should hold the key that the "
            "profile's judge section asks for. Set it before you start Jupyter; never write the "
            "key into a profile or notebook"
        )
    return key


def _back_off(attempt: int) -> float:
    """Seconds before the next attempt: 1, 2, 4, ... with jitter of a half."""
    return 2**attempt * random.uniform(0.5, 1.5)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, given as a number or as a date; None where it says
    nothing readable.
    """
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    # float() reads "nan" and "inf" too.
    if not math.isfinite(seconds):
        return None
    return max(0.0, seconds)
