"""The real Prometheus, as a child that does not outlive us."""

from __future__ import annotations

import json
import os
import shutil
import urllib.parse
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from e2e.controlplane.binaries import Binaries
from e2e.controlplane.errors import ComponentDied, ControlPlaneError
from e2e.controlplane.polling import wait_until
from e2e.controlplane.ports import ATTEMPTS, free_ports
from e2e.controlplane.progress import Progress, silent
from e2e.controlplane.supervised import Supervised, supervised_popen
from e2e.controlplane.web import get, request

READY_WITHIN_S = 60.0


class Prometheus:
    """Prometheus with the given configuration (YAML or JSON), all its files below ``folder``.

    Service discovery built in: static, file, http and kubernetes. It has no web
    interface of its own, only the API.
    """

    def __init__(
        self, folder: Path, binaries: Binaries, config: str, *, address: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.folder = folder.absolute()
        self.binaries = binaries
        self.config = config
        self.address = address
        self.port = port
        """0 until started, unless the caller chose one."""
        self.log = self.folder / "prometheus.log"
        self._chosen_port = port
        self._process: Supervised | None = None

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    def start(self, progress: Progress = silent) -> Self:
        """Ready to answer queries on return.

        Raises ``ComponentDied`` (a broken configuration, say) or ``NotReady``.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        self._write_config()
        try:
            for attempt in range(1, ATTEMPTS + 1):
                self.port = self._chosen_port or free_ports(1, self.address)[0]
                self.log.unlink(missing_ok=True)
                progress(f"starting Prometheus at {self.url}")
                self._process = self._run()
                try:
                    wait_until(self._ready, "Prometheus is ready", timeout_s=READY_WITHIN_S)
                    return self
                except ComponentDied as died:
                    if not died.port_taken or self._chosen_port or attempt == ATTEMPTS:
                        raise
            raise AssertionError("unreachable")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it; harmless when it does not run. Its data stay in ``folder`` until the next start."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def reload(self, config: str) -> None:
        """Use another configuration from now on; raises ``ControlPlaneError`` with what is wrong with it."""
        self.config = config
        self._write_config()
        status, body = request("POST", f"{self.url}/-/reload")
        if status != 200:
            raise ControlPlaneError(f"Prometheus refuses the configuration: {body.decode().strip()}")

    def query(self, expression: str, *, time_s: float | None = None) -> list[dict[str, Any]]:
        """The result of an instant query: a list of ``{"metric": {…}, "value": [time, "number"]}``."""
        parameters = {"query": expression}
        if time_s is not None:
            parameters["time"] = repr(time_s)
        status, body = get(f"{self.url}/api/v1/query?{urllib.parse.urlencode(parameters)}", timeout_s=30.0)
        if status != 200:
            raise ControlPlaneError(f"Prometheus refuses {expression!r}: {status} {body.decode().strip()}")
        data = json.loads(body)["data"]
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        result: list[dict[str, Any]] = data["result"]
        return result

    def __enter__(self) -> Self:
        return self if self._process is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _write_config(self) -> None:
        (self.folder / "prometheus.yaml").write_text(self.config)

    def _ready(self) -> bool:
        assert self._process is not None
        returncode = self._process.poll()
        if returncode is not None:
            raise ComponentDied("prometheus", returncode, self.log)
        return get(f"{self.url}/-/ready")[0] == 200

    def _run(self) -> Supervised:
        return supervised_popen(
            self.binaries,
            [
                self.binaries.prometheus,
                f"--config.file={self.folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={self.folder / 'data'}",
                "--storage.tsdb.no-lockfile",
                "--storage.tsdb.retention.time=1d",
                f"--web.listen-address={self.address}:{self.port}",
                "--web.enable-lifecycle",
                "--log.level=warn",
            ],
            env={"PATH": os.defpath, "HOME": str(self.folder)},
            log=self.log,
            cwd=self.folder,
        )
