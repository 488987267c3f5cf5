"""Tests the plain manifests, the examples for programs that use the cache, and the files for ECS and Docker Compose.

The commands of modelcache in them are run with the real programs.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import yaml

import kubernetes_rules as rules
from programs import ADMIN, HTTP, Container, Hub, Programs, Run, of_pod
from render import CHART, COMMAND, DEPLOY, KUBERNETES, plain_files

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
EXAMPLES = sorted((KUBERNETES / "examples").glob("*.yaml"))
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
# The fields of the Compose specification that compose.yaml may use.
STRINGS = {"type": "array", "items": {"type": "string"}}
SERVICE = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {
        "image": {"type": "string"},
        "entrypoint": STRINGS,
        "command": STRINGS,
        "user": {"type": "string"},
        "read_only": {"type": "boolean"},
        "cap_drop": STRINGS,
        "security_opt": STRINGS,
        "volumes": STRINGS,
        "environment": {"type": "object", "additionalProperties": {"type": ["string", "number", "null"]}},
        "ports": STRINGS,
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "stop_grace_period": {"type": "string", "pattern": "^[0-9]+s$"},
        "depends_on": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["condition"],
                "additionalProperties": False,
                "properties": {
                    "condition": {"enum": ["service_started", "service_healthy", "service_completed_successfully"]}
                },
            },
        },
    },
}
COMPOSE = {
    "type": "object",
    "required": ["services"],
    "additionalProperties": False,
    "patternProperties": {"^x-": {}},
    "properties": {
        "name": {"type": "string"},
        "services": {"type": "object", "additionalProperties": SERVICE},
        "volumes": {"type": "object", "additionalProperties": {"type": "null"}},
    },
}


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def example(name: str) -> dict[str, Any]:
    """Returns the spec of the pods of an example."""
    spec: dict[str, Any] = documents(KUBERNETES / f"examples/{name}.yaml")[0]["spec"]["template"]["spec"]
    return spec


def task() -> dict[str, Any]:
    definition: dict[str, Any] = json.loads((DEPLOY / "ecs/task-definition.json").read_text())
    return definition


def compose() -> dict[str, Any]:
    file: dict[str, Any] = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())
    return file


def test_plain_manifests_are_those_of_the_chart() -> None:
    for file, text in plain_files().items():
        assert file.read_text() == text, f"{file.name} is out of date: {COMMAND}"
    assert set(KUBERNETES.glob("*.yaml")) == set(plain_files()), "files that no rendering makes"


@pytest.mark.parametrize("file", [*plain_files(), *EXAMPLES], ids=lambda file: file.stem)
def test_manifests_are_valid(file: Path) -> None:
    items = documents(file)
    for item in items:
        rules.validate(item)
    assert list(rules.problems(items)) == []


def test_plain_manifests_are_applied_in_order() -> None:
    items = documents(KUBERNETES / "modelcache.yaml")
    assert items[0]["kind"] == "Namespace" and items[-1]["kind"] == "DaemonSet"
    namespaces = {item["metadata"].get("namespace") for item in items[1:]}
    assert namespaces == {items[0]["metadata"]["name"]}
    # The secret is made by hand: the comment at the top says how.
    head = (KUBERNETES / "modelcache.yaml").read_text().split("apiVersion")[0]
    variables = items[-1]["spec"]["template"]["spec"]["containers"][0]["env"]
    secret = next(variable["valueFrom"]["secretKeyRef"] for variable in variables if "valueFrom" in variable)
    assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in head


def test_each_way_to_use_the_cache_has_an_example() -> None:
    assert [file.stem for file in EXAMPLES] == ["exec", "hub-endpoint", "init-container", "sidecar"]
    page = (DEPLOY.parent / "docs/kubernetes.md").read_text()
    for file in EXAMPLES:
        assert f"(../{file.relative_to(DEPLOY.parent)})" in page


@pytest.mark.parametrize("name", ["init-container", "sidecar"])
def test_examples_meet_the_restricted_pod_security_level(name: str) -> None:
    pod = example(name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    for container in rules.containers(pod):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {kind for volume in pod["volumes"] for kind in volume if kind != "name"} == {"emptyDir"}


def test_examples_use_the_service_of_the_chart() -> None:
    service = next(item for item in documents(KUBERNETES / "modelcache.yaml") if item["kind"] == "Service")
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    url = f"http://{name}.{namespace}.svc:{service['spec']['ports'][0]['port']}"
    for name, part in (("hub-endpoint", "containers"), ("init-container", "initContainers")):
        variables = {variable["name"]: variable["value"] for variable in example(name)[part][0]["env"]}
        assert variables["HF_ENDPOINT"] == url


@pytest.mark.parametrize("name", ["init-container", "sidecar"])
def test_budgets_of_examples_are_below_the_limit_of_their_volume(name: str) -> None:
    pod = example(name)
    variables = of_pod(pod["initContainers"][0]).environment
    sizes = [re.fullmatch(r"(\d+)Gi", volume["emptyDir"]["sizeLimit"]) for volume in pod["volumes"]]
    budget = re.fullmatch(r"(\d+)GiB", variables["MODEL_CACHE_MAX_BYTES"])
    assert budget and sizes[0] and int(budget[1]) < int(sizes[0][1])
    assert int(variables["MODEL_CACHE_MIN_FREE_BYTES"].rstrip("%")) > 15


def test_the_init_container_gets_the_model(programs: Programs, hub: Hub, tmp_path: Path) -> None:
    pod = example("init-container")
    run = Run(programs, of_pod(pod["initContainers"][0]), tmp_path, HF_ENDPOINT=hub.endpoint)
    (tmp_path / "models").mkdir()
    # A restart of the pod finds the files of the first start.
    for _ in range(2):
        result = run.finish()
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == str(tmp_path / "models/model")
    # Where the program looks for it.
    assert pod["containers"][0]["args"][-1] == "/models/model"
    model = tmp_path / "models/model/model.safetensors"
    assert model.read_bytes() == hub.file(MODEL)
    assert model.stat().st_nlink > 1, "a hard link into the cache"


def test_the_sidecar_serves_its_pod(programs: Programs, hub: Hub, tmp_path: Path) -> None:
    pod = example("sidecar")
    part = pod["initContainers"][0]
    container = of_pod(part)
    # The default address is the one that the program uses.
    assert pod["containers"][0]["env"] == [{"name": "HF_ENDPOINT", "value": f"http://127.0.0.1:{HTTP}"}]
    container.environment["MODEL_CACHE_LISTEN"] = f"127.0.0.1:{HTTP}"
    with Run(programs, container, tmp_path, HF_ENDPOINT=hub.endpoint) as run:
        run.wait_until_ok(part["startupProbe"]["httpGet"]["path"], ADMIN)
        run.wait_until_ok(part["livenessProbe"]["httpGet"]["path"], ADMIN)
        assert run.get(f"/{MODEL}/resolve/main/model.safetensors") == (200, hub.file(MODEL))
        assert run.stop() == 0
        assert run.warnings() == []


def test_exec_becomes_the_program(programs: Programs, hub: Hub, tmp_path: Path) -> None:
    container = of_pod(example("exec")["containers"][0])
    command = container.command
    program = command.index("--") + 1
    assert command[program:] == ["vllm", "serve", "Qwen/Qwen3-8B"] and "Qwen/Qwen3-8B" in command[2]
    container.command = [*command[:program], "sh", "-c", "echo $HF_HUB_OFFLINE; cat $MODEL_CACHE_PATH/* | cksum"]
    result = Run(programs, container, tmp_path, HF_ENDPOINT=hub.endpoint).finish()
    assert result.returncode == 0, result.stderr
    expected = subprocess.run(["cksum"], input=hub.file("Qwen/Qwen3-8B"), capture_output=True, check=True).stdout
    assert result.stdout == f"1\n{expected.decode()}"


def test_exec_has_the_limits_and_the_user_of_the_daemon() -> None:
    pod = example("exec")
    environment = of_pod(pod["containers"][0]).environment
    assert environment["MODEL_CACHE_MAX_BYTES"] == DEFAULTS["cache"]["maxBytes"]
    assert environment["MODEL_CACHE_MIN_FREE_BYTES"] == DEFAULTS["cache"]["minFreeBytes"]
    assert pod["securityContext"]["runAsUser"] == DEFAULTS["runAsUser"]
    assert pod["securityContext"]["runAsGroup"] == DEFAULTS["runAsGroup"]
    paths = [volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume]
    assert paths == [DEFAULTS["cache"]["hostPath"]]


def test_the_task_definition_is_valid() -> None:
    definition = task()
    operation = botocore.session.get_session().get_service_model("ecs").operation_model("RegisterTaskDefinition")
    report = botocore.validate.ParamValidator().validate(definition, operation.input_shape)
    assert not report.has_errors(), report.generate_report()
    parts = {part["name"]: part for part in definition["containerDefinitions"]}
    volumes = {volume["name"] for volume in definition["volumes"]}
    for part in parts.values():
        assert {mount["sourceVolume"] for mount in part.get("mountPoints", [])} <= volumes
        for mount in part.get("mountPoints", []):
            assert {"name": "MODEL_CACHE_DIR", "value": mount["containerPath"]} in part["environment"]
        for dependency in part.get("dependsOn", []):
            assert dependency["condition"] in {"START", "COMPLETE", "SUCCESS", "HEALTHY"}
            # ECS refuses a wait for the end of an essential container.
            waits = dependency["condition"] in {"COMPLETE", "SUCCESS"}
            assert parts[dependency["containerName"]]["essential"] is not waits
    # An address of the task itself: containers share it in this mode.
    assert definition["networkMode"] == "awsvpc"
    assert parts["server"]["environment"] == [{"name": "HF_ENDPOINT", "value": f"http://127.0.0.1:{HTTP}"}]


def test_the_compose_file_is_valid() -> None:
    file = compose()
    jsonschema.validate(file, COMPOSE)
    services, volumes = file["services"], set(file["volumes"])
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= volumes
        if folder := service.get("environment", {}).get("MODEL_CACHE_DIR"):
            assert [volume.split(":")[1] for volume in service["volumes"]] == [folder]
    assert services["server"]["environment"]["HF_ENDPOINT"] == f"http://modelcache:{HTTP}"


def of_task(name: str) -> Container:
    part = next(part for part in task()["containerDefinitions"] if part["name"] == name)
    environment = {variable["name"]: variable["value"] for variable in part["environment"]}
    return Container([*part["entryPoint"], *part["command"]], environment)


def of_compose(name: str) -> Container:
    service = compose()["services"][name]
    given = {"MODEL_CACHE_TOKEN": "0123456789abcdef0123456789abcdef"}
    values = {key: interpolated(str(text), given) for key, text in service["environment"].items()}
    return Container([*service["entrypoint"], *service["command"]], values)


def interpolated(text: str, given: dict[str, str]) -> str:
    """Replaces `${NAME:-default}` and `${NAME:?message}` as Docker Compose does."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if kind == "?" and name not in given:
            raise ValueError(rest)
        return given.get(name, rest)

    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, text)


