"""The official `openai` client, as it comes: a base URL and a key, and everything else is its own default.

Real prefill and decode workers, a real router; the client runs in this thread as it would in anybody's script.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from disaggserve import metric_names as names
from e2e.dataplane import Member
from tests.integration.served import MODEL, Served

PROMPT = "The keeper of the lighthouse"
MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
]
COMPLETION: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
CHAT: Any = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 9, "temperature": 0}


def made(router: Member, **more: Any) -> OpenAI:
    return OpenAI(base_url=router.url + "/v1", api_key="none", **more)


@pytest.fixture
def client(served: Served) -> OpenAI:
    return made(served.router)


def test_completions_whole_and_streamed_say_the_same(served: Served, client: OpenAI) -> None:
    whole = client.completions.create(**COMPLETION, logprobs=2)
    (choice,) = whole.choices
    assert (whole.object, whole.model, choice.finish_reason) == ("text_completion", MODEL, "length")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 12
    assert all(
        1 <= len(top) <= 3 for top in choice.logprobs.top_logprobs or ()
    )  # of tokens spelt alike one is there
    assert all(0 < sum(map(math.exp, top.values())) <= 1 for top in choice.logprobs.top_logprobs or ())

    with client.completions.create(
        **COMPLETION, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert {chunk.id for chunk in chunks if chunk.choices} == {chunks[0].id}
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == choice.text
    assert [c.finish_reason for chunk in chunks for c in chunk.choices] == [None] * 11 + ["length"]
    assert chunks[-1].usage == whole.usage


def test_chat_whole_and_streamed_say_the_same(served: Served, client: OpenAI) -> None:
    asked = {**CHAT, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert [len(entry.top_logprobs) for entry in entries] == [3] * 9
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)  # greedy
    # A token's own text may be half a character: bytes are what adds up.
    assert b"".join(bytes(e.bytes or ()) for e in entries).decode(errors="replace") == choice.message.content

    # The client's own accumulator, which knows what chunks must look like; a length that is reached is an error to it.
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
        with pytest.raises(openai.LengthFinishReasonError) as caught:
            stream.get_final_completion()
    final = caught.value.completion
    assert said == choice.message.content
    (last,) = final.choices
    assert (last.message.role, last.message.content) == ("assistant", choice.message.content)
    assert last.finish_reason == choice.finish_reason == "length"
    assert last.logprobs is not None
    assert [e.token for e in last.logprobs.content or ()] == [e.token for e in entries]
    assert final.usage is not None
    assert whole.usage is not None
    # Asked again, the prompt's first block is found; that is all that may differ.
    cached = {"prompt_tokens_details"}
    assert final.usage.model_dump(exclude=cached) == whole.usage.model_dump(exclude=cached)
    assert final.usage.prompt_tokens_details is not None
    assert final.usage.prompt_tokens_details.cached_tokens == 16


def test_stop_seed_and_sampling_are_taken(served: Served, client: OpenAI) -> None:
    text = client.completions.create(**COMPLETION).choices[0].text
    stopped = client.completions.create(**{**COMPLETION, "stop": [text[4:6]]}).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[4:6])], "stop")
    sampled = {**COMPLETION, "temperature": 1.3, "top_p": 0.9, "seed": 5}
    once, again = (client.completions.create(**sampled).choices[0].text for _ in range(2))
    other = client.completions.create(**{**sampled, "seed": 6}).choices[0].text
    assert once == again != other


def test_models_are_listed_and_found_by_name(served: Served, client: OpenAI) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL) == listed
    with pytest.raises(openai.NotFoundError, match="other"):
        client.models.retrieve("other")


def test_many_at_once(served: Served, client: OpenAI) -> None:
    expected = client.chat.completions.create(**CHAT).choices[0].message.content

    async def ask(client: AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=served.router.url + "/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client) for _ in range(16)))

    assert set(asyncio.run(all_of_them())) == {expected}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": 1e9}, "temperature"),
        ({"n": 2}, "n"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [5] * 3000}, "prompt"),
        ({"stream_options": {"include_usage": "yes"}, "stream": True}, "stream_options.include_usage"),
    ],
)
def test_a_wrong_request_is_a_bad_request_that_names_its_field(
    client: OpenAI, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{**COMPLETION, **more})
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert caught.value.request_id
    assert param.split(".")[0] in caught.value.message


def test_an_unknown_model_is_not_found(served: Served, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**CHAT, "model": "gpt-4"})
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert MODEL in caught.value.message  # what would be right


def test_a_full_queue_is_a_rate_limit_that_the_clients_own_retries_get_over(
    served: Served, client: OpenAI
) -> None:
    router = served.call(served.plane.router("--max-queued", "1"))
    client = made(router)
    served.show_decode(False)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(client.completions.create, **COMPLETION)
        served.wait(lambda: served.plane.metric(router, names.ROUTER_QUEUED), "one waits")
        with pytest.raises(openai.RateLimitError) as caught:
            client.with_options(max_retries=0).completions.create(**COMPLETION)
        retry_after_s = float(caught.value.response.headers["Retry-After"])
        assert caught.value.code == "queue_full"
        began_s = time.monotonic()
        second = threads.submit(client.completions.with_raw_response.create, **COMPLETION)

        async def twice() -> bool:
            return await served.plane.metric(router, names.ROUTER_REQUESTS, outcome=names.REFUSED) >= 2

        served.wait(twice, "the second is refused, too")
        served.show_decode(True)
        assert first.result().usage.completion_tokens == 12
        answer = second.result()
        assert answer.retries_taken >= 1
        # Its own first back-off would be half a second: it did as Retry-After says.
        assert time.monotonic() - began_s >= retry_after_s
        assert answer.parse().choices[0].text == first.result().choices[0].text
    served.quiet()
    assert served.call(served.plane.terminate(router)) == 0


def test_a_timeout_of_the_client_cancels_the_request(served: Served, client: OpenAI) -> None:
    served.show_decode(False)
    try:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2, max_retries=0).completions.create(**COMPLETION)
        served.quiet()
    finally:
        served.show_decode(True)
    assert client.completions.create(**COMPLETION).choices


def test_leaving_a_stream_frees_what_it_held(served: Served, client: OpenAI) -> None:
    before = served.call(served.plane.outcomes())
    with client.completions.create(**{**COMPLETION, "max_tokens": 2000}, stream=True) as stream:
        next(iter(stream))
    served.quiet()
    after = served.call(served.plane.outcomes())
    assert after.get(names.CANCELLED, 0) == before.get(names.CANCELLED, 0) + 1


def test_no_instance_in_time_is_a_503_that_says_when_to_come_again(served: Served) -> None:
    router = served.call(served.plane.router("--queue-timeout", "0.1"))
    served.show_decode(False)
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            made(router, max_retries=0).completions.create(**COMPLETION)
        assert (caught.value.status_code, caught.value.code) == (503, "no_instance")
        assert int(caught.value.response.headers["Retry-After"]) > 0
        assert "no decode instance" in caught.value.message
    finally:
        served.show_decode(True)
        served.call(served.plane.terminate(router))


def test_retries_get_over_a_router_that_does_not_listen_yet(served: Served) -> None:
    address = served.plane.address()
    client = OpenAI(base_url=f"http://{address}:8000/v1", api_key="none")
    with pytest.raises(openai.APIConnectionError):
        client.with_options(max_retries=0).completions.create(**COMPLETION)

    retries = threading.Event()

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Retrying request" in record.getMessage():
                retries.set()

    log, handler = logging.getLogger("openai"), Heard(logging.INFO)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(client.with_options(max_retries=8).completions.create, **COMPLETION)
            assert retries.wait(30)
            router = served.call(served.plane.router(address=address, wait=False))
            assert asked.result().choices[0].finish_reason == "length"
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    assert served.call(served.plane.terminate(router)) == 0
