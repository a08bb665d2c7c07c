"""The simulator: what a deployment does with a list of requests, and whether that keeps the promise.

The rules (our engine's, REFERENCE § 4), which tests/oracle.py says once more in plain Python:

* First come, first served everywhere. KV blocks hold 16 tokens.
* A request goes on arrival to the prefill instance with the fewest prompt tokens queued or running
  (`dispatch.choose_prefill`). The instance starts a batch whenever its first stage is free: prompts in order, up
  to `batch_tokens` (a longer one alone) and while each one's blocks are free. A batch passes the pp stages one
  after another; the next may enter a stage when that is free. At its end every prompt of it has its first token.
* It then goes to the decode instance with the fewest KV tokens: prompts and tokens made so far of everything
  assigned there and not finished (`dispatch.choose_decode`; a step in progress has made none yet).
* Decode admits the head of its waiting list when ceil((input + 1) / 16) blocks are free beside 1 % of all its
  blocks (or all are free), and takes them. The
  transfer takes the link, one at a time per decode instance, for bytes/bandwidth + latency; the prompt's blocks
  at prefill are held until it ends (back-pressure). The request then goes to the lane with the fewest requests
  (an instance has pp of them) and joins at that lane's next step boundary.
* A lane's step lasts pp × one stage's time for the lane's batch. The i-th step of a request holds input + i
  tokens. Where a boundary finds too few free blocks for the steps to come, the last of that lane's batch is
  preempted, and again until they suffice: its blocks are freed and it goes to the head of the waiting list. When
  admitted again (with blocks for its next step, without a transfer) it joins a lane as any other; that lane's
  next step then lasts pp × the prefill stage of its tokens longer (recomputed there alone, the batch waits).
* `first_token_from="prefill"`: the prefill's token is the user's first, output − 1 decode steps follow, and a
  request of one token ends at prefill. `"decode"` (vLLM): the prefill's token is dropped, decode makes all
  `output` tokens, the first one in its first step.
* A request that does not fit the smallest prefill (input) or decode instance (input + steps) is served nowhere: its
  times are −1, and it misses the promise.

Left out: pipeline bubbles within a decode step, CPU time of the router, and failures.
"""

from disaggserve.simulate.judging import Parts, Prediction, Promise, goodput, joined, judge, kept, parts
from disaggserve.simulate.serving import (
    BadDeployment,
    Deployment,
    Outcome,
    Pool,
    run,
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
    "parts",
    "run",
    "run_decode",
    "run_prefill",
    "warm_up",
]
