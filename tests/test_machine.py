"""`avrl.machine`: EC2's spot notice from a fake metadata service, and powering off by a fake command."""

import functools
import http.server
import socket
import threading
import time

import metadata
import pytest

from avrl import machine
from avrl.errors import ConfigError, SyncError
from avrl.machine import on_notice, power_off, require_power_off


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "POLL_S", 0.02)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # never asked


@pytest.fixture
def service(monkeypatch):
    with metadata.serving() as found:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", found.url + "/")
        yield found


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def asking():
    return [one for one in threading.enumerate() if "_ask_on" in one.name]


def test_a_notice_is_acted_on_once(service):
    acted = []
    on_notice(lambda: acted.append(1))
    until(lambda: len(service.asked) >= 4)
    assert not acted
    service.notice = metadata.NOTICE
    until(lambda: not asking())
    assert acted == [1]
    assert [one[0] for one in service.asked].count("PUT") == 1


def test_an_expired_token_is_renewed(service):
    service.uses = 2
    ended = on_notice(lambda: pytest.fail("no notice was given"))
    until(lambda: [one[0] for one in service.asked].count("PUT") >= 3)
    ended.set()
    until(lambda: not asking())
    assert ("GET", "/latest/meta-data/spot/instance-action", 401) in service.asked


@pytest.mark.parametrize("nonsense", [b"<html>", b"{}", b"[]", b'"stop"', b"\xff"])
def test_nonsense_is_no_notice(service, nonsense):
    service.notice = nonsense
    ended = on_notice(lambda: pytest.fail("no notice was given"))
    until(lambda: len(service.asked) >= 4)
    ended.set()
    until(lambda: not asking())


def test_a_service_that_falls_silent_for_a_while_is_asked_on(service):
    acted = []
    on_notice(lambda: acted.append(1))
    until(lambda: len(service.asked) >= 2)
    service.uses = service.left = -1  # every answer is an error now
    until(lambda: len(service.asked) >= 8)
    service.uses, service.notice = 10**6, metadata.NOTICE
    until(lambda: acted)


class NotAmazon(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): ...

    def do_PUT(self):
        self.send_error(405)


def test_a_service_that_is_late_at_boot_is_asked_again(service, monkeypatch):
    acted, late = [], iter([503, 503])
    monkeypatch.setattr(metadata.Handler, "do_PUT", functools.partialmethod(_late, late, metadata.Handler.do_PUT))
    service.notice = metadata.NOTICE
    on_notice(lambda: acted.append(1))
    until(lambda: not asking())
    assert acted == [1]


def _late(handler, codes, real):
    code = next(codes, None)
    return handler.say(code) if code else real(handler)


def test_elsewhere_it_gives_up_quickly_and_says_nothing(monkeypatch, caplog):
    monkeypatch.setattr(machine, "POLL_S", 0.01)
    began = time.monotonic()
    with socket.socket() as deaf, http.server.HTTPServer(("127.0.0.1", 0), NotAmazon) as other:
        deaf.bind(("127.0.0.1", 0))
        threading.Thread(target=other.handle_request).start()
        for port in (deaf.getsockname()[1], other.server_port):
            monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{port}")
            on_notice(lambda: pytest.fail("no notice was given"))
            until(lambda: not asking())
        deaf.listen(1)  # takes connections, and never answers
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        on_notice(lambda: pytest.fail("no notice was given"))
        until(lambda: not asking())
    assert time.monotonic() - began < 10
    assert not caplog.text


def test_nobody_is_asked_where_that_is_disabled(service, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    on_notice(lambda: pytest.fail("no notice was given"))
    assert not asking()
    assert not service.asked


def test_powering_off_is_a_command_that_may_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("AVRL_SHUTDOWN_COMMAND", f"touch '{tmp_path}/off now'")
    require_power_off()
    power_off()
    assert (tmp_path / "off now").exists()


@pytest.mark.parametrize("command", ["false", "/nowhere/shutdown"])
def test_a_machine_that_stays_up_is_told(monkeypatch, command):
    monkeypatch.setenv("AVRL_SHUTDOWN_COMMAND", command)
    with pytest.raises(SyncError, match="the machine stays up"):
        power_off()


@pytest.mark.parametrize("command", ["", "/nowhere/shutdown -h now"])
def test_a_command_that_is_not_there_is_told_before_the_work(monkeypatch, command):
    monkeypatch.setenv("AVRL_SHUTDOWN_COMMAND", command)
    with pytest.raises(ConfigError, match="name a command in AVRL_SHUTDOWN_COMMAND"):
        require_power_off()
