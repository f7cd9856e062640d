"""Fixtures that several test files share."""

import functools
import os
import signal
import urllib.request

import pytest


def pytest_configure():
    """What starts the tests in the background (``nohup``, some CI) ignores Ctrl-C, and every process here would too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def stations(tmp_path_factory):
    from way import stations

    return stations(tmp_path_factory.mktemp("stations"))


@pytest.fixture(scope="session")
def server():
    from bucket import NAME, Store, serving

    store = Store()
    with serving(store) as url:
        store.url = url
        urllib.request.urlopen(f"{url}/{NAME}?list-type=2").close()  # the first takes long: moto imports on demand
        yield store


@pytest.fixture
def store(server, monkeypatch):
    import botocore.session

    server.begin()
    monkeypatch.setattr(botocore.session, "create_loader", _loader())
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, f"canary5170{name}")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    return server


@functools.cache
def _loader():
    """One for all clients: else each reads 1 MB of JSON, half of the tests' time."""
    import botocore.session

    return functools.cache(botocore.session.create_loader)
