"""How a transfer is cut into pieces, and the memory that they are gathered in."""

from __future__ import annotations

import itertools
import threading

import pytest
import zmq

from disaggserve import protocol
from disaggworker.kv.serve import _Buffers


@pytest.mark.parametrize("layers", [(0, 1), (3, 7), (0, 80)])
@pytest.mark.parametrize("blocks", [1, 7, 64, 1000])
@pytest.mark.parametrize("block_bytes", [1 << 10, 1 << 17, 9 << 20])
def test_every_block_of_every_layer_comes_once(
    layers: tuple[int, int], blocks: int, block_bytes: int
) -> None:
    cuts = [*protocol.pieces(layers, blocks, block_bytes)]
    cells = [(layer, c.first + i) for c in cuts for layer in c.layers for i in range(c.blocks)]
    assert cells == [*itertools.product(range(*layers), range(blocks))]
    most = max(protocol.PIECE_BYTES, block_bytes)
    assert all(len(c.layers) * c.blocks * block_bytes <= most for c in cuts)


def test_memory_is_used_again_only_when_it_was_sent() -> None:
    buffers, sent = _Buffers(), threading.Event()
    first = buffers.take(100)
    buffers.lend(first, zmq.MessageTracker(sent))
    assert buffers.take(100) is not first
    sent.set()
    assert buffers.take(100) is first
    assert buffers.take(100) is not first
    assert len(buffers.take(protocol.PIECE_BYTES + 1)) > protocol.PIECE_BYTES
