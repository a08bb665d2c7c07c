"""`make demo`: the whole path on one machine, on simulated GPUs that keep the time of real ones.

A real control plane and sixteen simulated A100s; the chart; `examples/chat.yaml`; a completion; a load, held against the
promise and against what the simulator says of the same requests; longer prompts, until the plan changes under the load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from rich.console import Console
from rich.table import Table

from disaggserve.api import manifest
from disaggserve.api.model import seconds
from disaggserve.api.plan import Plan
from disaggserve.api.spec import Spec
from disaggserve.cli import show
from disaggserve.workload import Workload, preset
from e2e import load
from e2e.picture import draw
from e2e.stack import ROOT, Stack, condition, ready

EXAMPLE = ROOT / "examples/chat.yaml"
FOLDER = ROOT / ".demo"
VOCAB = 256  # of the tiny models' at least 512 tokens
FIRST_LOAD_S = 45.0
AFTER_S = 25.0
LONGEST_S = 160.0

out = Console(highlight=False, soft_wrap=True)


class Screen:
    """Says what is being done, with the time since the start."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def __call__(self, text: str) -> None:
        out.print(f"[dim]{time.monotonic() - self._began_s:6.1f} s[/]  {text}")

    def title(self, text: str) -> None:
        out.print()
        out.rule(f"[bold]{text}", align="left")


def requests(spec: Spec, input_scale: float, duration_s: float, seed: int) -> list[tuple[float, int, int]]:
    """What clients will send: ShareGPT's lengths at the spec's rate, Poisson, one seed."""
    lengths = preset("sharegpt").scaled(input_scale, 2048)
    drawn = Workload(rate=spec.workload.rate, cv=1.0, lengths=lengths).requests(duration_s, seed)
    return [
        (float(a) / 1e9, int(i), int(o))
        for a, i, o in zip(drawn.arrival_ns, drawn.input, drawn.output, strict=True)
    ]


async def complete(url: str, model: str) -> None:
    """Streams one completion, token by token, as a client would."""
    body = {
        "model": model,
        "prompt": "The operator plans",
        "max_tokens": 24,
        "stream": True,
        "temperature": 0,
    }
    out.print(f"POST {url}/v1/completions  {json.dumps(body)}")
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                out.print(choices[0]["text"] if choices else "", end="", markup=False)
    out.print("\n[dim](a tiny model with seeded weights: the words mean nothing, the path is real)[/]")


def judged(results: Sequence[load.Result], spec: Spec) -> dict[str, Any]:
    return load.summary(results, seconds(spec.slo.ttft), seconds(spec.slo.tpot))


