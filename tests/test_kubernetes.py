"""The manifests of examples/kubernetes: valid, consistent, and their commands and probes run here as processes.

No cluster of Kubernetes is asked.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import yaml
from distributed import Client
from distributed.cli import dask_scheduler, dask_worker
from helpers import wait_until
from processes import Processes, free_port

import dask_serve as serve
from dask_serve.cli import serve as command

kubernetes_validate = pytest.importorskip("kubernetes_validate")

MANIFESTS = Path(serve.__file__).parents[1] / "examples" / "kubernetes"
DOCUMENTS = {
    f"{path.name}-{document['kind']}-{document['metadata']['name']}": document
    for path in sorted(MANIFESTS.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
}
#: The oldest that has autoscaling/v2, policy/v1 and probes as we use them, one of the middle, and the newest known.
VERSIONS = ("1.25", "1.31", kubernetes_validate.latest_version())
COMMANDS = {"dask scheduler": dask_scheduler.main, "dask worker": dask_worker.main, "dask serve proxy": command}


def native(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what Kubernetes itself knows in a document: of the operator's kinds, the parts that it passes on."""
    if not document["apiVersion"].startswith("kubernetes.dask.org"):
        return [document]
    if document["kind"] == "DaskAutoscaler":
        return []
    spec, metadata = document["spec"], {"name": "part"}
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec[k]["spec"]}
        for k in ("scheduler", "worker")
    ]
    return [*pods, {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec["scheduler"]["service"]}]


def containers() -> dict[str, dict[str, Any]]:
    found = {}
    for name, document in DOCUMENTS.items():
        for part in native(document):
            pod = part["spec"] if part["kind"] == "Pod" else part["spec"].get("template", {}).get("spec", {})
            for container in pod.get("containers", []):
                found[f"{name}-{container['name']}"] = container
    return found


CONTAINERS = containers()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_valid(name, version):
    for part in native(DOCUMENTS[name]):
        kubernetes_validate.validate(part, version, strict=True)


