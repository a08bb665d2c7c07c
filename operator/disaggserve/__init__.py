"""DisaggServe: placement, rollout and re-planning of disaggregated LLM serving on Kubernetes."""

__version__ = "0.1.0"
