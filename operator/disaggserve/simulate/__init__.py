"""The simulator: what a deployment does with a list of requests, and whether that keeps the promise.

The rules (our engine's, REFERENCE § 4), which tests/oracle.py says once more in plain Python:

* First come, first served everywhere. KV blocks hold 16 tokens.
* One kind of instance: it may prefill (`Deployment.prefill`), may decode (`decode`), or both (`mixed`).
* A request goes on arrival to the instance with the fewest prompt tokens queued or running, among those that may
  prefill (`dispatch.choose_prefill`). With mixed instances tokens are weighed by the ns that one takes there in
  steps of `batch_tokens`, for small chunks are slower.
* After prefill it goes to the instance with the fewest KV tokens, among those that may decode: prompts and tokens
  made so far of everything assigned there and not finished (`dispatch.choose_decode`; a step in progress has made
  none yet). `sticky`: it decodes where it is. From a mixed instance it goes only where its blocks are free at once
  and nobody waits, else it stays: two full instances would wait for each other for ever.
* Router r mod `routers` does this for request r. With `view_age_s` = a it sees loads as of the last multiple of a,
  and what it assigned itself since.

Steps
* An instance has pp lanes. A lane begins a step when its last one is over, it has work, and the first stage is
  free; who is to join it joins then. A step passes the pp stages in order, each a first-come queue, for one stage's
  time each: bubbles are what lanes wait for each other. (Reserved on entry, which is exact: all steps pass the
  stages in the same order.) A pure prefill instance too has at most pp steps under way.
* policy "whole": prompts in order, up to `batch_tokens` (a longer one alone). On a mixed instance they go before
  decode (vLLM): where the first one's blocks are free the step is prompts only and the running decodes stall.
* policy "chunked": every step has the lane's decodes, a token each, and prompts cut to what is left of
  `batch_tokens` (Sarathi-Serve; DeepSpeed-MII with another budget). The next chunk of a prompt may follow in the
  next lane's step.
* One stage of a step with b decodes and chunks of c tokens, p of that prompt before each, takes
  max(knots(Σc + b), base[b]) + quad·Σ(c² + 2·c·p) + ctx[b]·Σ(context + 1): the matrix products of all tokens read the
  weights once, so the larger of both forms holds for them, while attention adds up. Without chunks it is the
  decode form, without decodes the prefill form. Cached prompt tokens count as p from the start.
* The i-th decode step of a request holds input + i tokens. When a prompt's last chunk is over it has its first token.

Memory
* A prompt's blocks, all of them, are taken with its first chunk (on a mixed instance with the block of its first
  decode step), and no prompt begins there while somebody waits for decode.
* Decode admits the head of its waiting list when ceil((input + 1) / 16) blocks are free beside 1 % of all its
  blocks (or all are free), and reserves them. The
  transfer takes the link, one at a time per decode instance, for bytes/bandwidth + latency; the prompt's blocks
  at prefill are held until it ends (back-pressure). The request then goes to the lane with the fewest requests.
* Where a step finds too few free blocks for growing contexts, the last of that lane's batch is preempted, and again
  until they suffice; the preempted go before who waits, the last one first. When admitted again (with blocks for
  its next step, without a transfer) it joins a lane as any other; each stage of that lane's next step then lasts
  the prefill of its tokens longer (recomputed there alone, the batch waits). With `swap_bytes_s` its KV is moved
  out in the step that it leaves for and back in the one that it is back for, and the first one out is the first back.
* handoff "push" (SGLang): the decode instance is chosen on arrival and reserves, first come, first served; then the
  prompt queues for prefill, and moves when that is done. Back-pressure is on the decode side.
* `overlap`: KV moves layer by layer while the last stage of its prefill runs, so a transfer admitted at the
  prefill's end counts as begun with that stage, if the link was free; it ends a block's time after prefill at least.
* transfer "step" (vLLM): the latency is that of the word that a prompt is done; the transfer begins with the first
  step of the decode instance after it (at once where none is under way) and takes bytes/bandwidth, so the request is
  in the step after the one in which its KV has come. `overlap` then has nothing to gain.
* transfer "inline" (DistServe's engine, its code): between two decode steps the loop pulls the first that waits
  while its blocks are free and those pulled and not yet running hold less than `pull_below` of all blocks, one
  after another, and stands still meanwhile. Then the preempted come back while they fit, and only when none is left
  who was pulled joins that lane, while its blocks are free once more (they are counted as waiting and as running).

Tokens
* `first_token_from="prefill"`: the prefill's token is the user's first, output − 1 decode steps follow, and a
  request of one token ends at prefill. `"decode"` (vLLM): the prefill's token is dropped, decode makes all
  `output` tokens, the first one in its first step.
* A request that does not fit the smallest instance that may prefill (input) or decode (input + steps) is served
  nowhere: its times are −1, and it misses the promise.

Left out: what a stage hands to the next, CPU time of engine and router, and failures. Real decode on pp > 1 is
slower by more than the bubbles (REFERENCE § 1).
"""

from disaggserve.simulate.judging import (
    Parts,
    Prediction,
    Promise,
    goodput,
    joined,
    judge,
    kept,
    one_after_another,
    parts,
)
from disaggserve.simulate.serving import (
    BadDeployment,
    Deployment,
    Outcome,
    Pool,
    run,
    run_copies,
    run_decode,
    run_prefill,
    warm_up,
)

__all__ = [
    "BadDeployment",
    "Deployment",
    "Outcome",
    "Parts",
    "Pool",
    "Prediction",
    "Promise",
    "goodput",
    "joined",
    "judge",
    "kept",
    "one_after_another",
    "parts",
    "run",
    "run_copies",
    "run_decode",
    "run_prefill",
    "warm_up",
]
