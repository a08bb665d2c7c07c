"""What the images run, as their Dockerfiles build it, from a tree that cannot be written to.

The wheel, the locked requirements (whatever else is installed here cannot be imported), the environment, and no HOME.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from e2e.controlplane import ControlPlane, ensure
from e2e.controlplane.polling import wait_until
from e2e.controlplane.ports import free_ports
from tests.integration.bench import CHAT, ROOT, add_nodes

_LIBC = ctypes.CDLL(None)


def _bound_by_permissions() -> None:
    """In the child, before it becomes the program: root too may then write only where a mode says so."""
    drop_from_bounding_set = 24
    for dac_override_read_search_fowner in (1, 2, 3):
        _LIBC.prctl(drop_from_bounding_set, dac_override_read_search_fowner, 0, 0, 0)


WATCH = """
import os, sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name in os.environ.get("ABSENT", "").split()
        return None if absent else super().find_spec(name, path, target)
sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
if "COMPILED" in os.environ:
    import numba.core.event as event
    class Listener(event.Listener):
        def on_start(self, started):
            with open(os.environ["COMPILED"], "a") as log:
                print(os.getpid(), started.data.get("dispatcher"), file=log)
        def on_end(self, ended):
            pass
    event.register("numba:compile", Listener())
"""


@dataclass(frozen=True)
class Image:
    """A copy of the packages without write permission, and a folder for temporary files, as a pod has them."""

    folder: Path

    @property
    def temp(self) -> Path:
        return self.folder / "tmp"

    @property
    def compiled(self) -> list[str]:
        """Who compiled what so far."""
        log = self.temp / "compiled"
        return log.read_text().splitlines() if log.exists() else []

    def files(self) -> list[str]:
        return sorted(str(p) for p in (self.folder / "app").rglob("*"))

    def env(self, dockerfile: str = "operator", **more: str) -> dict[str, str]:
        own = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "KUBECONFIG")
        kept = {k: v for k, v in os.environ.items() if k not in own}
        return kept | {
            **declared(dockerfile),
            "HOME": "/dev/null/nowhere",
            "TMPDIR": str(self.temp),
            "PYTHONPATH": f"{self.folder / 'site'}:{self.folder / 'app'}",
            **more,
        }

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *args],
            env=self.env("worker_image" if "disaggworker" in args else "operator", **env),
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=_bound_by_permissions,
        )

    def run(self, *args: str, **env: str) -> str:
        process = self.start(*args, **env)
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
        return said


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    folder = tmp_path_factory.mktemp("image")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    shutil.unpack_archive(next(folder.glob("*.whl")), folder / "app", "zip")
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(WATCH)
    (folder / "tmp").mkdir()
    (folder / "kernels").mkdir()
    tree = [folder / "app", *(folder / "app").rglob("*")]
    for path in tree:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield Image(folder)
    for path in tree:
        path.chmod(0o755)


@pytest.fixture(scope="module")
def kernels(image: Image) -> Iterator[Path]:
    """What `disaggserve warm-up` leaves when the image is built; from then on without write permission too."""
    before = image.files()
    made = Path(
        image.run("-m", "disaggserve.cli", "warm-up", "--into", str(image.folder / "kernels")).strip()
    )
    assert image.files() == before
    shutil.rmtree(image.temp)  # another machine: nothing but the image
    image.temp.mkdir()
    filled = [made.parent, *made.parent.rglob("*")]
    for path in filled:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield made.parent
    for path in filled:
        path.chmod(0o755)


def declared(dockerfile: str) -> dict[str, str]:
    """The environment that a Dockerfile gives, but for paths inside the image."""
    text = (ROOT / dockerfile / "Dockerfile").read_text()
    lines = [line.removeprefix("ENV ").split() for line in text.splitlines() if line.startswith("ENV ")]
    return {k: v for k, _, v in (pair.partition("=") for line in lines for pair in line) if "/" not in v}


def missing(lock: str) -> str:
    """Names of everything that is installed here and not in an image."""
    locked = re.findall(r"^([a-z0-9._-]+)==", (ROOT / f"requirements/images/{lock}.txt").read_text(), re.M)
    has = {re.sub("[-_.]+", "-", name) for name in locked} | {"disaggserve"}
    return " ".join(
        module
        for module, owners in packages_distributions().items()
        if not {re.sub("[-_.]+", "-", o).lower() for o in owners} & has
    )


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def children(pid: int) -> list[int]:
    """The search processes of an operator."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in listed if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]


def alive(pid: int) -> bool:
    with suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


