"""One instance on several ranks of one pod: tensor parallelism inside a stage, stages of layers one after another.

Rank 0 is the worker itself: it serves HTTP, decides steps, and samples. Before it has a thread, or has touched a GPU, it
forks ranks 1 … tp × pp - 1 (`Ranks`): they have its imports and its settings, and start in milliseconds. A pipe joins each
of them to rank 0, and torch.distributed joins all: gloo on a CPU, NCCL on GPUs (`Group`), over loopback alone.

A step goes down the pipes as the plain numbers it is (`Step`); every rank computes its share of it (`Stage`):

    tokens → stage 0 ─ x [tokens, hidden] → … → last stage ─ its rows of the vocabulary → rank 0
             └ two all-reduces a layer among its tp ranks

With one stage a step is over when `begin` returns. With more it is on its way: rank 0 begins the next one, and is told by
`Runner.on_ready` when logits have come (`Lead`).

**The seam for KV.** Each rank holds the keys and values of its layers and its KV heads, a `Part`: its place in the instance,
the range of layers, the range of KV heads, and the `Pool` that has them. What an `Attendant` does with it is not known here;
worker/ranks.py has the one that serves and pulls it.

* `follow(…, attend)` calls `attend(part, say)` on every rank but 0 once it can compute. On rank 0 the part
  is `Part.of` its runner's model and pool.
* `Ranks.tell(note)` on rank 0 sends bytes to every other rank's `Attendant.hear`, in the rank's one thread, in order with
  the steps before and after: what was told before a step has been heard when the step begins, and the step told before is
  over (on a GPU: queued) when a note is heard. So "compute, then hold these blocks" and "drop them, then write" are safe.
* `say(note)` on a rank, from any thread, reaches `Ranks.on_note(rank, note)` on rank 0, in the thread that listens.
* The thread of a server of its own (one KV endpoint per rank, at kv_port + rank) may read blocks that are held.

**Ends.** A rank that ends takes the worker with it (`RankLost`, exit code 1). A worker that ends, however, leaves no rank:
each asks the kernel to be killed with the thread that forked it, which is the worker's main one, and ends by itself when
its pipe does. Signals are the worker's business: the ranks ignore SIGTERM and SIGINT, so that a drain can go on.
"""
