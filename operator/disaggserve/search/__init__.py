"""Placement: what shapes, how many instances, on which nodes, and what that is predicted to attain."""

from disaggserve.search import published
from disaggserve.search.goodputs import measure
from disaggserve.search.packing import Group, NoRoom, Standing, pack, pack_pairs
from disaggserve.search.place import place
from disaggserve.search.predicting import deployment, kv_link, observe, pool, predict
from disaggserve.search.problem import Placement, Problem, Progress, Rejected, Shape

__all__ = [
    "Group",
    "NoRoom",
    "Placement",
    "Problem",
    "Progress",
    "Rejected",
    "Shape",
    "Standing",
    "deployment",
    "kv_link",
    "measure",
    "observe",
    "pack",
    "pack_pairs",
    "place",
    "pool",
    "predict",
    "published",
]
