"""A real GPU's time, kept by waiting: how long a step of the real model takes, and when a pipeline is free again."""

from __future__ import annotations

import dataclasses

from disaggserve import catalogue, latency
from disaggworker.config import Config
from disaggworker.engine.scheduler import Batch
from disaggworker.errors import StartError


class Pipeline:
    """When each of `stages` stages is free, in seconds of the monotonic clock. One stage of no time = not paced."""

    def __init__(self, stages: int) -> None:
        self._free = [0.0] * stages
        self.stages = stages

    @property
    def free_s(self) -> float:
        """When the first stage takes the next batch."""
        return self._free[0]

    def enter(self, ready_s: float, stage_s: float) -> float:
        """Send a batch in at `ready_s`; returns when it leaves the last stage."""
        at = ready_s
        for stage, free in enumerate(self._free):
            at = max(at, free) + stage_s
            self._free[stage] = at
        return at


@dataclasses.dataclass(frozen=True)
class Pace:
    """The real model on the real GPU, whose time this worker keeps."""

    model: catalogue.Model
    gpu: catalogue.GPU
    nvlink: bool
    rdma: bool
    times: latency.StepTimes
    blocks: int
    batch_tokens: int

    @classmethod
    def of(cls, config: Config) -> Pace | None:
        """The pace that the flags ask for, or None. Raises `StartError`."""
        if config.pace is None:
            return None
        try:
            model, gpu = catalogue.model(config.pace.model), catalogue.gpu(config.pace.gpu)
            blocks = catalogue.kv_blocks(model, gpu, config.tp, config.pp)
            times = latency.step_times(model, gpu, config.tp, config.pp)
            saturation = latency.saturation_tokens(model, gpu, config.tp, config.pp)
        except (catalogue.CatalogueError, latency.LatencyError) as e:
            raise StartError(f"--pace: {e}") from None
        if not blocks:
            raise StartError(
                f"--pace: {model.id} does not fit {config.tp * config.pp} {gpu.short} (tp {config.tp}, pp {config.pp})."
            )
        return cls(model, gpu, config.pace.nvlink, config.pace.rdma, times, blocks, saturation)

    def stage_s(self, batch: Batch) -> float:
        """Time of one stage for a step that is about to be computed, by the simulator's rules."""
        times = self.times
        # Who was put back is prefilled again, each alone, and the others wait.
        owing = [(s.owed, s.computed) for s in batch.decodes + batch.owing if s.owed]
        owed_s = sum(times.stage_s([missing], 0, 0) for missing in owing)
        chunks = [(count, sequence.computed) for sequence, count in batch.prompts]
        return owed_s + times.stage_s(chunks, len(batch.decodes), sum(s.length for s in batch.decodes))

    def transfer_s(self, tokens: int, prefill_gpu: str, prefill_rdma: bool, *, inside: bool = False) -> float:
        """Time for the real KV of `tokens` from a prefill worker on another GPU; `inside`: of the same container."""
        if inside:
            link = catalogue.container_link(self.gpu, self.nvlink)
        else:
            link = catalogue.pod_link(catalogue.gpu(prefill_gpu), prefill_rdma, self.gpu, self.rdma)
        return latency.transfer_s(tokens * self.model.kv_bytes_per_token(), link)