@pytest.mark.parametrize("container", [of_task, of_compose], ids=["ecs", "compose"])
def test_the_containers_start(programs: Programs, hub: Hub, tmp_path: Path, container: Any) -> None:
    """Runs prewarm to its end, then the daemon on the same volume."""
    prewarm, daemon = container("prewarm"), container("modelcache")
    for part in (prewarm, daemon):
        # The bucket of the task definition does not exist here.
        part.environment |= {"HF_ENDPOINT": hub.endpoint, "MODEL_CACHE_REMOTE": "none"}
    result = Run(programs, prewarm, tmp_path).finish()
    assert result.returncode == 0, result.stderr
    # The default, so that the daemon gets a free port.
    daemon.environment.setdefault("MODEL_CACHE_LISTEN", f"127.0.0.1:{HTTP}")
    with Run(programs, daemon, tmp_path) as run:
        run.wait_until_ok("/readyz", HTTP)
        assert run.get(f"/{MODEL}/resolve/main/model.safetensors") == (200, hub.file(MODEL))
        assert run.stop() == 0
        assert run.warnings() == []


def test_compose_names_the_missing_variable() -> None:
    token = compose()["services"]["modelcache"]["environment"]["MODEL_CACHE_TOKEN"]
    with pytest.raises(ValueError, match="openssl rand -hex 32"):
        interpolated(token, {})
