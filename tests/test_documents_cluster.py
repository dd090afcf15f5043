"""Documents on a cluster of `dask scheduler` and `dask worker`: started with one, changed by commands and by REST."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from distributed import Client
from helpers import http_client, wait_until

import dask_serve as serve
from dask_serve import cli
from dask_serve.controller.applying import desired
from dask_serve.document.rendering import render_desired
from dask_serve.document.validation import parse

ROOT = Path(serve.__file__).parents[1]
TOKEN = "t" * 20 + "1"

MODULE = """
import dask_serve as serve

print("this is what the module prints")

@serve.deployment
class Price:
    def __init__(self, factor):
        self.factor = factor

    def price(self, x):
        return x * self.factor

@serve.deployment
class Shop:
    def __init__(self, price):
        self.price = price

    async def __call__(self, request):
        return {"price": await self.price.price.remote(2)}

def build(factor: int = 1):
    return Shop.bind(Price.bind(factor))

@serve.deployment
def hello(request):
    return "hello"

app = hello.bind()
"""

START = """
version: 1
http:
  port: 0
applications:
  - name: first
    import_path: documented_shop:app
    route_prefix: /first
"""

SHOP = """
version: 1
applications:
  - name: shop
    import_path: documented_shop:build
    route_prefix: /shop
    args:
      factor: ${FACTOR:-3}
    deployments:
      - name: Price
        max_ongoing_requests: 5
"""


class Service:
    """The cluster, as commands and programs see it."""

    def __init__(self, directory: Path, address: str, dashboard: str) -> None:
        self.directory = directory
        self.address = address
        self.rest = http_client(f"{dashboard}/api/serve/v1")

    def put(self, document: str, token: str | None = TOKEN, **arguments: Any) -> httpx.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return self.rest.put("/applications", content=document, headers=headers, params=arguments)

    def command(self, *arguments: str, document: str = "", code: int = 0, **environment: str) -> str:
        result = CliRunner().invoke(
            cli.serve, [*arguments, "--scheduler", self.address], input=document, env=environment or None
        )
        assert result.exit_code == code, result.output
        return result.output

    def versions(self) -> dict[str, int]:
        found = self.rest.get("/applications").json()["applications"]
        return {name: application["version"] for name, application in found.items()}

    def answer(self, path: str) -> Any:
        return self.http(path).json()

    def http(self, path: str) -> httpx.Response:
        url = self.rest.get("/applications").json()["url"]
        return httpx.get(url + path, timeout=20, verify=False, trust_env=False)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A scheduler that was started with a document, and two workers, with the module beside the scheduler only."""
    directory = tmp_path_factory.mktemp("documents")
    (directory / "documented_shop.py").write_text(MODULE)
    (directory / "start.yaml").write_text(START)
    tokens = directory / "tokens"
    tokens.write_text(TOKEN)
    tokens.chmod(0o600)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "DASK_SERVE__REST__WRITES": "true",
        "DASK_SERVE__REST__TOKENS_FILE": str(tokens),
        "FACTOR": "3",
    }

    def start(*command: str, where: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *command], cwd=where, env=environment, stdout=log, stderr=log
        )

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    file = directory / "scheduler.json"
    with (directory / "log").open("wb") as log:
        scheduler = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
        options = ["--scheduler-file", str(file), "--preload", "dask_serve.preload", "--serve-config", "start.yaml"]
        processes = [start(*scheduler, *options, where=directory)]
        worker = ["worker", "--scheduler-file", str(file), "--nworkers", "2", "--nthreads", "1", "--no-dashboard"]
        processes.append(start(*worker, where=elsewhere))
        try:
            wait_until(lambda: file.exists() and file.read_text(), timeout=40)
            described = json.loads(file.read_text())
            with Client(described["address"], set_as_default=False) as client:
                dashboard = client.dashboard_link.removesuffix("/status")
            yield Service(directory, described["address"], dashboard)
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()


