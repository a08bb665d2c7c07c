"""Spec, status and plan of the `DisaggServe` resource, as frozen pydantic models; the CRD is generated from them."""
