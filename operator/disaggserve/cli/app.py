"""The commands and their options; each body is in a module of its own, imported when the command runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from disaggserve import __version__
from disaggserve.api.errors import InvalidInput
from disaggserve.cli import options
from disaggserve.cli.options import Output

app = typer.Typer(
    name="disaggserve",
    help="Placement, rollout and re-planning of disaggregated LLM serving under a latency promise.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Algorithm(StrEnum):
    joint = "joint"
    distserve = "distserve"
    high = "high"
    low = "low"


class Engine(StrEnum):
    torch = "torch"
    vllm = "vllm"
    sglang = "sglang"
    any = "any"


File = Annotated[Path, typer.Option("-f", "--file", help="Manifest of one DisaggServe; - is standard input.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def plan(
    file: File,
    nodes: Annotated[Path, typer.Option("--nodes", help="What `kubectl get nodes,pods -A -o yaml` prints.")],
    algorithm: Annotated[
        Algorithm | None,
        typer.Option("--algorithm", help="Replaces planner.algorithm.", case_sensitive=False),
    ] = None,
    profile: options.ProfileOption = None,
    trace: options.TraceOption = None,
    cache_blocks: options.CacheOption = None,
    lengths: Annotated[
        Path | None, typer.Option(help="Lengths to plan for: CSV with input_tokens,output_tokens[,weight].")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Requests per second, or max: the highest goodput per GPU of the GPUs at hand."),
    ] = None,
    max_gpus: Annotated[
        int | None, typer.Option("--max-gpus", help="Replaces hardware.maxGPUs.", min=1, max=4096)
    ] = None,
    engine: Annotated[
        Engine | None,
        typer.Option(help="Replaces engine.type; any: the best of all, and what the resource's own costs."),
    ] = None,
    as_published: Annotated[
        bool, typer.Option("--as-published", help="The search of DistServe's public code, to reproduce it.")
    ] = False,
    resolution: Annotated[
        float | None,
        typer.Option(
            help="With --as-published: where its bisection ends, req/s per GPU.", show_default="0.25"
        ),
    ] = None,
    output: Annotated[
        Output, typer.Option("-o", "--output", help="table, json (shape of status.plan) or yaml.")
    ] = Output.table,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a page that explains the plan into this folder.")
    ] = None,
) -> None:
    """The operator's own plan, without a cluster."""
    from disaggserve.cli.plan import Replacing, run

    replacing = Replacing(
        algorithm, profile, trace, cache_blocks, lengths, rate, max_gpus, engine, as_published, resolution
    )
    run(file, nodes, replacing, output.value, report)


@app.command()
def simulate(
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A plan as `disaggserve plan -o json` prints it.")
    ] = None,
    shape: Annotated[str | None, typer.Option("--shape", help=options.SHAPE_HELP)] = None,
    model: options.ModelOption = None,
    gpu: options.GpuOption = None,
    engine: options.EngineOption = None,
    link: options.LinkOption = None,
    profile: options.ProfileOption = None,
    ttft: options.TtftOption = None,
    tpot: options.TpotOption = None,
    attainment: options.AttainmentOption = None,
    trace: options.TraceOption = None,
    cache_blocks: options.CacheOption = None,
    lengths: options.LengthsOption = None,
    rate: options.RateOption = None,
    duration: options.DurationOption = "600s",
    cv: options.CvOption = 1.0,
    seed: options.SeedOption = None,
    output: options.OutputOption = Output.table,
    requests: Annotated[
        Path | None, typer.Option("--requests", help="Write one row per request to this CSV.")
    ] = None,
) -> None:
    """Requests on a plan or a shape: attainment with its interval, TTFT and TPOT percentiles, where the time goes."""
    from disaggserve.cli import subject, traffic
    from disaggserve.cli.simulate import run

    given = subject.Given(model, gpu, engine, link, profile, ttft, tpot, attainment)
    sent = traffic.Given(trace, cache_blocks, lengths, rate, duration, cv, tuple(seed or (0,)))
    run(subject.one(plan, shape, given), sent, output.value, requests)


@app.command()
def replay(
    trace: Annotated[
        Path,
        typer.Option(
            "--trace", help="Requests in their own order: our CSV, Azure's CSV or Mooncake's JSONL."
        ),
    ],
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A plan as `disaggserve plan -o json` prints it.")
    ] = None,
    shape: Annotated[str | None, typer.Option("--shape", help=options.SHAPE_HELP)] = None,
    model: options.ModelOption = None,
    gpu: options.GpuOption = None,
    engine: options.EngineOption = None,
    link: options.LinkOption = None,
    profile: options.ProfileOption = None,
    ttft: options.TtftOption = None,
    tpot: options.TpotOption = None,
    attainment: options.AttainmentOption = None,
    cache_blocks: options.CacheOption = None,
    speed: Annotated[
        float, typer.Option("--speed", help="Runs the trace so many times as fast.", min=1e-3)
    ] = 1.0,
    window: Annotated[
        str, typer.Option("--window", help="Length of a window of the replay. Example: 5m.")
    ] = "5m",
    output: options.OutputOption = Output.table,
) -> None:
    """A trace on a plan or a shape, window by window: where in the day the promise breaks."""
    from disaggserve.cli import subject
    from disaggserve.cli.replay import run

    given = subject.Given(model, gpu, engine, link, profile, ttft, tpot, attainment)
    window_s = subject.limit("window", window)
    run(subject.one(plan, shape, given), trace, cache_blocks, speed, window_s, output.value)


