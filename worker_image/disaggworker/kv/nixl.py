"""NIXL: the puller's agent reads the server's registered pool, over whatever its backend (UCX) finds between the two."""

from __future__ import annotations

import importlib
import secrets
import time
from typing import Any

import numpy as np

from disaggserve.protocol import Memory, NixlMemory, Way
from disaggworker.errors import PeerLost, StartError, TransferError
from disaggworker.kv.pool import Ints, Pool
from disaggworker.kv.transport import Place, ends, shifted

_NAMES = ("nixl_cu13", "nixl_cu12", "nixl")  # one of the first two is installed for the CUDA that there is
_PATIENCE_S = 10.0
_LOOK_S = 50e-6


def library() -> Any:
    """NIXL's Python module. Raises `StartError` where none is installed."""
    for name in _NAMES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise StartError(
        "NIXL is not installed: install disaggserve[nixl-cu12] or disaggserve[nixl-cu13], for the CUDA there is."
    )


class Nixl:
    """A way (`OneSided`). One agent per process, made when a pool is known."""

    way: Way = "nixl"

    def __init__(self) -> None:
        """Raises `StartError` where NIXL is not installed."""
        self._nixl = library()
        self._agent: Any = None

    def offer(self, pool: Pool, place: Place) -> NixlMemory:
        """Register the pool. NIXL answers reads of it in a thread of its own."""
        agent = self._registered(pool)
        return NixlMemory(
            agent=agent.name,
            metadata=agent.get_agent_metadata(),
            addresses=[t.data_ptr() for pair in zip(pool.keys, pool.values, strict=True) for t in pair],
            device=_device(pool),
            blocks=pool.limit,
            layers=ends(place.layers),
            heads=ends(place.heads),
        )

    def open(self, memory: Memory, pool: Pool, place: Place) -> _Source:
        """Meet the server's agent. Raises `TransferError` where that does not work."""
        assert isinstance(memory, NixlMemory)
        if len(memory.addresses) != 2 * (memory.layers[1] - memory.layers[0]):
            raise TransferError("The prefill worker's NIXL memory is not that of its layers.")
        agent = self._registered(pool)
        try:
            agent.add_remote_agent(memory.metadata)
        except Exception as e:  # NIXL's errors have no class of their own
            raise TransferError(f"NIXL does not reach the prefill worker: {e}") from None
        return _Source(agent, memory, pool, place)

    def _registered(self, pool: Pool) -> Any:
        if self._agent is None:
            nixl = self._nixl
            self._agent = nixl.nixl_agent(secrets.token_hex(8), nixl.nixl_agent_config(backends=["UCX"]))
            self._agent.register_memory([*pool.keys, *pool.values])
        return self._agent


def _device(pool: Pool) -> int:
    return pool.device.index or 0 if pool.device.type == "cuda" else 0


def _spans(addresses: Ints, blocks: Ints, width: int, heads: range, unit: int, device: int) -> Ints:
    """`[tensors × blocks, 3]`: address, bytes and device of these heads of these blocks, `width` bytes each, in each tensor."""
    starts = (addresses[:, None] + blocks * width + heads.start * unit).reshape(-1)
    return np.stack([starts, np.full_like(starts, len(heads) * unit), np.full_like(starts, device)], 1)


class _Source:
    """A server's pool, as its agent registered it."""

    def __init__(self, agent: Any, memory: NixlMemory, pool: Pool, here: Place) -> None:
        self._agent, self._memory, self._pool, self._here = agent, memory, pool, here
        self._there = Place(range(*memory.layers), range(*memory.heads))
        self._kind = "VRAM" if pool.device.type == "cuda" else "DRAM"

    def read(self, ids: Ints, blocks: Ints, place: Place) -> None:
        """Raises `TransferError`; then, too, nothing is written any more."""
        agent, unit = self._agent, self._pool.unit
        theirs = np.asarray(self._memory.addresses, dtype=np.int64).reshape(-1, 2)
        mine = np.asarray(
            [(k.data_ptr(), v.data_ptr()) for k, v in zip(self._pool.keys, self._pool.values, strict=True)]
        )
        spans = [
            _spans(
                table[place.layers.start - held.layers.start : place.layers.stop - held.layers.start].reshape(
                    -1
                ),
                index,
                len(held.heads) * unit,
                shifted(place.heads, held),
                unit,
                device,
            )
            for table, held, index, device in (
                (mine, self._here, blocks, _device(self._pool)),
                (theirs, self._there, ids, self._memory.device),
            )
        ]
        handle = None
        try:
            ours, far = (agent.get_xfer_descs(span, self._kind) for span in spans)
            handle = agent.initialize_xfer("READ", ours, far, self._memory.agent)
            state, until_s = agent.transfer(handle), time.monotonic() + _PATIENCE_S
            while state == "PROC" and time.monotonic() < until_s:
                time.sleep(_LOOK_S)
                state = agent.check_xfer_state(handle)
        except Exception as e:  # NIXL's errors have no class of their own
            raise PeerLost(f"NIXL could not read the prefill worker's memory: {e}") from None
        finally:
            if handle is not None:
                handle.release()
        if state != "DONE":
            raise PeerLost("NIXL could not read the prefill worker's memory: it does not answer.")

    def close(self) -> None:
        """Forget the server's agent."""
        self._agent.remove_remote_agent(self._memory.agent)
