"""The API server and the offline check say the same: of the committed CRD, of broken manifests, of generated documents."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kubernetes import client, config

from disaggserve.api import crd, manifest
from disaggserve.api.errors import InvalidManifest
from disaggserve.api.model import ApiModel
from disaggserve.api.spec import Spec
from e2e.controlplane import CommandFailed, ControlPlane, ensure
from tests.contract.broken import BROKEN, GOOD
from tests.integration.bench import install_crd

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("crd"), ensure()) as plane:
        install_crd(plane)
        yield plane


def test_committed_crds_are_what_the_generator_prints() -> None:
    for path in ("crds/disaggserves.yaml", "charts/disaggserve/files/crd.yaml"):
        assert (ROOT / path).read_text() == crd.text(), f"{path} is old: run `make crds`"
    assert len(crd.text()) < 50_000


def test_the_generator_raises_on_what_a_structural_schema_cannot_say() -> None:
    class Union(ApiModel):
        value: int | str

    class Endless(ApiModel):
        values: tuple[str, ...]

    for model in (Union, Endless):
        with pytest.raises(crd.CannotExpress):
            crd.schema(model)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_manifests_are_refused_with_the_field_by_both(cluster: ControlPlane, case: str) -> None:
    build, field = BROKEN[case]
    document = build()
    with pytest.raises(CommandFailed) as refused:
        cluster.kubectl("apply", "--dry-run=server", "-f", "-", input=json.dumps(document))
    assert field in str(refused.value), "the API server names the field"
    with pytest.raises(InvalidManifest) as fault:
        manifest.load(json.dumps(document))
    assert any(f.field == field for f in fault.value.faults), "`disaggserve validate` names it too"


def test_a_good_manifest_gets_the_same_defaults_from_both(cluster: ControlPlane) -> None:
    stored = json.loads(
        cluster.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", input=json.dumps(GOOD))
    )
    assert manifest.parse_spec(stored["spec"]) == manifest.load(json.dumps(GOOD))[0].spec
    assert stored["spec"] == manifest.load(json.dumps(GOOD))[0].spec.json_value()


def test_explain_reads_as_the_manual(cluster: ControlPlane) -> None:
    text = " ".join(cluster.kubectl("explain", "disaggserve.spec.slo").split())
    assert "Time to first token that a request must meet, with a unit. Example: 250ms." in text
    assert "maxSurgeGPUs" in cluster.kubectl("explain", "disaggserve.spec", "--recursive")


def _values(name: str, sub: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a schema's node: mostly right, now and then just outside."""
    kind = sub["type"]
    if "enum" in sub:
        return st.sampled_from([*sub["enum"], "other"])
    if kind == "boolean":
        return st.booleans()
    if kind in ("integer", "number"):
        low, high = sub.get("minimum", 0), sub.get("maximum", 10)
        some: list[Any] = [low, high, low + 1, low - 1, high + 1, 1, 2.5, None]
        return st.sampled_from(some)
    if kind == "string":
        return st.sampled_from(
            ["250ms", "0s", "1.5h", "10", "", "a", "x/y", "-", "1Gi", "/p", "{}", "A_B", None]
        ) | st.text(string.ascii_letters + "./-_ ", max_size=8)
    if kind == "array":
        return st.lists(_values(name, sub["items"]), max_size=2)
    if "properties" in sub:
        return _objects(sub)
    return st.dictionaries(
        st.sampled_from(["a", "b.c/d"]), _values(name, sub["additionalProperties"]), max_size=2
    )


def _objects(schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    required = schema.get("required", [])
    known = {k: _values(k, v) for k, v in schema["properties"].items()}
    return st.fixed_dictionaries(
        {k: v for k, v in known.items() if k in required},
        optional={k: v for k, v in known.items() if k not in required},
    )


_SCHEMA = crd.schema(Spec)


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """The good spec with one or two of its parts drawn anew."""
    spec = json.loads(json.dumps(GOOD["spec"]))
    for part in draw(
        st.lists(st.sampled_from(sorted(_SCHEMA["properties"])), min_size=1, max_size=2, unique=True)
    ):
        spec[part] = draw(_values(part, _SCHEMA["properties"][part]))
    return spec


@pytest.mark.timeout(240)
def test_generated_documents_are_judged_alike(cluster: ControlPlane) -> None:
    """Never accepted by one and refused by the other."""
    drawn: list[dict[str, Any]] = []

    @settings(
        max_examples=300,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(specs())
    def collect(spec: dict[str, Any]) -> None:
        drawn.append(spec)

    collect()
    api = client.CustomObjectsApi(config.new_client_from_config(str(cluster.kubeconfig)))
    accepted, differ = 0, []
    for spec in drawn:
        document = {**GOOD, "spec": spec}
        try:
            manifest.parse(document)
            offline = "accepted"
        except InvalidManifest as error:
            offline = str(error)
        try:
            api.create_namespaced_custom_object(
                manifest.GROUP,
                manifest.VERSION,
                "default",
                manifest.PLURAL,
                document,
                dry_run="All",
                field_validation="Strict",
            )
            server = "accepted"
        except client.ApiException as error:
            server = f"{error.status}: {json.loads(error.body)['message']}"
        assert server == "accepted" or server[:3] in ("400", "422"), server
        accepted += server == "accepted"
        if (offline == "accepted") != (server == "accepted"):
            differ.append(f"offline: {offline[:300]} | server: {server[:300]} | {json.dumps(spec)[:600]}")
    assert not differ, "\n".join(differ[:5])
    assert 20 < accepted < len(drawn) - 20, "both verdicts are exercised"