@app.command()
def compare(
    plans: Annotated[
        list[Path] | None, typer.Argument(help="Plans as `disaggserve plan -o json` prints them.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", help=f"{options.SHAPE_HELP} Repeat it for several.")
    ] = None,
    model: options.ModelOption = None,
    gpu: options.GpuOption = None,
    engine: options.EngineOption = None,
    link: options.LinkOption = None,
    profile: options.ProfileOption = None,
    ttft: options.TtftOption = None,
    tpot: options.TpotOption = None,
    attainment: options.AttainmentOption = None,
    trace: options.TraceOption = None,
    cache_blocks: options.CacheOption = None,
    lengths: options.LengthsOption = None,
    rate: options.RateOption = None,
    duration: options.DurationOption = "600s",
    cv: options.CvOption = 1.0,
    seed: options.SeedOption = None,
    goodput: Annotated[
        bool, typer.Option("--goodput", help="Search each one's highest rate that keeps the promise, too.")
    ] = False,
    output: options.OutputOption = Output.table,
) -> None:
    """The same requests on several plans and shapes, side by side."""
    from disaggserve.cli import subject, traffic
    from disaggserve.cli.compare import run

    given = subject.Given(model, gpu, engine, link, profile, ttft, tpot, attainment)
    sent = traffic.Given(trace, cache_blocks, lengths, rate, duration, cv, tuple(seed or (0,)))
    run(subject.several(plans or [], shape or [], given), sent, goodput, output.value)


@app.command()
def fit(
    measurements: Annotated[
        Path,
        typer.Argument(help="CSV with phase,batch,tokens,context_tokens,tp,pp,seconds; - is standard input."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The profile to write.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The model's id; without it the profile is for any.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="nvidia.com/gpu.product; without it the profile is for any.")
    ] = None,
    engine: Annotated[str | None, typer.Option("--engine", help="torch, vllm, sglang or distserve.")] = None,
    note: Annotated[
        str,
        typer.Option("--note", help="Said first in the profile's provenance: machine, versions, date."),
    ] = "",
) -> None:
    """Fits a profile of step times to measured steps, and says how far it is from them."""
    from disaggserve.cli.fit import run

    run(measurements, output, model, gpu, engine, note)


@app.command()
def validate(file: File) -> None:
    """Checks manifests as the API server does: one line per fault, exit code 1 if there is any."""
    from disaggserve.api import manifest
    from disaggserve.cli.files import text

    for found in manifest.load(text(file)):
        print(f"{found.namespace}/{found.name}: valid")


@app.command()
def crd() -> None:
    """Prints the CustomResourceDefinition."""
    from disaggserve.api import crd as generator

    print(generator.text(), end="")


@app.command("warm-up", hidden=True)
def warm_up(
    into: Annotated[
        Path | None, typer.Option("--into", help="Folder for DISAGGSERVE_KERNELS to name when an image runs.")
    ] = None,
) -> None:
    """Compiles the simulator into the user's cache, or ahead for an image: no process of it waits for a compiler."""
    from disaggserve import simulate
    from disaggserve.simulate import cache, published

    simulate.warm_up()
    published.warm_up()
    try:
        print(cache.keep(into) if into else cache.prepare())
    except OSError as error:
        raise InvalidInput(f"{into}: cannot be written ({error}); name a folder that can be") from None


@app.command()
def operator(
    prometheus_url: Annotated[str, typer.Option(help="Where traffic is read; empty: unknown.")] = "",
    worker_image: Annotated[str | None, typer.Option(help="Default image of the workers.")] = None,
    router_image: Annotated[str | None, typer.Option(help="Default image of the router.")] = None,
    watch: Annotated[list[str] | None, typer.Option(help="Namespace to serve; repeat; none is all.")] = None,
    health_port: Annotated[int, typer.Option(help="Port of /healthz and /metrics.", min=1, max=65535)] = 8080,
    searches: Annotated[int, typer.Option(help="Plans searched for at the same time.", min=1, max=16)] = 1,
) -> None:
    """Runs the operator."""
    from dataclasses import replace

    from disaggserve.cluster import settings
    from disaggserve.cluster.main import run

    images = settings.default_images()
    run(
        settings.Settings(
            namespace=settings.own_namespace(),
            identity=settings.default_identity(),
            prometheus_url=prometheus_url,
            images=replace(
                images, worker=worker_image or images.worker, router=router_image or images.router
            ),
            watch=tuple(watch or ()),
            health_port=health_port,
            health_host=settings.default_health_host(),
            search_processes=searches,
        )
    )
