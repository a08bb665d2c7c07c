"""`python -m e2e.nodes --kubeconfig K --topology T.yaml --folder F`: runs the nodes until told to stop.

With `--owner PID` it is another program's child: it takes orders as lines of JSON on standard input, answers
on standard output, and ends with that program. Logs go to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from e2e.nodes import images
from e2e.nodes.agent import Agent, Settings
from e2e.nodes.errors import NodesError
from e2e.nodes.topology import load


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e.nodes", description="Simulated GPU nodes.")
    parser.add_argument("--kubeconfig", type=Path, required=True, help="an administrator's")
    parser.add_argument("--topology", type=Path, required=True, help="YAML: see e2e/nodes/topology.py")
    parser.add_argument("--folder", type=Path, required=True, help="logs, pods' files, tiny models")
    parser.add_argument("--heartbeat", type=float, default=2.0, metavar="S", help="between lease renewals")
    parser.add_argument("--cold-start", type=float, default=0.0, metavar="S", help="before a worker starts")
    parser.add_argument("--preload", action="store_true", help="import torch now, not for the first worker")
    parser.add_argument("--image", action="append", default=[], metavar="NAME=COMMAND", help="one more image")
    parser.add_argument(
        "--host-path", action="append", default=[], metavar="PATH=FOLDER", help="for hostPath"
    )
    parser.add_argument("--owner", type=int, default=0, metavar="PID", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    pairs = [entry.partition("=") for entry in options.image]
    paths = [entry.partition("=") for entry in options.host_path]
    try:
        settings = Settings(
            kubeconfig=options.kubeconfig,
            nodes=load(options.topology),
            folder=options.folder.absolute(),
            images=images.table({name: shlex.split(command) for name, _, command in pairs}),
            host_paths={path: Path(folder).absolute() for path, _, folder in paths},
            heartbeat_s=options.heartbeat,
            cold_start_s=options.cold_start,
            preload=options.preload,
        )
        asyncio.run(_serve(settings, options.owner))
    except NodesError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


async def _serve(settings: Settings, owner: int) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if owner:
        _watch(owner, stop)
    async with Agent(settings) as agent:
        if owner:
            orders = asyncio.create_task(_obey(agent, stop))
        else:
            print(
                f"nodes {', '.join(agent.nodes)} are ready; logs are in {settings.folder / 'logs'}",
                flush=True,
            )
        waiting = {asyncio.create_task(stop.wait()), asyncio.create_task(agent.run())}
        done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in [*pending, *([orders] if owner else [])]:
            task.cancel()
        for ended in done:
            ended.result()


def _watch(owner: int, stop: asyncio.Event) -> None:
    """Stop when the owner's process is gone: its end of our standard input may live on in what it forked."""
    try:
        descriptor = os.pidfd_open(owner)
    except OSError:
        stop.set()
        return
    if os.getppid() != owner:
        stop.set()
    asyncio.get_running_loop().add_reader(descriptor, stop.set)


async def _obey(agent: Agent, stop: asyncio.Event) -> None:
    """Carry out orders from standard input until it ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    print(json.dumps({"nodes": agent.nodes}), flush=True)
    while line := await reader.readline():
        order = json.loads(line)
        try:
            answer = {"answer": await _carry_out(agent, order)}
        except NodesError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
    stop.set()


async def _carry_out(agent: Agent, order: dict[str, Any]) -> Any:
    match order:
        case {"do": "fail", "node": node}:
            return await agent.fail(node)
        case {"do": "recover", "node": node}:
            return await agent.recover(node)
        case {"do": "drain", "node": node, "timeout_s": timeout_s}:
            return await agent.drain(node, timeout_s)
        case {"do": "uncordon", "node": node}:
            return await agent.uncordon(node)
        case {"do": "crash", "pod": pod, "namespace": namespace, "container": container}:
            return agent.crash(pod, namespace, container)
        case {"do": "pods"}:
            return agent.pods()
    raise NodesError(f"unknown order {order}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
