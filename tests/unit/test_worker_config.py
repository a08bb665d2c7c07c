"""A worker's settings: what its pod was given last goes before what it was made for, and nonsense is one sentence."""

from __future__ import annotations

import pytest

from disaggworker import config
from disaggworker.errors import StartError

ARGV = ["prefill", "--model", "m", "--weights", "w", "--pairing-key", "k"]


@pytest.mark.parametrize(
    ("env", "role", "chunk"),
    [
        ({}, "prefill", 64),
        ({"WORKER_ROLE": "", "WORKER_CHUNK": ""}, "prefill", 64),
        ({"WORKER_ROLE": "decode", "WORKER_CHUNK": ""}, "decode", 0),
        ({"WORKER_ROLE": "mixed", "WORKER_CHUNK": "512"}, "mixed", 512),
    ],
)
def test_a_container_that_starts_again_is_what_its_pod_has_become(
    env: dict[str, str], role: str, chunk: int
) -> None:
    read = config.read([*ARGV, "--chunk", "64"], env)
    assert (read.role, read.chunk) == (role, chunk)


@pytest.mark.parametrize(
    ("flags", "env", "words"),
    [
        (["--chunk", "-1"], {}, "--chunk is -1"),
        ([], {"WORKER_ROLE": "both"}, "WORKER_ROLE is 'both'; it must be one of prefill, decode, mixed"),
        ([], {"WORKER_ROLE": "mixed", "WORKER_CHUNK": "-5"}, "WORKER_CHUNK is '-5'"),
    ],
)
def test_nonsense_is_one_sentence(flags: list[str], env: dict[str, str], words: str) -> None:
    with pytest.raises(StartError, match=words):
        config.read([*ARGV, *flags], env)


def test_the_prefix_cache_is_on_but_where_a_pace_was_planned_without_it() -> None:
    paced = ["--pace", '{"gpu": "g", "model": "m"}']
    assert config.read(ARGV, {}).prefix_cache
    assert not config.read([*ARGV, *paced], {}).prefix_cache
    assert config.read([*ARGV, *paced, "--prefix-cache"], {}).prefix_cache
    assert not config.read([*ARGV, "--no-prefix-cache"], {}).prefix_cache
