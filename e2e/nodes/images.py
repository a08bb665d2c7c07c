"""The table of images: what a container image would start, mapped to a local command.

An image is known by the last element of its name, without tag and digest: `team/disaggserve-worker:1` is
`disaggserve-worker`. What is not in the table cannot be pulled.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from e2e.nodes.errors import Refused
from e2e.nodes.topology import SimulatedNode

PYTHON = sys.executable
"""Not resolved: in a virtual environment the link's folder is the one with the environment's programs."""

LOW_PRIORITY = 10


@dataclass(frozen=True)
class Image:
    """What stands for one image."""

    programs: Mapping[str, tuple[str, ...]]
    """Program name (argv[0] without its folder) → the local command that takes its place."""
    entrypoint: tuple[str, ...]
    """What runs when the container gives no command."""
    call: Mapping[str, str] = field(default_factory=dict)
    """Program name → `module:function`, called in a child of the workers' fork server instead of an exec."""
    paced: frozenset[str] = frozenset()
    """First arguments (roles) that become paced workers: tiny weights, and a real GPU's time."""
    exec: frozenset[str] = frozenset()
    """First arguments that start programs of their own, and so are none of the fork server's."""
    idle: frozenset[str] = frozenset()
    """First arguments with nothing to do here: tiny weights are not fetched."""
    nice: int = 0
    """Whatever is not on the path of a request gives way to the paced steps."""


@dataclass(frozen=True)
class Command:
    """How a container's command is really started."""

    argv: tuple[str, ...]
    call: str | None
    nice: int
    paced: bool


_WORKER = (PYTHON, "-m", "disaggworker")
_PYTHON = dict.fromkeys(("python", "python3"), (PYTHON,))
_SHELL = {name: (name,) for name in ("sh", "sleep", "cat", "true", "false", "echo", "ls", "test", "kill")}

IMAGES: dict[str, Image] = {
    "disaggserve-operator": Image(
        programs={"disaggserve": (str(Path(PYTHON).with_name("disaggserve")),)},
        entrypoint=("disaggserve", "operator"),
        nice=LOW_PRIORITY,
    ),
    "disaggserve-router": Image(programs={"disaggworker": _WORKER}, entrypoint=("disaggworker",)),
    "disaggserve-worker": Image(
        programs={"disaggworker": _WORKER},
        entrypoint=("disaggworker",),
        call={"disaggworker": "disaggworker.__main__:main"},
        paced=frozenset({"prefill", "decode", "pair"}),
        exec=frozenset({"pair"}),
        idle=frozenset({"fetch"}),
    ),
    # vLLM's own image: our worker behind its front, unless a test brings the real one (e2e/vllm).
    "vllm-openai": Image(
        programs={"vllm": (*_WORKER, "--speak", "vllm"), **_PYTHON},
        entrypoint=("vllm", "serve"),
        call={"vllm": "disaggworker.speak.vllm:main"},
        paced=frozenset({"serve"}),
    ),
    "python": Image(programs=_PYTHON | _SHELL, entrypoint=("python3",), nice=LOW_PRIORITY),
    "busybox": Image(programs=_SHELL, entrypoint=("sh",), nice=LOW_PRIORITY),
}


def table(more: Mapping[str, Sequence[str]]) -> dict[str, Image]:
    """The table with more images, each an image name and the command that is its entry point; a Python beside it comes along."""
    added = {
        name: Image(
            programs={Path(command[0]).name: (command[0],)} | _beside(Path(command[0])),
            entrypoint=(Path(command[0]).name, *command[1:]),
            nice=LOW_PRIORITY,
        )
        for name, command in more.items()
    }
    return IMAGES | added


def _beside(program: Path) -> dict[str, tuple[str, ...]]:
    python = program.with_name("python3")
    return {python.name: (str(python),)} if python.exists() else {}


def image_name(image: str) -> str:
    """`registry:5000/team/name:tag@sha256:…` → `name`."""
    return image.partition("@")[0].rsplit("/", 1)[-1].partition(":")[0]


def find(images: Mapping[str, Image], image: str) -> Image:
    """Raises Refused (ErrImagePull) for an image that is not in the table."""
    found = images.get(image_name(image))
    if found is None:
        raise Refused(
            "ErrImagePull",
            f"image {image!r} has no local stand-in here; there are {', '.join(sorted(images))}",
        )
    return found


def is_paced(images: Mapping[str, Image], container: Mapping[str, object]) -> bool:
    """Whether the container is of an image whose workers are paced."""
    found = images.get(image_name(str(container["image"])))
    return found is not None and bool(found.paced)


def localise(image: Image, argv: Sequence[str], *, fork: bool = True) -> Command:
    """The local command for a container's (expanded, rewritten) argument list.

    `fork=False`: never by the fork server, as for probes. Raises Refused for a program that the image's
    stand-in does not have.
    """
    name = os.path.basename(argv[0])
    if name not in image.programs:
        raise Refused(
            "RunContainerError",
            f"{argv[0]!r} has no local stand-in in this image; there are {', '.join(sorted(image.programs))}",
        )
    if _role(argv) in image.idle:
        return Command((shutil.which("true") or "true",), None, image.nice, False)
    call = image.call.get(name) if fork and _role(argv) not in image.exec else None
    if call is not None:
        return Command((name, *argv[1:]), call, image.nice, _role(argv) in image.paced)
    local = image.programs[name]
    program = shutil.which(local[0])
    if program is None:
        raise Refused("RunContainerError", f"the local stand-in {local[0]} of {argv[0]!r} is not installed")
    return Command((program, *local[1:], *argv[1:]), None, image.nice, _role(argv) in image.paced)


def model_of(argv: Sequence[str]) -> str:
    """The model id that a worker's argument list names; vLLM's has a folder there, and says the id as the served name.

    Raises Refused when it names none.
    """
    for flag in ("--model", "--served-model-name"):
        for index, argument in enumerate(argv):
            if argument == flag and index + 1 < len(argv):
                return argv[index + 1]
            if argument.startswith(f"{flag}="):
                return argument.partition("=")[2]
    raise Refused("CreateContainerError", "a paced worker needs --model, to keep that model's time")


def paced(argv: Sequence[str], node: SimulatedNode, weights: Path) -> tuple[str, ...]:
    """A worker's argument list with `--pace`, and tiny weights in the place of the real ones; those of both of a pair.

    Raises Refused for a worker on a node without GPUs.
    """
    if not node.gpus:
        raise Refused("CreateContainerError", f"node {node.name} has no GPU whose time a worker could keep")
    pace = {
        "gpu": node.product,
        "node": node.name,
        "nvlink": node.nvlink,
        "rdma": node.rdma,
        "model": model_of(argv),
    }
    added = ("--weights", str(weights), "--pace", json.dumps(pace))
    local = _without(argv, "--weights")
    if "pair" not in local[:4]:  # `python -m disaggworker pair`, here, where the program is local by now
        return (*local, *added)
    decode = local.index("decode")
    return (*local[:decode], *added, *local[decode:], *added)


def _role(argv: Sequence[str]) -> str:
    return argv[1] if len(argv) > 1 else ""


def _without(argv: Sequence[str], name: str) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in argv:
        if not skip and not argument.startswith(f"{name}=") and argument != name:
            kept.append(argument)
        skip = argument == name and not skip
    return kept
