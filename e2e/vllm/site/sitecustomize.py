"""Makes a vLLM built for servers bearable on two cores; on PYTHONPATH of the servers under test, and nowhere else.

Nothing here changes what is computed, said or sent: only who waits how, and the name by which vLLM finds its own version.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

os.environ.setdefault(
    "VLLM_CPU_OMP_THREADS_BIND", "nobind"
)  # else every server pins itself to the highest core
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
)  # API and engine in one process: half the start, half the memory

# And else its NIXL connector does: the thread that computes, of every server of the machine, on the one highest core.
os.sched_setaffinity = lambda pid, cores: None

_version = importlib.metadata.version


def _vllm_by_another_name(distribution_name: str) -> str:
    """The CPU build's distribution is called vllm-cpu, and `vllm serve` asks for vllm; "cpu" in it tells the platform."""
    return _version("vllm-cpu") + "+cpu" if distribution_name == "vllm" else _version(distribution_name)


def _tame_nixl(module: ModuleType) -> None:
    """nixl's agent looks for transfers in a loop without a pause: a core for each server. 1 ms is soon enough."""
    agent = module.nixlBind.nixlAgent

    def tamed(name: str, config: Any) -> Any:
        config.pthrDelay = 1000  # µs
        return agent(name, config)

    module.nixlBind.nixlAgent = tamed


def _tame_reader(module: ModuleType) -> None:
    """The reader of shared memory spins for a second after each message (tp > 1, or an engine process of its own)."""
    init = module.SpinCondition.__init__

    def tamed(self: Any, *args: Any, **more: Any) -> None:
        init(self, *args, **{**more, "busy_loop_s": 0.0})

    module.SpinCondition.__init__ = tamed


def _fork(module: ModuleType) -> None:
    """The engine's process would import everything anew: half a minute on two busy cores."""
    setattr(module, "get_mp_context", lambda: multiprocessing.get_context("fork"))  # noqa: B010


def _ask_here(module: ModuleType) -> None:
    """What kind of model a checkpoint holds is asked in a process of its own, for CUDA's sake: another import of everything."""
    setattr(module, "_run_in_subprocess", lambda ask: ask())  # noqa: B010


_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "nixl_cu13._api": _tame_nixl,
    "vllm.distributed.device_communicators.shm_broadcast": _tame_reader,
    "vllm.utils.system_utils": _fork,
    "vllm.model_executor.models.registry": _ask_here,
}


class _Hook(importlib.abc.MetaPathFinder):
    """Calls what is to be done after a module's import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec and spec.loader:
            execute, after = spec.loader.exec_module, _AFTER[name]

            def then(module: ModuleType) -> None:
                execute(module)
                after(module)

            spec.loader.exec_module = then  # type: ignore[method-assign]
        return spec


importlib.metadata.version = _vllm_by_another_name
sys.meta_path.insert(0, _Hook())
