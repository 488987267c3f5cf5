"""Tests the Helm chart: the rendered objects, the values that its schema refuses, and the start of the real daemon."""

import base64
import json
import os
import random
import re
import shutil
import ssl
import subprocess
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

import kubernetes_rules as rules
from programs import ADMIN, HTTP, Container, Hub, Programs, Run, is_nearly_full, of_pod
from render import CHART, DEPLOY, render

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
# A value for each setting of the daemon that `settings` accepts.
EVERY_SETTING: dict[str, Any] = {
    "durable": True,
    "shared": "group",
    "lower_dir": "none",
    "layout": "hub",
    "extract": "auto",
    "keep_archive": True,
    "write_mode": "direct",
    "remote": {"url": "s3://models/prod", "options": {"region": "eu-west-1", "allow_http": True}},
    "s3_bucket": "",
    "require_checksum": False,
    "forbid": ["pickle", "*.pkl"],
    "on_remote_down": "fail",
    "remote_mode": "ro",
    "backfill": "never",
    "origin": ["hf://{name}@{version}"],
    "credentials": {"https://registry.example": {"bearer_env": "TOKEN"}},
    "mlflow_tracking_uri": "https://mlflow.example",
    "mlflow_registry_uri": "https://mlflow.example",
    "mlflow_local_root": "none",
    "oci_plain_http": "registry.internal:5000",
    "ref_ttl": "1h30m",
    "offline": False,
    "start_jitter": "1.5m",
    "retry_deadline": "60s",
    "read_timeout": "500ms",
    "allow_any_origin": True,
    "auth_stale": "7d",
    "log": "info,modelcache=debug",
    "log_format": "json",
}
# Settings that follow from other values of the chart.
OTHER_VALUES = {"dir", "max_bytes", "min_free_bytes", "listen", "admin_listen", "token", "tls_certificate", "tls_key"}
# Settings that the chart does not offer: a token always exists, and metrics are at /metrics.
NOT_OFFERED = {"insecure", "metrics_file"}

VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "image": {"repository": "registry.example/modelcache", "tag": "1.2.3", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}],
        "cache": {"hostPath": "/mnt/nvme/models", "maxBytes": "1.5TiB", "minFreeBytes": "50GiB"},
        "prewarm": [f"hf://{MODEL}@main", "fraud-detector@3", "models:/name/1"],
        "settings": EVERY_SETTING,
        "token": {"existingSecret": "own", "key": "a.b"},
        "hubToken": {"existingSecret": "hub"},
        "tls": {"existingSecret": "certificate"},
        "env": [{"name": "AWS_REGION", "value": "eu-west-1"}],
        "envFrom": [{"secretRef": {"name": "aws"}}],
        "volumes": [{"name": "ca", "configMap": {"name": "ca"}}],
        "volumeMounts": [{"name": "ca", "mountPath": "/ca", "readOnly": True}],
        "listenAddress": "[::]",
        "ports": {"http": 80, "admin": 81},
        "service": {"port": 443, "annotations": {"a": "b"}},
        "hostPort": {"enabled": True},
        "serviceAccount": {"name": "reader", "annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/x"}},
        # Above a million, numbers of Helm turn into 1e+06 where a template is careless.
        "runAsUser": 1000680000,
        "runAsGroup": 1000680000,
        "resources": {"requests": {"cpu": 2, "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
        "priorityClassName": "system-node-critical",
        "nodeSelector": {"pool": "gpu"},
        "affinity": {"nodeAffinity": {}},
        "tolerations": [{"operator": "Exists"}],
        "maxUnavailable": 2,
        "podAnnotations": {"a": "b"},
        "podLabels": {"team": "ml"},
        "networkPolicy": {"from": [{"podSelector": {}}], "metricsFrom": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]},
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "kserve": {"storageContainer": {"enabled": True, "env": [{"name": "AWS_REGION", "value": "eu-west-1"}]}},
    },
    "as little as possible": {
        "cache": {"prepare": {"enabled": False}, "onNodeFilesystem": False, "minFreeBytes": "5%"},
        "service": {"enabled": False},
        "serviceAccount": {"create": False},
        "networkPolicy": {"enabled": False},
        "resources": {},
        "tolerations": [],
    },
}


