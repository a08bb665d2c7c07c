"""Shared memory: two processes of one host, as in a low-affinity pair's container, and no byte between them is sent."""

from __future__ import annotations

import mmap
import os
import stat

from disaggserve.protocol import Memory, SharedMemory, Way
from disaggworker.errors import TransferError
from disaggworker.kv.blocks import BLOCK_TOKENS
from disaggworker.kv.pool import NORESERVE, TOKEN_BYTES, Pages, Pool, file_bytes, tensors_in
from disaggworker.kv.transport import PagesSource, Place, ends


class Shm:
    """A way (`OneSided`) for pools made with `shared=True`.

    The pool's memory has no name; who may trace this process finds it under `/proc`, and its last bytes tell it from another
    process's that has the same number in another container or on another host.
    """

    way: Way = "shm"

    def offer(self, pool: Pool, place: Place) -> SharedMemory | None:
        """Where the pool is; None where it is not shared."""
        if pool.shared is None:
            return None
        fd, token = pool.shared
        return SharedMemory(
            pid=os.getpid(),
            fd=fd,
            token=token,
            blocks=pool.limit,
            layers=ends(place.layers),
            heads=ends(place.heads),
        )

    def open(self, memory: Memory, pool: Pool, place: Place) -> PagesSource:
        """Map it. Raises `TransferError` where it is not to be found here."""
        assert isinstance(memory, SharedMemory)
        there = Place(range(*memory.layers), range(*memory.heads))
        shape = (memory.blocks, len(there.heads), BLOCK_TOKENS, pool.head_dim)
        size = file_bytes(len(there.layers), shape, pool.dtype)
        path = f"/proc/{memory.pid}/fd/{memory.fd}"
        try:
            about = os.stat(path)
            if not stat.S_ISREG(about.st_mode) or about.st_size != size:
                raise TransferError(f"{path} is not the prefill worker's pool.")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.pread(fd, TOKEN_BYTES, size - TOKEN_BYTES) != memory.token:
                    raise TransferError(f"{path} is another process's.")
                # Private: what torch takes for writable must never be written to the peer.
                mapped = mmap.mmap(fd, size, mmap.MAP_PRIVATE | NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
            finally:
                os.close(fd)
        except OSError as e:
            raise TransferError(
                f"The prefill worker's memory {path} cannot be mapped: {e.strerror}."
            ) from None
        tensors = tensors_in(mapped, len(there.layers), shape, pool.dtype)
        return PagesSource(Pages(tensors[0::2], tensors[1::2]), there, pool, place)
