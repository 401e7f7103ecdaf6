# SPDX-License-Identifier: Apache-2.0
"""What `/playground` serves, and what it does not."""

from __future__ import annotations

import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vtprune_server.playground import attach_playground


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    attach_playground(app)
    return TestClient(app)


def test_page_and_every_file_it_names_are_served(client: TestClient) -> None:
    page = client.get("/playground")
    assert page.headers["content-type"].startswith("text/html")
    names = set(re.findall(r'(?:src|href)="playground/([^"]+)"', page.text))
    script = client.get("/playground/app.js")
    names |= set(re.findall(r'from "\./([^"]+)"', script.text))
    assert {"app.js", "api.js", "style.css", "icon.svg"} <= names
    assert {client.get(f"/playground/{name}").status_code for name in names} == {200}


def test_nothing_is_inline_or_from_elsewhere(client: TestClient) -> None:
    page = client.get("/playground").text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page)
    assert "https:" not in page and "//" not in re.sub(r"<!--.*?-->", "", page)


@pytest.mark.parametrize("path", ["/playground", "/playground/app.js", "/playground/style.css"])
def test_content_policy_is_strict(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["img-src"] == "'self' data: blob:"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_unchanged_file_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/playground/app.js")
    again = client.get("/playground/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_address_with_a_slash_leads_to_the_page(client: TestClient) -> None:
    answer = client.get("/playground/", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "../playground")


@pytest.mark.parametrize(
    "name",
    [
        "no-such-file.js",
        "../../cli.py",
        "..%2f..%2fcli.py",
        "%2e%2e/%2e%2e/cli.py",
        "....//....//cli.py",
        "..\\..\\cli.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "app.js/../../../cli.py",
        "app.js%00.html",
    ],
)
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/playground/{name}").status_code == 404