def replay(stack: Stack, plan: Plan, results: Sequence[load.Result]) -> dict[str, Any]:
    """What `disaggserve simulate` says of the very requests that were sent."""
    trace, planned = stack.folder / "sent.csv", stack.folder / "plan.json"
    load.write_csv(results, trace)
    planned.write_text(plan.model_dump_json(exclude_none=True))
    command = [
        Path(sys.executable).with_name("disaggserve"),
        "simulate",
        "--plan",
        planned,
        "--trace",
        trace,
        "-o",
        "json",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def compare(served: dict[str, Any], simulated: dict[str, Any], spec: Spec) -> None:
    table = Table("", "promise", "served (emulated)", "simulated, same requests", box=None, pad_edge=False)
    interval = "{attainment:.1%} ({attainmentLow:.1%} to {attainmentHigh:.1%})"
    table.add_row(
        "attainment", f"{spec.slo.attainment:.0%}", interval.format(**served), interval.format(**simulated)
    )
    for what, promise in (("ttft", spec.slo.ttft), ("tpot", spec.slo.tpot)):
        for p in ("p50", "p90", "p99"):
            table.add_row(
                f"{what.upper()} {p}",
                promise if p == "p90" else "",
                show.duration(served[what][p]),
                show.duration(simulated[what][p]),
            )
    out.print(table)


def pods(stack: Stack, name: str) -> None:
    table = Table("pod", "role", "shape", "node", "ready", "address", box=None, pad_edge=False)
    for pod in sorted(stack.pods(name), key=lambda p: str(p["metadata"]["name"])):
        labels = pod["metadata"]["labels"]
        table.add_row(
            pod["metadata"]["name"],
            labels.get("disaggserve.dev/role", ""),
            labels.get("disaggserve.dev/shape", ""),
            pod["spec"].get("nodeName", ""),
            condition(pod, "Ready"),
            pod["status"].get("podIP", ""),
        )
    out.print(table)


def side_by_side(plans: Sequence[Plan]) -> None:
    table = Table("", *(f"revision {p.revision}" for p in plans), box=None, pad_edge=False)
    rows: list[tuple[str, Any]] = [
        ("made for", lambda p: f"{p.workload.rate:.1f} req/s"),
        (
            "mean prompt, output",
            lambda p: f"{p.workload.input_mean:.0f}, {p.workload.output_mean:.0f} tokens",
        ),
        ("traffic from", lambda p: p.workload.source.split(":")[0]),
        ("algorithm", lambda p: f"{p.algorithm} ({p.affinity.lower()} affinity)"),
        ("prefill", lambda p: p.prefill),
        ("decode", lambda p: p.decode),
        ("GPUs", lambda p: str(p.gpus)),
        ("goodput", lambda p: f"{p.goodput:.1f} req/s ({p.goodput_per_gpu:.2f} per GPU)"),
        ("predicted attainment", lambda p: f"{p.predicted.attainment:.1%}"),
    ]
    for name, figure in rows:
        table.add_row(name, *(figure(p) for p in plans))
    out.print(table)


def plan_of(resource: dict[str, Any]) -> Plan:
    return Plan.model_validate_json(json.dumps(resource["status"]["plan"]), strict=True)


async def drive(stack: Stack, spec: Spec, name: str, say: Screen) -> int:
    """Both loads; returns the number of failed requests."""
    url, model = stack.url(name), spec.model.name
    say.title("a completion, streamed through the router")
    await complete(url, model)

    say.title(
        f"load: {spec.workload.rate:g} req/s for {FIRST_LOAD_S:.0f} s, prompts × {spec.workload.lengths.input_scale:g}"
    )
    first_plan = plan_of(stack.resource(name))
    began_s = time.monotonic()
    sent = requests(spec, spec.workload.lengths.input_scale, FIRST_LOAD_S, seed=11)
    first = await load.run_load(url, model, sent, vocab=VOCAB, seed=1, on_result=Ticker(say, spec, len(sent)))
    compare(judged(first, spec), replay(stack, first_plan, first), spec)

    say.title("the same rate with ShareGPT's own prompts, three times longer, until the plan changes")
    stop = asyncio.Event()
    changed_s: list[float] = []
    offset_s = time.monotonic() - began_s
    sent = requests(spec, 1.0, LONGEST_S, seed=12)
    task = asyncio.create_task(
        load.run_load(url, model, sent, vocab=VOCAB, seed=2, on_result=Ticker(say, spec, None), stop=stop)
    )
    watcher = asyncio.create_task(watch(stack, name, say, first_plan, stop, changed_s, began_s))
    second = await task
    await watcher
    after = [r for r in second if changed_s and r.arrival_s + offset_s > changed_s[-1]]
    plans = [first_plan, plan_of(stack.resource(name))]
    say.title("both plans")
    side_by_side(plans)
    out.print()
    if after and changed_s:
        out.print(
            f"served after the new plan stood: {judged(after, spec)['attainment']:.1%} of {len(after)} requests (emulated)"
        )
    failed = [r for r in (*first, *second) if r.outcome not in ("ok", "cancelled")]
    out.print(
        f"failed requests: {len(failed)} of {len(first) + len(second)}"
        + (f", the first: {failed[0].error}" if failed else "")
    )
    picture = draw(
        stack.folder.parent / ".demo" / "run.png", spec, [(0.0, first), (offset_s, second)], plans, changed_s
    )
    out.print(
        f"picture of the run: {picture.relative_to(Path.cwd()) if picture.is_relative_to(Path.cwd()) else picture}"
    )
    if plans[1].revision == plans[0].revision:
        out.print("[red]the plan did not change[/]")
        return max(1, len(failed))
    return len(failed)


class Ticker:
    """A line every ten seconds of a load: what the last ten seconds were like."""

    def __init__(self, say: Screen, spec: Spec, total: int | None) -> None:
        self._say, self._spec, self._total = say, spec, total
        self._recent: list[load.Result] = []
        self._done = 0
        self._next_s = time.monotonic() + 10

    def __call__(self, result: load.Result) -> None:
        self._recent.append(result)
        self._done += 1
        if time.monotonic() >= self._next_s:
            self._next_s += 10
            of = f" of {self._total}" if self._total else ""
            met = judged(self._recent, self._spec)
            self._say(
                f"{self._done}{of} answered; the last {len(self._recent)}: {met['attainment']:.0%} met the promise, TTFT p90 {show.duration(met['ttft']['p90'])}"
            )
            self._recent.clear()


async def watch(
    stack: Stack,
    name: str,
    say: Screen,
    old: Plan,
    stop: asyncio.Event,
    changed_s: list[float],
    began_s: float,
) -> None:
    """Tells what the operator does, and ends the load some time after the new plan stands."""
    said = ""
    deadline_s = time.monotonic() + LONGEST_S - AFTER_S
    while time.monotonic() < deadline_s:
        resource = await asyncio.to_thread(stack.resource, name)
        status = resource["status"]
        if status["plan"]["revision"] != old.revision:
            if not changed_s:
                changed_s.append(time.monotonic() - began_s)
                say(
                    f"[bold]new plan[/], revision {status['plan']['revision']}: {status['lastDecision']['reason']}"
                )
            step = status.get("rollout", {}).get("step", "")
            if step and step != said:
                say(f"rollout: {step}")
                said = step
            if ready(resource):
                changed_s.append(time.monotonic() - began_s)
                say("the new plan stands, the old instances have drained and gone")
                break
        await asyncio.sleep(0.5)
    await asyncio.sleep(AFTER_S if changed_s else 0)
    stop.set()


def run(keep: bool) -> int:
    document = yaml.safe_load(EXAMPLE.read_text())
    parsed = manifest.parse(document)
    spec, name = parsed.spec, parsed.name
    say = Screen()
    shutil.rmtree(FOLDER, ignore_errors=True)
    say.title(
        "a control plane and sixteen simulated A100s on two nodes, NVLink inside and InfiniBand between them"
    )
    with Stack(FOLDER, progress=say) as stack:
        out.print(
            stack.plane.kubectl(
                "get",
                "nodes",
                "-L",
                "nvidia.com/gpu.product,nvidia.com/gpu.count,network.topology.nvidia.com/leaf",
            ).rstrip(),
            markup=False,
        )
        say.title("kubectl apply -f examples/chat.yaml")
        out.print(
            "[dim]its windows are short for a demonstration: interval 5 s, window 20 s, minDwell 60 s (defaults 30 s, 10 min, 10 min)[/]"
        )
        stack.apply(EXAMPLE)
        say("the operator reads the nodes and plans")
        said = ""

        def standing(resource: dict[str, Any]) -> bool:
            nonlocal said
            status = resource.get("status", {})
            step = status.get("rollout", {}).get("step", status.get("phase", ""))
            if step and step != said:
                say(step)
                said = step
            return ready(resource)

        resource = stack.wait(name, f"{name} to be ready", standing, timeout_s=120)
        out.print()
        out.print(stack.plane.kubectl("get", "dsv").rstrip(), markup=False)
        say.title("the plan in words")
        from disaggserve.plan import Draft

        show.plan(spec, Draft(plan_of(resource), (), None))
        say.title("the pods and where they stand")
        pods(stack, name)
        failed = asyncio.run(drive(stack, spec, name, say))
        say.title("at the end")
        out.print(stack.plane.kubectl("get", "dsv").rstrip(), markup=False)
        pods(stack, name)
        if keep:
            out.print(
                f"\nexport KUBECONFIG={stack.plane.kubeconfig}\n"
                f"export PATH={stack.binaries.kubectl.parent}:$PATH\n"
                f"kubectl get dsv -w; kubectl describe dsv {name}; kubectl explain disaggserve.spec --recursive\n"
                f"curl -s {stack.url(name)}/v1/models; logs are in {stack.folder / 'nodes/logs'}\n"
                f"Prometheus: {stack.prometheus.url}\nCtrl-C ends it all."
            )
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
        say("stopping")
    say("done" if not failed else f"[red]{failed} requests failed or the plan did not change[/]")
    return 1 if failed else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave it up until Ctrl-C")
    keep = parser.parse_args().keep
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(run(keep))
    except KeyboardInterrupt:
        out.print("stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