@pytest.mark.timeout(300)
def test_the_operator_plans_without_a_compiler_and_survives_its_search_process(
    image: Image, kernels: Path, tmp_path: Path
) -> None:
    """As the chart's service account, with rights to one namespace."""
    before = image.files()
    with ControlPlane(tmp_path / "plane", ensure(), node_monitor_grace_period="1h") as plane:
        plane.helm(
            "install", "disaggserve", str(ROOT / "charts/disaggserve"), "--set", "watchNamespaces={default}"
        )
        add_nodes(plane, {"gpu-0": 8, "gpu-1": 8})
        plane.kubectl("create", "namespace", "other")
        groups = ("system:serviceaccounts", "system:serviceaccounts:default", "system:authenticated")
        account = plane.user_kubeconfig("system:serviceaccount:default:disaggserve-operator", groups)
        port = free_ports(1, "127.0.0.1")[0]
        operator = image.start(
            *("-m", "disaggserve.cli", "operator", "--watch", "default", "--health-port", str(port)),
            ABSENT=missing("operator"),
            DISAGGSERVE_KERNELS=str(kernels),
            KUBECONFIG=str(account),
            COMPILED=str(image.temp / "compiled"),
            POD_IP="127.0.0.1",
            POD_NAMESPACE="default",
        )

        def revision(wanted: int) -> bool:
            assert operator.poll() is None, operator.communicate()[0]
            found = plane.kubectl("get", "dsv", "chat", "-o", "jsonpath={.status.plan.revision}")
            return found == str(wanted)

        try:
            url = f"http://127.0.0.1:{port}"

            def lives() -> bool:
                assert operator.poll() is None, operator.communicate()[0]
                return get(url + "/healthz")[0] == 200

            wait_until(lives, "the operator to live", timeout_s=90)
            said = get(url + "/readyz")
            wait_until(lambda: get(url + "/readyz")[0] == 200, "the search process to be warm", timeout_s=60)
            assert said[0] == 200 or said[1].startswith("warming"), said
            elsewhere = {**CHAT, "metadata": {"name": "chat", "namespace": "other"}}
            for body in (elsewhere, CHAT):
                plane.kubectl("apply", "-f", "-", input=json.dumps(body))
            wait_until(lambda: revision(1), "a plan", timeout_s=60)

            for process in children(operator.pid):
                os.kill(process, signal.SIGKILL)
            changed: dict[str, Any] = {
                **CHAT,
                "spec": {**CHAT["spec"], "slo": {"ttft": "1s", "tpot": "90ms"}},
            }
            plane.kubectl("apply", "-f", "-", input=json.dumps(changed))
            wait_until(lambda: revision(2), "a plan from the next search process", timeout_s=60)

            assert plane.kubectl("get", "dsv", "-n", "other", "-o", "jsonpath={.items[0].status}") == ""

            searching = children(operator.pid)
            assert searching
            os.kill(operator.pid, signal.SIGKILL)
            wait_until(
                lambda: not any(map(alive, searching)), "the search process to go with it", timeout_s=20
            )
        finally:
            operator.kill()
            operator.communicate()
    assert image.compiled == [], "nobody compiled"
    assert image.files() == before


def test_other_sources_do_not_take_what_was_compiled_ahead(
    image: Image, kernels: Path, tmp_path: Path
) -> None:
    """The folder's name holds a hash of all that is compiled, so an image with a stale one is slow and right."""
    other = tmp_path / "app"
    shutil.copytree(image.folder / "app", other)
    for path in (other, *other.rglob("*")):
        path.chmod(0o755)
    source = other / "disaggserve/dispatch.py"
    source.write_text(source.read_text() + "\n# another rule\n")
    code = "import os; from disaggserve.simulate import cache; print(os.environ[cache.VARIABLE])"
    folders = [
        Path(
            subprocess.run(
                [sys.executable, "-c", code],
                env=image.env(
                    PYTHONPATH=str(tree),
                    DISAGGSERVE_KERNELS=str(kernels),
                    XDG_CACHE_HOME=str(tmp_path / "cache"),
                ),
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        )
        for tree in (image.folder / "app", other)
    ]
    assert [bool(list(f.rglob("*.nbi"))) for f in folders] == [True, False]


def test_the_router_needs_neither_torch_nor_numba(image: Image, tmp_path: Path) -> None:
    before = image.files()
    port = free_ports(1, "127.0.0.1")[0]
    (image.temp / "nowhere").write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "x",
                "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
                "clusters": [{"name": "x", "cluster": {"server": "http://127.0.0.1:9"}}],
                "users": [{"name": "x", "user": {}}],
            }
        )
    )
    router = image.start(
        *(
            "-m",
            "disaggworker",
            "router",
            "--namespace",
            "default",
            "--resource",
            "chat",
            "--model-name",
            "m",
        ),
        *("--context-length", "2048", "--ttft", "0.25", "--tpot", "0.1", "--port", str(port)),
        ABSENT=(absent := missing("router")),
        POD_IP="127.0.0.1",
        KUBECONFIG=str(image.temp / "nowhere"),
    )
    try:
        wait_until(
            lambda: get(f"http://127.0.0.1:{port}/health")[0] == 200, "the router to live", timeout_s=60
        )
    finally:
        began_s = time.monotonic()
        router.terminate()
        said, _ = router.communicate(timeout=30)
    assert {"torch", "numba"} <= set(absent.split())
    assert router.returncode in (0, -signal.SIGTERM), said
    assert time.monotonic() - began_s < 30
    assert image.files() == before


def test_a_worker_says_what_it_lacks(image: Image) -> None:
    """It gets as far as its weights, which are not there: one sentence, exit 1."""
    worker = image.start(
        *(
            "-m",
            "disaggworker",
            "prefill",
            "--model",
            "facebook/opt-13b",
            "--weights",
            str(image.temp / "none"),
        ),
        *("--pairing-key", "k", "--port", str(free_ports(1, "127.0.0.1")[0])),
        ABSENT=missing("worker"),
        POD_IP="127.0.0.1",
    )
    said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 1, said
    assert "none" in said.splitlines()[-1]
    assert "Traceback" not in said
