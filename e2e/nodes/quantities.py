"""Kubernetes quantities: `250m`, `16Gi`, `8`."""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from math import ceil
from typing import Any

_SUFFIXES = {
    **{
        suffix: Fraction(1024) ** power
        for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)
    },
    **{suffix: Fraction(1000) ** power for power, suffix in enumerate(("k", "M", "G", "T", "P", "E"), 1)},
    **{suffix: Fraction(1000) ** -power for power, suffix in enumerate(("m", "u", "n"), 1)},
}


def quantity(text: str | int | float) -> Fraction:
    """The number that a quantity stands for; raises ValueError when it is none."""
    value = str(text)
    for length in (2, 1):
        # "1E" is an exa, "1E3" an exponent: only the end counts.
        if value[-length:] in _SUFFIXES:
            return Fraction(value[:-length]) * _SUFFIXES[value[-length:]]
    return Fraction(value)


def in_units(text: str, divisor: str) -> str:
    """A quantity in units of `divisor` (`0` and empty mean 1), rounded up, as the downward API gives it."""
    unit = quantity(divisor or "1") or Fraction(1)
    return str(ceil(quantity(text) / unit))


def pod_requests(spec: Mapping[str, Any]) -> dict[str, Fraction]:
    """What the scheduler counts for a pod, by resource: Σ containers, or an init container that wants more."""
    total = _sum(_requests(container) for container in spec["containers"])
    for container in spec.get("initContainers", []):
        for name, amount in _requests(container).items():
            total[name] = max(total.get(name, Fraction(0)), amount)
    overhead = {name: quantity(amount) for name, amount in spec.get("overhead", {}).items()}
    return _sum([total, overhead])


def _requests(container: Mapping[str, Any]) -> dict[str, Fraction]:
    return {
        name: quantity(amount) for name, amount in container.get("resources", {}).get("requests", {}).items()
    }


def _sum(parts: Iterable[Mapping[str, Fraction]]) -> dict[str, Fraction]:
    total: dict[str, Fraction] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, Fraction(0)) + amount
    return total
