"""The commands and their options; each body is in a module of its own, imported when the command runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from disaggserve import __version__
from disaggserve.api.errors import InvalidInput

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


class Output(StrEnum):
    table = "table"
    json = "json"
    yaml = "yaml"


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
    profile: Annotated[
        Path | None,
        typer.Option(help="Measured step times: what `disaggserve fit` writes, or DistServe's JSON."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Requests to plan for: CSV with arrival_s,input_tokens,output_tokens."),
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option(help="Lengths to plan for: CSV with input_tokens,output_tokens.")
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
        float, typer.Option(help="With --as-published: where its bisection ends, req/s per GPU.")
    ] = 0.25,
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
        algorithm, profile, trace, lengths, rate, max_gpus, engine, as_published, resolution
    )
    run(file, nodes, replacing, output.value, report)


@app.command()
def simulate(
    plan: Annotated[Path, typer.Option("--plan", help="A plan as `disaggserve plan -o json` prints it.")],
    trace: Annotated[Path, typer.Option("--trace", help="CSV with arrival_s,input_tokens,output_tokens.")],
    output: Annotated[Output, typer.Option("-o", "--output", help="table, json or yaml.")] = Output.table,
    requests: Annotated[
        Path | None, typer.Option("--requests", help="Write one row per request to this CSV.")
    ] = None,
) -> None:
    """Replays requests on a plan: attainment with its interval, TTFT and TPOT percentiles."""
    from disaggserve.cli.simulate import run

    run(plan, trace, output.value, requests)


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
) -> None:
    """Fits a profile of step times to measured steps, and says how far it is from them."""
    from disaggserve.cli.fit import run

    run(measurements, output, model, gpu, engine)


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
        Path, typer.Option("--into", help="Folder for DISAGGSERVE_KERNELS to name when the image runs.")
    ],
) -> None:
    """Compiles the simulator ahead, when an image is built: no process of it waits for a compiler."""
    from disaggserve import simulate
    from disaggserve.simulate import cache

    simulate.warm_up()
    try:
        print(cache.keep(into))
    except OSError as error:
        raise InvalidInput(f"{into}: cannot be written ({error}); name a folder that can be") from None


@app.command()
def operator(
    prometheus_url: Annotated[str, typer.Option(help="Where traffic is read; empty: unknown.")] = "",
    worker_image: Annotated[str | None, typer.Option(help="Default image of the workers.")] = None,
    router_image: Annotated[str | None, typer.Option(help="Default image of the router.")] = None,
    watch: Annotated[list[str] | None, typer.Option(help="Namespace to serve; repeat; none is all.")] = None,
    health_port: Annotated[int, typer.Option(help="Port of /healthz and /metrics.", min=1, max=65535)] = 8080,
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
        )
    )
