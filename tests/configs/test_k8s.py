"""The Kubernetes manifests agree with the server and with each other; `make k8s-check` holds them
to the published schemas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.settings import Settings
from server.routes.health import PATHS
from tests.server.front import door, says

FOLDER = Path(__file__).parents[2] / "configs" / "k8s"
LABELS = {"app.kubernetes.io/name": "quire"}


def manifest(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return document


@pytest.fixture
def deployment() -> dict[str, Any]:
    spec: dict[str, Any] = manifest("deployment")["spec"]
    return spec


@pytest.fixture
def container(deployment: dict[str, Any]) -> dict[str, Any]:
    [only] = deployment["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def test_every_variable_is_a_setting(container: dict[str, Any]) -> None:
    variables = {entry["name"]: entry.get("value", "secret") for entry in container["env"]}
    variables.pop("HF_TOKEN")  # huggingface_hub's own
    settings = Settings.read({}, environ=variables)
    assert settings.http.metrics_without_key, "the PodMonitor has no key"


def test_probes_ask_what_the_server_answers(container: dict[str, Any]) -> None:
    probes = {name: probe for name, probe in container.items() if name.endswith("Probe")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startupProbe": "/startupz",
        "livenessProbe": "/livez",
        "readinessProbe": "/readyz",
    }
    assert set(PATHS) >= {probe["httpGet"]["path"] for probe in probes.values()}


def test_one_port_by_one_name(container: dict[str, Any]) -> None:
    [port] = container["ports"]
    assert port["containerPort"] == Settings().http.port
    asked = [container[probe]["httpGet"]["port"] for probe in container if probe.endswith("Probe")]
    [service] = manifest("service")["spec"]["ports"]
    [scraped] = manifest("podmonitor")["spec"]["podMetricsEndpoints"]
    assert {*asked, service["targetPort"], scraped["port"]} == {port["name"]}


def test_everybody_finds_the_pods(deployment: dict[str, Any]) -> None:
    assert deployment["template"]["metadata"]["labels"] == LABELS
    assert deployment["selector"]["matchLabels"] == LABELS
    assert manifest("service")["spec"]["selector"] == LABELS
    assert manifest("podmonitor")["spec"]["selector"]["matchLabels"] == LABELS
    target = manifest("scaledobject")["spec"]["scaleTargetRef"]["name"]
    assert target == manifest("deployment")["metadata"]["name"]


def test_there_is_time_to_drain(deployment: dict[str, Any], container: dict[str, Any]) -> None:
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = deployment["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > before + Settings().lifetime.shutdown_timeout


def test_what_the_image_writes_to_is_mounted(
    deployment: dict[str, Any], container: dict[str, Any]
) -> None:
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {"/cache", "/tmp"}
    volumes = {volume["name"]: volume for volume in deployment["template"]["spec"]["volumes"]}
    assert set(volumes) == set(mounts)
    claim = volumes["cache"]["persistentVolumeClaim"]["claimName"]
    assert claim == manifest("cache")["metadata"]["name"]


def test_the_autoscaler_asks_for_metrics_that_there_are() -> None:
    metrics = door(says("x")).get("/metrics").text
    triggers = manifest("scaledobject")["spec"]["triggers"]
    queries = [trigger["metadata"]["query"] for trigger in triggers]
    names = [name for query in queries for name in re.findall(r"(?:vllm|quire):\w+", query)]
    assert len(names) == len(queries)
    for name in names:
        assert f"\n{name}{{" in metrics, f"{name} is not a metric"


def test_kustomize_lists_files_that_there_are() -> None:
    for name in manifest("kustomization")["resources"]:
        assert (FOLDER / name).is_file()
