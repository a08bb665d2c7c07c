"""One writer at a time: the lease in a thread of its own, and the fence that every write passes.

The synchronous elector of `kubernetes.leaderelection` renews; this module only starts it and answers "may I still write?".
A process that could not renew exits: another acts, and a late write of this one cannot happen.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from kubernetes import config
from kubernetes.client.rest import ApiException
from kubernetes.leaderelection import electionconfig, leaderelection
from kubernetes.leaderelection.resourcelock.leaselock import LeaseLock
from urllib3.exceptions import HTTPError

from disaggserve.cluster.clock import Clock
from disaggserve.cluster.settings import Settings, kubeconfig

log = logging.getLogger(__name__)
_TIMEOUT_S = 4
LOST = 75  # exit status: temporary failure, start me again


class Leader:
    """`start()` returns at once; `leading` is set when the lease is held."""

    def __init__(self, settings: Settings, clock: Clock, on_leading: Callable[[], None]) -> None:
        self._settings = settings
        self._clock = clock
        self._on_leading = on_leading
        self._renewed_s = float("-inf")
        self._lock: Lock | None = None

    def start(self) -> None:
        threading.Thread(target=self._run, name="lease", daemon=True).start()

    def fence(self) -> None:
        """Returns when a write may go out; ends the process when the lease may be another's by now."""
        if self._clock.monotonic_s() - self._renewed_s >= self._settings.lease_duration_s:
            log.error("lease not renewed in time; exiting before the next write")
            os._exit(LOST)

    def release(self) -> None:
        """Gives the lease back on a clean stop, so that the next operator need not wait for it to run out."""
        if self._lock is None:
            return
        held, record = self._lock.get(self._lock.name, self._lock.namespace)
        if held and record.holder_identity == self._settings.identity:
            body = {"spec": {"holderIdentity": ""}}
            self._lock.api_instance.patch_namespaced_lease(self._lock.name, self._lock.namespace, body)

    def _run(self) -> None:
        try:
            if kubeconfig():
                config.load_kube_config(kubeconfig())
            else:
                config.load_incluster_config()
            s = self._settings
            self._lock = Lock(s.lease, s.namespace, s.identity, self._clock, self._renewed)
            election = electionconfig.Config(
                self._lock,
                lease_duration=s.lease_duration_s,
                renew_deadline=s.renew_deadline_s,
                retry_period=s.retry_period_s,
                onstarted_leading=self._on_leading,
                onstopped_leading=self._stop,
            )
            leaderelection.LeaderElection(election).run()
        except Exception:
            log.exception("the lease cannot be held")
        finally:
            self._stop()

    def _renewed(self, sent_s: float) -> None:
        self._renewed_s = sent_s

    def _stop(self) -> None:
        log.error("lease lost; exiting")
        os._exit(LOST)


class Lock(LeaseLock):  # type: ignore[misc]
    """The library's lock with a timeout on every call; notes when a renewal was *sent*: the others count from there."""

    def __init__(
        self, name: str, namespace: str, identity: str, clock: Clock, renewed: Callable[[float], None]
    ) -> None:
        super().__init__(name, namespace, identity)
        self._clock = clock
        self._renewed = renewed
        for call in ("read_namespaced_lease", "create_namespaced_lease", "replace_namespaced_lease"):
            setattr(
                self.api_instance,
                call,
                partial(getattr(self.api_instance, call), _request_timeout=_TIMEOUT_S),
            )

    def get(self, name: str, namespace: str) -> tuple[bool, Any]:
        try:
            return super().get(name, namespace)  # type: ignore[no-any-return]
        except HTTPError as error:
            return False, ApiException(status=0, reason=str(error))

    def create(self, name: str, namespace: str, election_record: Any) -> bool:
        return self._write(super().create, name, namespace, election_record)

    def update(self, name: str, namespace: str, updated_record: Any) -> bool:
        return self._write(super().update, name, namespace, updated_record)

    def _write(self, write: Callable[..., bool], *args: Any) -> bool:
        sent_s = self._clock.monotonic_s()
        try:
            done = write(*args)
        except HTTPError as error:
            log.warning("lease not renewed: %s", error)
            return False
        if done:
            self._renewed(sent_s)
        return done
