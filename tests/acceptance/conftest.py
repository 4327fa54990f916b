"""One cluster of real processes for all tests of a test process."""

import os
from collections.abc import Iterator

import pytest

from tests.acceptance.cluster import Cluster


@pytest.fixture(scope="session")
def whole_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    with Cluster.fresh(tmp_path_factory.mktemp("cluster"), number % 8) as cluster:
        yield cluster


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    """Everything runs when the test begins, whatever the one before it killed."""
    whole_cluster.start_all()
    yield whole_cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and cluster is not None:
        report.sections.append(("Logs of the cluster", cluster.tails()))
    return report
