"""Metadata of the distribution: all of it is here, ``pyproject.toml`` only configures tools."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read_version() -> str:
    """Read the version from the package's source, because importing it would need its dependencies."""
    source = (HERE / "dask_serve" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__(?:: \w+)? = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('dask_serve/__init__.py has no line of the form: __version__ = "1.2.3"')
    return found.group(1)


INSTALL = [
    "dask>=2025.9.0",
    "distributed>=2025.9.0",  # the older release that the tests run with: `make test-oldest`
    "starlette>=0.45",
    "uvicorn[standard]>=0.34",
    "msgspec>=0.19",
    "click>=8.1",
    "pyyaml>=6.0",
    "cloudpickle>=3.0",
    "tblib>=1.6",
]

EXTRAS = {
    "dashboard": ["bokeh>=3.1"],
    "examples": ["scikit-learn>=1.4", "bokeh>=3.1", "fastapi>=0.115.8", "httpx>=0.27", "pandas>=2.1", "pyarrow>=16"],
    "fastapi": ["fastapi>=0.115.8"],
    "metrics": ["prometheus-client>=0.20"],
    # What makes spans, and one way to export them.
    "otel": ["opentelemetry-sdk>=1.27", "opentelemetry-exporter-otlp-proto-http>=1.27"],
    "docs": ["mkdocs>=1.6"],
    "test": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        # Clients that people use: tests/test_clients.py. curl and Chromium are used where they are installed.
        "aiohttp>=3.10",
        "httpx>=0.27",
        "requests>=2.32",
        # Makes requests up from an OpenAPI document: tests/test_openapi.py.
        "schemathesis>=4.1",
        "jsonschema>=4.18",
        "threadpoolctl>=3.0",
        "numpy>=1.26",
        # dask.dataframe needs both.
        "pandas>=2.1",
        "pyarrow>=16",
        # examples/train_xgboost.py. Not among the extra examples: it would write over an xgboost that is there.
        'xgboost-cpu>=2.1; sys_platform == "linux"',
        # Applications that people serve: tests/test_ingress.py.
        "fastapi>=0.115.8",
        "litestar>=2.12",
        "quart>=0.20",
        "cryptography>=42",  # temporary certificates
        "prometheus-client>=0.20",
        # Grafana's own types of dashboards: tests/test_grafana.py.
        "grafana-foundation-sdk",
        # Spans: tests/test_traces.py.
        "opentelemetry-sdk>=1.27",
        "opentelemetry-exporter-otlp-proto-http>=1.27",
        "bokeh>=3.1",  # the page in Dask's dashboard
        # The manifests of examples/kubernetes: tests/test_kubernetes.py.
        "kubernetes-validate>=1.31",
        "pyyaml>=6",
        # Clusters that people serve on: tests/test_ssh.py, test_slurm.py, test_gateway.py. The Debian packages that
        # the first two need besides: `make clusters`.
        "asyncssh>=2.14",
        "dask-jobqueue>=0.9",
        'dask-gateway>=2025.4; sys_platform == "linux"',
        'dask-gateway-server[local]>=2025.4; sys_platform == "linux"',
        # A real Jupyter kernel: tests/test_notebook.py.
        "ipykernel>=6.29",
        "nbclient>=0.10",
        "nbformat>=5.10",
    ],
    "lint": ["ruff>=0.9", "mypy>=1.14", "import-linter>=2.1"],
}
# What is measured beside them, and the plot.
EXTRAS["bench"] = [*EXTRAS["fastapi"], "matplotlib>=3.8", "psutil>=5.9"]
EXTRAS["dev"] = sorted({*EXTRAS["examples"], *EXTRAS["test"], *EXTRAS["lint"]})

setup(
    name="dask-serve",
    version=read_version(),
    description="Online serving of Python models on a Dask cluster",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The dask_serve developers",
    license="BSD-3-Clause",
    keywords=["dask", "serving", "machine learning", "http", "actors"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Dask",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Internet :: WWW/HTTP :: HTTP Servers",
        "Topic :: System :: Distributed Computing",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["dask_serve", "dask_serve.*"]),
    package_data={"dask_serve": ["py.typed", "*.yaml", "document/*.json"]},
    zip_safe=False,
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"dask_cli": ["serve = dask_serve.cli:serve"]},
)