def test_the_validator_finds_mistakes():
    wrong = {**DOCUMENTS["scheduler.yaml-Service-dask-scheduler"], "spec": {"port": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_selectors_find_their_pods():
    labels = [d["spec"]["template"]["metadata"]["labels"] for d in DOCUMENTS.values() if d["kind"] == "Deployment"]
    for name, document in DOCUMENTS.items():
        spec = document["spec"]
        if document["kind"] == "Deployment":
            assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"], name
        elif document["kind"] == "Service":
            assert labels.count(spec["selector"]) == 1, name
        elif document["kind"] == "PodDisruptionBudget":
            assert labels.count(spec["selector"]["matchLabels"]) == 1, name
        elif document["kind"] == "HorizontalPodAutoscaler":
            target = spec["scaleTargetRef"]
            assert any(
                d["kind"] == target["kind"] and d["metadata"]["name"] == target["name"] for d in DOCUMENTS.values()
            )


@pytest.mark.parametrize("name", CONTAINERS)
def test_commands_and_ports(name):
    container = CONTAINERS[name]
    args = container["args"]
    known = next(text for text in COMMANDS if args[: len(text.split())] == text.split())
    main, rest = COMMANDS[known], args[len(known.split()) :]
    if known == "dask serve proxy":
        main = command.get_command(click.Context(command), "proxy")
    # The preload's options belong to another command.
    rest = [arg for arg in rest if not arg.startswith(("--no-serve-http", "--serve-state"))]
    main.make_context(known, list(rest))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        for how in ("httpGet", "tcpSocket"):
            if how in container.get(kind, {}):
                assert container[kind][how]["port"] in ports, f"{kind} asks a port that is not there"
    # Each port of the container is one that its command, or its environment, opens.
    opened = {int(n) for n in re.findall(r"(?:port=|address=:)(\d+)", " ".join(args))}
    opened |= {int(e["value"]) for e in container.get("env", []) if e["name"] == "DASK_SERVE__DOOR__PORT"}
    assert set(ports.values()) == opened


def test_probes_do_not_wait_for_each_other():
    """Proxies wait for replicas, and nobody for proxies; what ends a process asks that process alone."""
    for name, container in CONTAINERS.items():
        live = container.get("livenessProbe")
        if live is not None:
            assert live["httpGet"]["path"] in {"/health", "/-/healthz"}, name
        ready = container.get("readinessProbe")
        if ready is not None and not name.startswith("proxies"):
            assert "tcpSocket" in ready, name


# -- what runs


class Pods(Processes):
    """Containers of the manifests as processes, with ports, names and paths of this machine."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.ports: dict[str, str] = {}
        #: `dask serve` where dask_serve is not installed.
        binaries = directory / "bin"
        binaries.mkdir()
        script = binaries / "dask"
        script.write_text(
            f"#!{sys.executable}\nimport sys\nif sys.argv[1:2] == ['serve']:\n"
            "    from dask_serve.cli import serve\n    serve(sys.argv[2:], prog_name='dask serve')\n"
            "from dask.cli import run_cli\nrun_cli()\n"
        )
        script.chmod(0o755)
        self.environment["PATH"] = f"{binaries}:{self.environment['PATH']}"

    def here(self, text: str) -> str:
        """Replace ports by free ones, and what Kubernetes and its volumes would provide."""
        for port in re.findall(r"(?<=port=)\d+|(?<=address=:)\d+|(?<=dask-scheduler:)\d+|^9100$", text):
            self.ports.setdefault(port, str(free_port()))
            text = text.replace(port, self.ports[port])
        text = text.replace("dask-scheduler:", "127.0.0.1:").replace("0.0.0.0", "127.0.0.1")
        return text.replace("/state/", f"{self.directory}/").replace("$(POD_NAME)", "pod-1")

    def environment_of(self, container: dict[str, Any]) -> dict[str, str]:
        given = {e["name"]: self.here(e["value"]) for e in container.get("env", []) if "value" in e}
        return {**given, "POD_NAME": "pod-1"}

    def pod(self, name: str) -> dict[str, Any]:
        [container] = [c for key, c in CONTAINERS.items() if key.startswith(f"{name}.yaml-Deployment")]
        self.start(name, *map(self.here, container["args"]), **self.environment_of(container))
        return container

    def stop(self, name: str, container: dict[str, Any]) -> str:
        """End a pod as the kubelet does, and return what its preStop hook said."""
        before = container["lifecycle"]["preStop"]["exec"]["command"]
        environment = {**self.environment, **self.environment_of(container)}
        done = subprocess.run(before, env=environment, timeout=60, check=True, capture_output=True, text=True)
        self.end(name)
        return done.stdout

    def probe(self, container: dict[str, Any], kind: str) -> int:
        """Ask as the kubelet does; 0 where nobody answers."""
        asked = container[kind]["httpGet"]
        [port] = [p["containerPort"] for p in container["ports"] if p["name"] == asked["port"]]
        try:
            return httpx.get(f"http://127.0.0.1:{self.ports[str(port)]}{asked['path']}", trust_env=False).status_code
        except httpx.TransportError:
            return 0


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Pods]:
    made = Pods(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.slow
def test_the_commands_make_a_service(pods):
    scheduler = pods.pod("scheduler")
    worker = pods.pod("workers")
    wait_until(lambda: pods.probe(scheduler, "livenessProbe") == 200, 30)
    proxy = pods.pod("proxies")
    wait_until(lambda: pods.probe(proxy, "livenessProbe") == 200, 30)
    # It lives, and nothing is there that it could answer with.
    assert pods.probe(proxy, "readinessProbe") == 503
    wait_until(lambda: pods.probe(worker, "livenessProbe") == 200, 30)

    @serve.deployment
    class App:
        async def __call__(self, request: Any) -> str:
            return "hello"

    with Client(f"tcp://127.0.0.1:{pods.ports['8786']}", set_as_default=False, timeout=30) as client:
        serve.run(App.bind(), client=client, timeout=60)
        [row] = serve.status(client=client).applications["default"].deployments["App"].replicas
        assert row.worker.endswith(f":{pods.ports['9000']}")
    wait_until(lambda: pods.probe(proxy, "readinessProbe") == 200)
    assert httpx.get(f"http://127.0.0.1:{pods.ports['8000']}/", trust_env=False).text == "hello"
    assert (pods.directory / "serve.sqlite").exists()
    # A pod of the workers is replaced: another one is there first.
    pods.start(
        "second",
        *(
            pods.here(arg).replace("pod-1", "pod-2")
            for arg in worker["args"]
            if "port=" not in arg and "address=" not in arg
        ),
        **{**pods.environment_of(worker), "DASK_SERVE__DOOR__PORT": "0"},
    )
    wait_until(lambda: "Registered to" in pods.log("second"), 30)
    assert "holds no replicas" in pods.stop("workers", worker)
    assert httpx.get(f"http://127.0.0.1:{pods.ports['8000']}/", trust_env=False).text == "hello"
    # The scheduler's pod is replaced: the application comes back from the volume.
    pods.end("scheduler")
    pods.end("second")
    assert pods.probe(proxy, "livenessProbe") == 200
    pods.pod("scheduler")
    pods.pod("workers")
    wait_until(lambda: pods.probe(proxy, "readinessProbe") == 200, 60)
    assert httpx.get(f"http://127.0.0.1:{pods.ports['8000']}/", trust_env=False).text == "hello"
    proxy["lifecycle"]["preStop"]["exec"]["command"][1] = "0"
    pods.stop("proxies", proxy)
