# SPDX-License-Identifier: Apache-2.0
"""vLLM's data parallelism on one machine: two engines and two API processes behind one port."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.conftest import LiveServer
from tests.deploy.contract import only_in_test_deploy, run_contract_tests
from tests.helpers.client import chat_body, metric, post
from tests.helpers.pictures import noise

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900), only_in_test_deploy]


def test_the_contract_holds_with_two_engines(parallel: LiveServer) -> None:
    run_contract_tests(parallel.url)


def test_both_engines_work_and_metrics_are_their_sum(parallel: LiveServer) -> None:
    url = parallel.url

    def finished(engine: int) -> float:
        return metric(url, "vllm:request_success_total", f'engine="{engine}"')

    before, requests = [finished(0), finished(1)], metric(url, "vtprune_requests_total")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: post(url, chat_body(noise(seed))).status_code, range(40)))
    grown = [finished(engine) - old for engine, old in enumerate(before)]
    assert answers == [200] * 40
    assert sum(grown) == 40 and min(grown) > 0
    assert metric(url, "vtprune_requests_total") == requests + 40
    assert httpx.get(f"{url}/health").status_code == 200