def objects(values: dict[str, Any], name: str = "modelcache") -> dict[str, dict[str, Any]]:
    """Returns the rendered objects by kind."""
    rendered = {key: text for key, text in render(values, name=name).items() if key != "NOTES"}
    return {item["kind"]: item for item in map(yaml.safe_load, rendered.values())}


def daemon(items: dict[str, dict[str, Any]]) -> Container:
    """Returns the container of the daemon, with the files of its ConfigMap."""
    spec = items["DaemonSet"]["spec"]["template"]["spec"]
    part = spec["containers"][0]
    encoded = items["Secret"]["data"] if "Secret" in items else {}
    secrets = {"modelcache": {key: base64.b64decode(text).decode() for key, text in encoded.items()}}
    container = of_pod(part, secrets)
    config = items["ConfigMap"]
    volume = next(volume["name"] for volume in spec["volumes"] if "configMap" in volume)
    folder = next(mount["mountPath"] for mount in part["volumeMounts"] if mount["name"] == volume)
    container.files = {f"{folder}/{name}": text for name, text in config["data"].items()}
    return container


def probe(items: dict[str, dict[str, Any]], name: str) -> tuple[str, int]:
    """Returns path and number of the port of a probe."""
    part = items["DaemonSet"]["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in part["ports"]}
    get = part[name]["httpGet"]
    return get["path"], ports[get["port"]]


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_lint_finds_nothing(values: dict[str, Any]) -> None:
    report = helm_python.lint(CHART, values, strict=True, namespace="modelcache")
    found = [message for message in report["messages"] if "icon is recommended" not in message["error"]]
    assert (found, report["errors"], report["total_charts_linted"]) == ([], [], 1)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", ["modelcache", "prod"])
def test_objects_are_valid(values: dict[str, Any], name: str) -> None:
    items = list(objects(values, name).values())
    for item in items:
        rules.validate(item)
    assert list(rules.problems(items)) == []


def test_the_objects_of_each_value_set() -> None:
    always = {"ConfigMap", "DaemonSet"}
    usual = always | {"NetworkPolicy", "Secret", "Service", "ServiceAccount"}
    assert set(objects({})) == usual
    assert set(objects(VALUES["everything"])) == usual - {"Secret"} | {"PodMonitor", "ClusterStorageContainer"}
    # A token always exists.
    assert set(objects(VALUES["as little as possible"])) == always | {"Secret"}


def test_every_value_has_an_effect() -> None:
    """Changes each value alone, both from the defaults and back to them."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(defaults) == set(schema["properties"]) - {"global"}
    # The random token of the Secret would be a difference each time.
    few = {"token": {"existingSecret": "fixed"}}
    many = VALUES["everything"] | {
        "nameOverride": "cache",
        "fullnameOverride": "cache",
        "terminationGracePeriodSeconds": 90,
    }
    other = {
        ("cache", "onNodeFilesystem"): False,
        ("cache", "prepare", "enabled"): False,
        ("cache", "prepare", "image"): "registry.example/busybox:1",
        ("hubToken", "key"): "b",
        ("service", "enabled"): False,
        ("serviceAccount", "create"): False,
        ("networkPolicy", "enabled"): False,
        ("podMonitor", "interval"): "15s",
        ("kserve", "storageContainer", "name"): "other",
        ("kserve", "storageContainer", "throughDaemon"): False,
        ("kserve", "storageContainer", "uriPrefixes"): ["hf://"],
        ("kserve", "storageContainer", "resources"): {"limits": {"memory": "2Gi"}},
    }
    without = []
    for path, default in paths(defaults):
        value = other.get(path, at(many, path))
        assert value is not None and value != default, f"a value for {'.'.join(path)} is missing here"
        # Without KServe, where the Service is needed.
        disabled = many | {"kserve": {"storageContainer": {"enabled": False}}} if path[0] == "service" else many
        if render(changed(few, path, value)) == render(few) and render(
            changed(disabled, path, value if path in other else default)
        ) == render(disabled):
            without.append(".".join(path))
    # It decides whether minFreeBytes is refused.
    assert without == ["cache.onNodeFilesystem"]


def paths(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the keys and the value of each leaf of values.yaml."""
    for name, value in values.items():
        path = (*above, name)
        is_group = isinstance(value, dict) and value and name not in {"resources"}
        yield from paths(value, path) if is_group else [(path, value)]


def at(values: dict[str, Any], path: tuple[str, ...]) -> Any:
    """Returns the value at a path; `None` if there is none."""
    for name in path:
        values = values.get(name, {})
    return values if values != {} else None


def changed(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Returns the values with another one at a path."""
    name, *below = path
    return values | {name: changed(values.get(name, {}), tuple(below), value) if below else value}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cahce": {}}, "additional properties 'cahce' not allowed"),
        ({"cache": {"maxByte": "1GB"}}, "at '/cache': additional properties 'maxByte' not allowed"),
        ({"cache": {"maxBytes": "120%"}}, "at '/cache/maxBytes'"),
        # Helm turns large numbers into floats.
        ({"cache": {"maxBytes": 100000000000}}, "at '/cache/maxBytes': got number, want string"),
        ({"cache": {"minFreeBytes": "10 percent"}}, "at '/cache/minFreeBytes'"),
        ({"cache": {"minFreeBytes": "15%"}}, "by default the kubelet evicts pods when less than 15%"),
        ({"cache": {"hostPath": "relative"}}, "at '/cache/hostPath'"),
        ({"cache": {"hostPath": "/var/../etc"}}, "at '/cache/hostPath'"),
        ({"cache": {"hostPath": "/"}}, "at '/cache/hostPath'"),
        ({"prewarm": "hf://org/model"}, "at '/prewarm': got string, want array"),
        ({"prewarm": ["org/model"]}, 'prewarm has "org/model", which is no reference: write hf://org/model@revision'),
        ({"prewarm": ["a@1 b@2"]}, "which is no reference"),
        ({"settings": {"max_bytes": "1GB"}}, "at '/settings': additional properties 'max_bytes' not allowed"),
        ({"settings": {"token": "secret"}}, "at '/settings': additional properties 'token' not allowed"),
        ({"settings": {"backfill": "sometimes"}}, "value must be one of 'wait', 'background', 'later', 'never'"),
        ({"settings": {"remote": "my-bucket"}}, "at '/settings/remote'"),
        ({"settings": {"ref_ttl": "soon"}}, "at '/settings/ref_ttl'"),
        ({"token": {"value": "secret"}}, "at '/token': additional properties 'value' not allowed"),
        ({"runAsUser": 0}, "at '/runAsUser': minimum: got 0, want 1"),
        ({"ports": {"http": 70000}}, "at '/ports/http': maximum: got 70,000, want 65,535"),
        ({"ports": {"http": 8918}}, "ports.http and ports.admin are both 8918"),
        ({"env": {"A": "b"}}, "at '/env': got object, want array"),
        ({"env": [{"name": "A", "value": 1}]}, "at '/env/0/value': got number, want string"),
        ({"resources": {"limit": {}}}, "at '/resources': additional properties 'limit' not allowed"),
        ({"tolerations": [{"operator": "Exist"}]}, "at '/tolerations/0/operator'"),
        ({"networkPolicy": {"from": []}}, "at '/networkPolicy/from': minItems: got 0, want 1"),
        ({"networkPolicy": {"from": [{}]}}, "at '/networkPolicy/from/0'"),
        ({"terminationGracePeriodSeconds": 10}, "at '/terminationGracePeriodSeconds': minimum: got 10, want 30"),
        ({"podMonitor": {"interval": 30}}, "at '/podMonitor/interval': got number, want string"),
        ({"kserve": {"storageContainer": {"uriPrefixes": ["gs://"]}}}, "at '/kserve/storageContainer/uriPrefixes/0'"),
        (
            {"kserve": {"storageContainer": {"enabled": True}}, "service": {"enabled": False}},
            "kserve.storageContainer.throughDaemon needs service.enabled",
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises((helm_python.HelmValuesError, helm_python.HelmRenderError), match=re.escape(message)):
        render(values)


def test_the_kubelet_never_evicts_because_of_a_download() -> None:
    """Default thresholds of the kubelet: nodefs 10 %, imagefs 15 %, and garbage collection of images at 85 % use."""
    config = daemon(objects({})).files["/etc/modelcache/modelcache.toml"]
    share = {name: int(value) for name, value in re.findall(r'(\w+) = "(\d+)%"', config)}
    assert share["min_free_bytes"] > max(10, 15, 100 - 85)
    assert 0 < share["max_bytes"] <= 100 - share["min_free_bytes"]
    container = objects({"kserve": {"storageContainer": {"enabled": True}}})["ClusterStorageContainer"]
    variables = of_pod(container["spec"]["container"]).environment
    assert int(variables["MODEL_CACHE_MIN_FREE_BYTES"].rstrip("%")) > 15


def test_downloads_leave_the_space_that_the_kubelet_needs(programs: Programs, tmp_path: Path) -> None:
    """Runs the daemon on a small filesystem that another pod has filled to a third, and downloads more than fits."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root and unshare (Debian: util-linux)")
    names = [f"team/model-{number}" for number in range(10)]
    for name in names:
        (tmp_path / "hub" / name).mkdir(parents=True)
        (tmp_path / "hub" / name / "model.safetensors").write_bytes(random.Random(name).randbytes(8_000_000))
    container = daemon(objects({}))
    with (
        Hub(programs, tmp_path / "hub") as hub,
        Run(programs, container, tmp_path, cache_bytes=96 << 20, HF_ENDPOINT=hub.endpoint) as run,
    ):
        run.wait_until_ok("/readyz", ADMIN)
        assert run.process
        # The filesystem is mounted for the daemon only.
        folder = Path("/proc", str(run.process.pid), "root", str(run.path("/cache")).lstrip("/"))
        (folder / "other-pod").write_bytes(bytes(32_000_000))
        for name in names:
            assert run.get(f"/{name}/resolve/main/model.safetensors") == (200, hub.file(name))
            filesystem = os.statvfs(folder)
            # A filesystem has some blocks of its own.
            assert filesystem.f_bavail / filesystem.f_blocks > 0.24
        status, body = run.get("/cache/stats", token=container.environment["MODEL_CACHE_TOKEN"])
        used = json.loads(body)["used_bytes"]
        # Models were stored, and not only passed through.
        assert status == 200 and used > 20_000_000
        assert run.stop() == 0


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_containers_have_few_rights(values: dict[str, Any]) -> None:
    pod = objects(values)["DaemonSet"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in rules.containers(pod):
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
        assert rights["capabilities"]["drop"] == ["ALL"]
        if container["name"] != "prepare":
            assert rights["runAsNonRoot"] is True and "add" not in rights["capabilities"]


def test_the_cache_is_the_folder_of_the_node() -> None:
    items = objects({})
    config = tomllib.loads(daemon(items).files["/etc/modelcache/modelcache.toml"])
    spec = items["DaemonSet"]["spec"]["template"]["spec"]
    folder = next(volume["name"] for volume in spec["volumes"] if "hostPath" in volume)
    for container in rules.containers(spec):
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts[folder] == config["dir"]
    # The example has a large user id, which a careless template writes as 1e+09.
    spec = objects(VALUES["everything"])["DaemonSet"]["spec"]["template"]["spec"]
    owner = ":".join(str(spec["securityContext"][name]) for name in ("runAsUser", "runAsGroup"))
    assert f"chown {owner} {config['dir']} &&" in spec["initContainers"][0]["command"][-1]


def test_a_token_is_made_for_each_installation() -> None:
    tokens = [daemon(objects({})).environment["MODEL_CACHE_TOKEN"] for _ in range(2)]
    assert tokens[0] != tokens[1] and all(len(token) >= 32 for token in tokens)


def test_a_change_of_the_configuration_replaces_the_pods() -> None:
    def annotations(values: dict[str, Any]) -> dict[str, str]:
        template = objects(values)["DaemonSet"]["spec"]["template"]
        found: dict[str, str] = template["metadata"]["annotations"]
        return found

    assert annotations({}) == annotations({"resources": {}})
    assert annotations({}) != annotations({"prewarm": ["a@1"]})


def test_notes_name_the_endpoint() -> None:
    assert "HF_ENDPOINT=http://modelcache.modelcache.svc:8917\n" in render({})["NOTES"]
    secure = {"tls": {"existingSecret": "x"}, "service": {"port": 443}}
    assert "HF_ENDPOINT=https://prod-modelcache.modelcache.svc:443\n" in render(secure, name="prod")["NOTES"]
    node = {"service": {"enabled": False}, "hostPort": {"enabled": True}}
    assert "HF_ENDPOINT=http://$(NODE_IP):8917\n" in render(node)["NOTES"]
    assert "kserve" not in render({})["NOTES"]
    assert "There is no remote" in render({})["NOTES"]
    assert "There is no remote" not in render({"settings": {"remote": "s3://models"}})["NOTES"]


def test_settings_are_those_of_the_product() -> None:
    page = (DEPLOY.parent / "docs/configuration.md").read_text()
    table = page.split("## Settings")[1].split("## Variables of other programs")[0]
    product = set(re.findall(r"^\| `(\w+(?:\.\w+)?)` \|", table, re.MULTILINE)) - {"remote.options"}
    schema = json.loads((CHART / "values.schema.json").read_text())
    offered = set(schema["properties"]["settings"]["properties"])
    assert offered | OTHER_VALUES | NOT_OFFERED | {"prewarm"} == product, "add the setting to values.schema.json"
    assert offered == set(EVERY_SETTING)


def test_values_in_the_documentation_are_accepted() -> None:
    page = (DEPLOY.parent / "docs/kubernetes.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        items = list(objects(yaml.safe_load(block)).values())
        assert list(rules.problems(items)) == []


def test_versions_agree() -> None:
    """The chart installs the version of this repository, and so do the files with a fixed image."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    cargo = tomllib.loads((DEPLOY.parent / "Cargo.toml").read_text())
    version = cargo["workspace"]["package"]["version"]
    assert chart["appVersion"] == version
    assert chart["kubeVersion"] == f">={rules.VERSIONS[0]}.0-0"
    files = [*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.json")]
    images = {tag for file in files for tag in re.findall(r"(?<![-\w])modelcache:(\d+\.[\w.]+)", file.read_text())}
    assert images == {version}


def test_every_setting_is_accepted_by_the_daemon(programs: Programs, tmp_path: Path) -> None:
    container = daemon(objects({"settings": EVERY_SETTING, "prewarm": ["a@1", "hf://org/model@main"]}))
    container.command.append("--check")
    run = Run(programs, container, tmp_path, TOKEN="x")
    result = run.finish()
    assert result.returncode == 0, result.stderr
    assert "ready to serve" in result.stderr


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_the_daemon_starts_and_serves(programs: Programs, hub: Hub, tmp_path: Path, secure: bool) -> None:
    values: dict[str, Any] = {
        "prewarm": [f"hf://{MODEL}@main"],
        "settings": {"ref_ttl": "30s"},
        "env": [{"name": "HF_ENDPOINT", "value": hub.endpoint}],
    }
    if secure:
        values["tls"] = {"existingSecret": "certificate"}
    items = objects(values)
    container = daemon(items)
    token = container.environment["MODEL_CACHE_TOKEN"]
    context = certificate(tmp_path / "etc/modelcache-tls") if secure else None
    with Run(programs, container, tmp_path) as run:
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            run.wait_until_ok(*probe(items, name))
        path = f"/{MODEL}/resolve/main/model.safetensors"
        if context:
            url = run.url(path).replace("http://127.0.0.1", "https://localhost")
            with urllib.request.urlopen(url, context=context) as response:
                assert response.read() == hub.file(MODEL)
        else:
            # The prewarm list is on disk, and a client of the Hub needs no token.
            assert run.get(path) == (200, hub.file(MODEL))
            # The routes of the daemon need the token; metrics are free on the other port only.
            assert run.get("/cache/stats")[0] == 401
            assert run.get("/metrics")[0] == 401
            status, body = run.get("/cache/stats", token=token)
            assert status == 200
            check_budget(json.loads(body), tmp_path)
            status, body = run.get("/cache/artifacts", token=token)
            assert status == 200 and MODEL.encode() in body
        status, body = run.get("/metrics", ADMIN)
        assert status == 200 and b"modelcache_" in body
        assert run.stop() == 0
        assert run.warnings() == []
    # The cache is where the volume is mounted.
    assert (tmp_path / "cache/artifacts").is_dir()


def check_budget(stats: dict[str, Any], folder: Path) -> None:
    """Checks that the daemon has the limits of the chart's values."""
    filesystem = os.statvfs(folder)
    size = filesystem.f_blocks * filesystem.f_frsize
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())["cache"]
    assert stats["budget_bytes"] == size // 100 * int(defaults["maxBytes"].rstrip("%"))
    if not is_nearly_full(folder):
        assert stats["min_free_bytes"] == size // 100 * int(defaults["minFreeBytes"].rstrip("%"))


def certificate(folder: Path) -> ssl.SSLContext:
    """Writes a certificate for localhost as a volume with a TLS secret has it. Returns a context that trusts it."""
    folder.mkdir(parents=True)
    files = ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(["openssl", "req", "-x509", *kind, *subject, *files], check=True, capture_output=True)
    return ssl.create_default_context(cafile=str(folder / "tls.crt"))


def test_the_folder_of_the_node_is_prepared(tmp_path: Path) -> None:
    """Runs the command of the init container as root with its capabilities only."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv (Debian: util-linux)")
    spec = objects({})["DaemonSet"]["spec"]["template"]["spec"]
    part = next(container for container in spec["initContainers"] if container["name"] == "prepare")
    added = ",".join(f"+{name.lower()}" for name in part["securityContext"]["capabilities"]["add"])
    folder = tmp_path / "cache"
    # The kubelet creates it. At the second start, it belongs to the daemon.
    folder.mkdir(mode=0o755)
    command = [word.replace("/cache", str(folder)) for word in part["command"]]
    for _ in range(2):
        subprocess.run(["setpriv", "--bounding-set", f"-all,{added}", *command], check=True)
        assert (folder.stat().st_uid, folder.stat().st_gid, folder.stat().st_mode & 0o7777) == (1000, 1000, 0o750)


def test_the_storage_container_downloads_through_the_daemon(programs: Programs, hub: Hub, tmp_path: Path) -> None:
    """Runs the storage initializer of KServe with the daemon of the same chart between it and the Hub."""
    daemon_values = {"env": [{"name": "HF_ENDPOINT", "value": hub.endpoint}]}
    items = objects({"kserve": {"storageContainer": {"enabled": True}}} | daemon_values)
    with Run(programs, daemon(items), tmp_path) as run:
        run.wait_until_ok(*probe(items, "readinessProbe"))
        container = of_pod(items["ClusterStorageContainer"]["spec"]["container"])
        assert container.environment["HF_ENDPOINT"] == f"http://modelcache.modelcache.svc:{HTTP}"
        container.command += [f"hf://{MODEL}:main", "/mnt/models"]
        result = Run(programs, container, tmp_path, HF_ENDPOINT=run.url("")).finish()
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "mnt/models/model.safetensors").read_bytes() == hub.file(MODEL)
    assert (tmp_path / "cache/artifacts").is_dir(), "the daemon has it, too"