@pytest.fixture(autouse=True)
def here(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run where the module is."""
    monkeypatch.chdir(service.directory)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("documented_shop", None)


# -- the document that the scheduler starts with -----------------------------------------------------------------------


def test_the_scheduler_deploys_its_document(service: Service):
    def runs() -> bool:
        return service.rest.get("/applications").json()["applications"].get("first", {}).get("status") == "running"

    wait_until(runs, timeout=60)
    assert service.http("/first").text == "hello"
    # The default port is not the document's.
    status = service.rest.get("/applications").json()
    assert status["message"] == ""
    assert status["applications"]["first"]["route_prefix"] == "/first"


# -- commands ----------------------------------------------------------------------------------------------------------


def test_deploy_and_the_same_again(service: Service):
    (service.directory / "shop.yaml").write_text(SHOP)
    planned = service.command("deploy", "shop.yaml", "--dry-run")
    assert "+ application 'shop' at /shop" in planned.splitlines()
    assert planned.splitlines()[-1] == "nothing was changed"
    assert "shop" not in service.rest.get("/applications").json()["applications"]

    said = service.command("deploy", "shop.yaml")
    assert "application 'shop' is running at http://" in said
    assert "application 'shop' has version 1" in said
    assert service.answer("/shop") == {"price": 6}
    assert service.http("/first").status_code == 200

    def so_far() -> Any:
        status = service.rest.get("/applications/shop").json()
        for deployment in status["deployments"].values():
            for replica in deployment["replicas"]:
                # It is of each moment.
                del replica["memory"]
        return status

    before = so_far()
    assert "nothing has changed: all of shop.yaml was so already" in service.command("deploy", "shop.yaml")
    assert so_far() == before
    assert "nothing would change" in service.command("deploy", "shop.yaml", "--dry-run")


def test_deploy_changes_what_differs(service: Service):
    text = SHOP.replace("max_ongoing_requests: 5", "max_ongoing_requests: 6")
    said = service.command("deploy", "-", document=text)
    assert "~ deployment 'Price', in place" in said
    assert "max_ongoing_requests: 5 → 6" in said
    said = service.command("deploy", "-", document=text, FACTOR="5")
    assert "~ deployment 'Price', its replicas are replaced" in said
    assert service.answer("/shop") == {"price": 10}


def test_all_or_nothing(service: Service):
    both = SHOP.replace("factor: ${FACTOR:-3}", "factor: 7") + (
        "  - {name: second, import_path: 'documented_shop:app', route_prefix: /first}\n"
    )
    before = service.versions()
    said = service.command("deploy", "-", document=both, code=1)
    assert "nothing of standard input was deployed" in said
    assert "cannot both have route_prefix='/first'" in said
    assert service.versions() == before


def test_applications_swap_routes_in_one_change(service: Service):
    text = SHOP.replace("/shop\n", "/first\n").replace("${FACTOR:-3}", "5")
    text += "  - {name: first, import_path: 'documented_shop:app', route_prefix: /shop}\n"
    service.command("deploy", "-", document=text)
    assert service.http("/shop").text == "hello"
    assert service.answer("/first") == {"price": 10}


def test_what_is_wrong_is_told_with_its_line(service: Service):
    text = SHOP.replace("name: Price", "name: Prize")
    said = service.command("deploy", "-", document=text, code=1)
    assert "standard input has a mistake, and nothing was changed" in said
    assert "line 10: applications[0].deployments[0].name" in said
    assert "did you mean 'Price'?" in said
    said = service.command("deploy", "nowhere.yaml", code=2)
    assert "there is no file nowhere.yaml" in said
    assert "Traceback" not in said


def test_what_is_desired_is_a_document(service: Service):
    with Client(service.address, set_as_default=False) as client:
        text = render_desired(client.sync(desired, client))
    found = parse(text, environment={})
    assert {a.name: a.import_path for a in found.document.applications} == {
        "first": "documented_shop:app",
        "shop": "documented_shop:build",
    }
    assert "nothing would change" in service.command("deploy", "-", "--dry-run", document=text)


def test_build_writes_a_document_that_can_be_deployed(service: Service):
    runner = CliRunner()
    result = runner.invoke(
        cli.serve, ["build", "third=documented_shop:app", "documented_shop:build", "-o", "built.yaml"]
    )
    assert result.exit_code == 0, result.output
    text = (service.directory / "built.yaml").read_text()
    assert [(a.name, a.route_prefix) for a in parse(text).document.applications] == [
        ("third", "/third"),
        ("build", "/build"),
    ]
    again = runner.invoke(cli.serve, ["build", "documented_shop:app", "-o", "built.yaml"])
    assert again.exit_code == 2
    assert "is there already" in again.output
    assert "+ application 'third' at /third" in service.command("deploy", "built.yaml", "--dry-run")


# -- REST --------------------------------------------------------------------------------------------------------------


def test_requests_need_a_token_to_change_anything(service: Service):
    for token in (None, "u" * 20):
        answer = service.put(SHOP, token)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert service.rest.delete("/applications/first").status_code == 401
    assert service.rest.get("/applications").status_code == 200


def test_put_deploys_in_a_process_of_its_own(service: Service):
    planned = service.put(SHOP, prune="true", dry_run="true")
    assert planned.status_code == 200, planned.text
    assert "- application 'first'" in planned.json()["changes"]
    assert "versions" in planned.json()
    answer = service.put(SHOP, prune="true")
    assert answer.status_code == 200, answer.text
    assert answer.json()["deleted"] == ["first"]
    wait_until(lambda: service.http("/shop").status_code == 200 and service.answer("/shop") == {"price": 6})
    assert service.rest.get("/applications/shop").json()["owner"].count("@") == 1


def test_mistakes_come_back_as_data(service: Service):
    answer = service.put(SHOP.replace("name: Price", "name: Prize").replace("/shop", "shop"))
    assert answer.status_code == 400
    (problem,) = answer.json()["problems"]
    assert (answer.json()["type"], problem["line"], problem["field"]) == (
        "DocumentError",
        6,
        "applications[0].route_prefix",
    )
    answer = service.put('{"version": 1, "applications": [{"import_path": "no_such_module:app"}]}')
    assert answer.status_code == 400
    assert "there is no module 'no_such_module'" in answer.json()["problems"][0]["message"]
    assert service.put("a: [").json()["problems"][0]["line"] == 1
    assert service.put(SHOP, nmae="1").status_code == 400
    assert service.put("# " + "x" * 2**20).status_code == 413


def test_one_document_at_a_time(service: Service):
    slow = service.directory / "slow_module.py"
    go, began = service.directory / "go", service.directory / "began"
    slow.write_text(
        f"import pathlib, time\npathlib.Path({str(began)!r}).touch()\n"
        f"while not pathlib.Path({str(go)!r}).exists():\n    time.sleep(0.01)\n"
    )
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(service.put, "version: 1\napplications: [{import_path: 'slow_module:app'}]")
        try:
            wait_until(began.exists)
            began_at = time.monotonic()
            assert service.rest.get("/applications").status_code == 200
            second = service.put(SHOP)
            assert time.monotonic() - began_at < 5
        finally:
            go.touch()
        assert second.status_code == 409
        assert second.headers["Retry-After"]
        assert "has no attribute 'app'" in first.result().json()["message"]


def test_delete(service: Service):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert service.rest.delete("/applications/shop", headers=headers).json() == {"deleted": ["shop"]}
    gone = service.rest.delete("/applications/shop", headers=headers)
    assert gone.status_code == 404
    assert "it was deleted by REST@127.0.0.1" in gone.json()["message"]
    assert service.rest.get("/applications/shop").status_code == 404


def test_openapi_and_schema(service: Service):
    found = service.rest.get("/openapi.json").json()
    assert found["openapi"] == "3.1.0"
    assert set(found["paths"]["/api/serve/v1/applications"]) == {"get", "put"}
    text = json.dumps(found)
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in found["components"]["schemas"]
    assert service.rest.get("/schema.json").json()["title"] == "A document of dask_serve"
