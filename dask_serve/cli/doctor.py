"""`dask serve doctor`: what is wrong with a cluster as a place to serve on, and what to do."""

from __future__ import annotations

import json
from typing import Any

import click

from .connecting import Cluster, cluster_options
from .examination import Examination, Finding
from .messages import Failure, coloured, command
from .table import COLOURS

__all__ = ["doctor"]


@command(
    "doctor",
    "doctor --scheduler tls://10.0.0.1:8786 --tls-ca-file ca.pem --tls-cert me.pem --tls-key me.key",
    short_help="Say what is wrong with a cluster, and what to do.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@cluster_options
def doctor(cluster: Cluster, as_json: bool) -> None:
    """Examine a cluster: versions, ports, certificates, clocks, the state file; say what is wrong and what to do.

    The exit code is 1 if something is wrong.
    """
    examination = Examination(cluster)
    try:
        with cluster.client() as client:
            examination.run(client)
    except Failure as failure:
        what, _, repair = failure.message.partition("\n")
        examination.add("wrong", "scheduler", what, repair)
    found = examination.findings
    click.echo(_written(examination) if as_json else "\n".join(map(_line, found)))
    if any(finding.state == "wrong" for finding in found):
        raise click.exceptions.Exit(1)


def _line(finding: Finding) -> str:
    state = coloured(f"{finding.state:<6}", COLOURS.get(finding.state))
    repair = f"\n       {finding.repair}" if finding.repair else ""
    return f"{state} {finding.subject}: {finding.message}{repair}"


def _written(examination: Examination) -> str:
    plain: dict[str, Any] = {
        "well": all(finding.state != "wrong" for finding in examination.findings),
        "findings": [finding._asdict() for finding in examination.findings],
        "processes": examination.processes,
    }
    return json.dumps(plain, indent=2)
