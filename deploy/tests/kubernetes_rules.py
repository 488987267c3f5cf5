"""Checks Kubernetes objects: their schemas, and the names by which they refer to each other."""

from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate

# The oldest version that the chart accepts, one between, and the newest that is known to kubernetes-validate.
VERSIONS = ("1.29", "1.33", "1.37")

Object = dict[str, Any]

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}


def fields(properties: Object, **more: Any) -> Object:
    """Returns the schema of an object that has no other fields than these."""
    return {"type": "object", "additionalProperties": False, "properties": properties, **more}


def custom(api_version: str, metadata: Object, spec: Object, **more: Any) -> Object:
    """Returns the schema of a custom object."""
    properties = {"apiVersion": {"const": api_version}, "kind": {}, "metadata": metadata, "spec": spec}
    return fields(properties | more, required=["apiVersion", "kind", "metadata", "spec"])


NAME = {"name": {"type": "string"}, "labels": STRINGS}
# The fields that the chart may use, from the published definitions of monitoring.coreos.com/v1 and of
# serving.kserve.io/v1alpha1.
CUSTOM = {
    "PodMonitor": custom(
        "monitoring.coreos.com/v1",
        fields(NAME | {"namespace": {"type": "string"}}, required=["name"]),
        fields(
            {
                "jobLabel": {"type": "string"},
                "selector": fields({"matchLabels": STRINGS}),
                "podMetricsEndpoints": {
                    "type": "array",
                    "minItems": 1,
                    "items": fields(
                        {
                            "port": {"type": "string"},
                            "path": {"type": "string"},
                            "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                            "relabelings": {
                                "type": "array",
                                "items": fields(
                                    {
                                        "sourceLabels": {
                                            "type": "array",
                                            "items": {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"},
                                        },
                                        "targetLabel": {"type": "string"},
                                    }
                                ),
                            },
                        }
                    ),
                },
            },
            required=["podMetricsEndpoints", "selector"],
        ),
    ),
    "ClusterStorageContainer": custom(
        "serving.kserve.io/v1alpha1",
        # Not in a namespace.
        fields(NAME, required=["name"]),
        fields(
            {
                # A container of Kubernetes: it is validated as a part of a pod.
                "container": {"type": "object", "required": ["name"]},
                "supportedUriFormats": {
                    "type": "array",
                    "minItems": 1,
                    "items": fields({"prefix": {"type": "string"}, "regex": {"type": "string"}}, minProperties=1),
                },
                "workloadType": {"enum": ["initContainer", "localModelDownloadJob"]},
            },
            required=["container", "supportedUriFormats"],
        ),
        disabled={"type": "boolean"},
    ),
}


def validate(item: Object) -> None:
    """Raises an exception if a field is unknown or has the wrong type, in any of the versions."""
    # JSON schemas accept 1e+06 as an integer. The API server does not.
    assert not any(isinstance(value, float) for value in leaves(item)), f"a float in {item}"
    if schema := CUSTOM.get(item["kind"]):
        jsonschema.validate(item, schema)
        if item["kind"] == "ClusterStorageContainer":
            pod = {"containers": [item["spec"]["container"]]}
            validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod})
        return
    for version in VERSIONS:
        used = kubernetes_validate.validate(item, version, strict=True)
        assert used == version


def leaves(value: Any) -> Iterator[Any]:
    """Yields the scalars of a document."""
    match value:
        case dict():
            for item in value.values():
                yield from leaves(item)
        case list():
            for item in value:
                yield from leaves(item)
        case _:
            yield value


def pod_template(item: Object) -> Object | None:
    """Returns the pod template of a workload; `None` for other objects."""
    template: Object | None = item.get("spec", {}).get("template")
    return template


def containers(pod: Object) -> list[Object]:
    """Returns all containers of the spec of a pod."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def problems(objects: list[Object]) -> Iterator[str]:
    """Yields names that refer to nothing, and names that are used twice."""
    named = {(item["kind"], item["metadata"]["name"]) for item in objects}
    if len(named) != len(objects):
        yield "two objects have one kind and name"
    templates = [template for template in map(pod_template, objects) if template]
    for item in objects:
        name = f"{item['kind']} {item['metadata']['name']}"
        if template := pod_template(item):
            selected = item["spec"]["selector"]["matchLabels"].items()
            if not selected <= template["metadata"]["labels"].items():
                yield f"{name} does not select its pods"
            yield from (f"{name}: {problem}" for problem in pod_problems(template["spec"]))
        if selector := selector_of(item):
            pods = [pod for pod in templates if selector.items() <= pod["metadata"]["labels"].items()]
            if not pods:
                yield f"{name} selects no pod"
            ports = {port["name"] for pod in pods for part in containers(pod["spec"]) for port in part.get("ports", [])}
            for port in ports_of(item):
                if port not in ports:
                    yield f"{name} names the port {port}, which no container has"


def selector_of(item: Object) -> Object | None:
    spec = item.get("spec", {})
    selector = {
        "Service": lambda: spec["selector"],
        "NetworkPolicy": lambda: spec["podSelector"]["matchLabels"],
        "PodMonitor": lambda: spec["selector"]["matchLabels"],
    }.get(item["kind"])
    return selector() if selector else None


def ports_of(item: Object) -> list[str]:
    spec = item.get("spec", {})
    match item["kind"]:
        case "Service":
            return [port["targetPort"] for port in spec["ports"]]
        case "NetworkPolicy":
            return [port["port"] for rule in spec["ingress"] for port in rule["ports"]]
        case _:
            return [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]]


def pod_problems(pod: Object) -> Iterator[str]:
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    if len(set(volumes)) != len(volumes):
        yield "two volumes have one name"
    mounted = {mount["name"] for part in containers(pod) for mount in part.get("volumeMounts", [])}
    for volume in mounted.symmetric_difference(volumes):
        yield f"the volume {volume} is not both declared and mounted"
    for container in containers(pod):
        name = container["name"]
        variables = [variable["name"] for variable in container.get("env", [])]
        if len(set(variables)) != len(variables):
            yield f"{name} has a variable twice"
        paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        if len(set(paths)) != len(paths):
            yield f"{name} has two mounts at one path"
        for variable in container.get("env", []):
            if variable["name"] == "MODEL_CACHE_DIR" and not is_below(variable["value"], paths):
                yield f"{name}: {variable['value']} is not on a volume"
        ports = {port["name"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if probe in container and container[probe]["httpGet"]["port"] not in ports:
                yield f"{name}: {probe} names no port of the container"


def is_below(path: str, folders: list[str]) -> bool:
    """Returns true if a path is one of the folders, or below one."""
    return any(path == folder or path.startswith(folder + "/") for folder in folders)
