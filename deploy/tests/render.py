"""Renders the chart, and writes the plain manifests in deploy/kubernetes from it.

`cargo xtask deploy --write` runs this file. The tests import it, and compare the files with a new rendering.
"""

from pathlib import Path
from typing import Any

import helm_python

DEPLOY = Path(__file__).resolve().parent.parent
CHART = DEPLOY / "chart"
KUBERNETES = DEPLOY / "kubernetes"
COMMAND = "cargo xtask deploy --write"
# The order in which `kubectl apply` needs the objects.
ORDER = ("serviceaccount", "secret", "configmap", "service", "networkpolicy", "daemonset", "podmonitor")
# Labels that say how an object was installed.
HELM_LABELS = ("app.kubernetes.io/managed-by:", "helm.sh/chart:")
GENERATED = f"# Rendered from deploy/chart by `{COMMAND}`; change the chart.\n"
NAMESPACE = """apiVersion: v1
kind: Namespace
metadata:
  name: modelcache
  labels:
    # The daemon mounts a folder of the node (hostPath), which the levels baseline and restricted forbid.
    pod-security.kubernetes.io/enforce: privileged
"""
TOKEN = """# The pods start when the secret with the token of the daemon exists:
#   kubectl --namespace modelcache create secret generic modelcache-token --from-literal=token="$(openssl rand -hex 32)"
"""


def render(values: dict[str, Any], name: str = "modelcache", namespace: str = "modelcache") -> dict[str, str]:
    """Returns the rendered templates by their file names without extension. Templates without output are left out."""
    with helm_python.Chart.load(CHART) as chart:
        rendered = chart.render(values, name=name, namespace=namespace)
    return {Path(path).stem: text.strip() + "\n" for path, text in rendered.items() if text.strip()}


def without_helm(text: str) -> str:
    """Returns a manifest without the labels of Helm."""
    return "".join(line for line in text.splitlines(True) if not line.strip().startswith(HELM_LABELS))


def manifests(values: dict[str, Any]) -> list[str]:
    """Returns the rendered objects, without those of KServe, in the order in which they are applied."""
    rendered = render(values)
    unknown = set(rendered) - set(ORDER) - {"NOTES", "cluster-storage-container"}
    assert not unknown, f"templates that ORDER does not list: {unknown}"
    return [without_helm(rendered[name]) for name in ORDER if name in rendered]


def plain_files() -> dict[Path, str]:
    """Returns the plain manifests by path."""
    token = {"token": {"existingSecret": "modelcache-token"}}
    kserve = {"kserve": {"storageContainer": {"enabled": True}}, "settings": {"remote": "s3://my-bucket/models"}}
    container = without_helm(render(kserve)["cluster-storage-container"])
    return {
        KUBERNETES / "modelcache.yaml": GENERATED + TOKEN + "---\n".join([NAMESPACE, *manifests(token)]),
        KUBERNETES / "cluster-storage-container.yaml": GENERATED
        + "# Lets KServe download models with modelcache. Replace the image by one that has the command `modelcache`.\n"
        + container,
    }


if __name__ == "__main__":
    for file, text in plain_files().items():
        file.write_text(text)
        print(file.relative_to(DEPLOY.parent))
