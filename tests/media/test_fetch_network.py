"""The real connector and resolver, on this machine only; and the guard next to the SDK's."""

from __future__ import annotations

import ast
import ipaddress
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests.media.fetching import PNG, get
from tests.media.hostile_server import World, answer, redirect
from tests.media.hostile_server import hostile_server as started
from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.media.address import BLOCKED_NETWORKS
from xicon_infer.media.fetch import fetch
from xicon_infer.media.fetch_network import (
    Network,
    connector,
    free_bytes,
    may_connect,
    pause,
    resolve,
)
from xicon_infer.media.fetch_types import FetchLimits, MediaSource
from xicon_infer.types import SilentProgress

ROOT = Path(__file__).parents[2]


def certificate(folder, name, *, days=1):
    """Writes a certificate that signs itself, and its key; returns the path of both."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


class TlsWorld(World):
    """A world in which the real connector opens the connections, to the server here."""

    authority: Path | None = None

    def _connect(self, address, port, timeout_s, server_hostname):
        self.dialled.append((address, port, server_hostname))
        real = connector(lambda: ssl.create_default_context(cafile=self.authority))
        return real("127.0.0.1", self.server.port, timeout_s, server_hostname)


@contextmanager
def tls_world(pem, *, trusted=None):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    asked = []
    context.sni_callback = lambda connection, name, _: asked.append(name)
    with started(lambda plain: context.wrap_socket(plain, server_side=True)) as server:
        world = TlsWorld(server)
        world.authority, world.asked = trusted, asked
        yield world


def test_the_certificate_is_checked_by_name(tmp_path):
    (tmp_path / "job").mkdir()
    pem = certificate(tmp_path, "cdn.example.com")
    with tls_world(pem, trusted=pem) as world:
        world.server.page("/a.png", answer(PNG))
        found = get(world, tmp_path / "job", "https://cdn.example.com/a.png")
        assert found.path.read_bytes() == PNG
        assert world.asked == ["cdn.example.com"]
        assert "Host: cdn.example.com\r\n" in world.server.requests["/a.png"][0]


@pytest.mark.parametrize("wrong", ["name", "authority", "date"])
def test_a_wrong_certificate_is_final(tmp_path, wrong):
    (tmp_path / "job").mkdir()
    name = "other.example" if wrong == "name" else "cdn.example.com"
    pem = certificate(tmp_path, name, days=-1 if wrong == "date" else 1)
    with tls_world(pem, trusted=None if wrong == "authority" else pem) as world:
        with pytest.raises(MediaError, match="certificate") as caught:
            get(world, tmp_path / "job", "https://cdn.example.com/a.png")
        assert not world.server.requests
    assert caught.value.code == "FETCH_FAILED"
    assert len(world.dialled) == 1
    assert world.waits == []
    assert "other.example" not in caught.value.message


def test_a_server_that_speaks_no_tls(tmp_path):
    (tmp_path / "job").mkdir()
    limits = FetchLimits(connect_s=0.1, retry_waits_s=())
    with started() as server, pytest.raises(MediaError, match="cannot be reached") as caught:
        get(TlsWorld(server), tmp_path / "job", "https://cdn.example.com/a.png", limits=limits)
    assert caught.value.code == "FETCH_TIMEOUT"


def test_names_of_this_machine_and_of_none():
    assert set(resolve("localhost", 5.0)) <= {"127.0.0.1", "::1"}
    assert resolve("127.0.0.1", 5.0) == ["127.0.0.1"]
    assert resolve("::1", 5.0) == ["::1"]
    for name in ("a" * 80 + ".example", "a..example"):
        with pytest.raises(socket.gaierror):
            resolve(name, 5.0)


def test_the_whole_way_with_nothing_faked(tmp_path):
    with started() as server:
        server.page("/go", redirect("/a.png"))
        server.page("/a.png", answer(PNG))
        allowed = FetchLimits(
            allow_private_urls=True, allowed_ports=(server.port,), reserve_bytes=0
        )
        source = MediaSource("url", f"http://localhost:{server.port}/go")
        found = fetch(source, "image", "image", tmp_path, allowed, progress=SilentProgress())
        assert found.path.read_bytes() == PNG
        # The same without the permission: nobody is called.
        source = MediaSource("url", f"http://localhost:{server.port}/a.png?again")
        refused = replace(allowed, allow_private_urls=False)
        with pytest.raises(InvalidRequest, match="host is not allowed"):
            fetch(source, "image", "image", tmp_path, refused, progress=SilentProgress())
        assert set(server.requests) == {"/go", "/a.png"}


def test_a_lookup_has_a_limit(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(5) and [])
    with pytest.raises(TimeoutError):
        resolve("slow.example", 0.05)
    released.set()


def test_the_rest_of_the_real_network(tmp_path):
    network = Network()
    before = network.now()
    pause(0.02, threading.Event())
    assert 0.02 <= network.now() - before < 1
    stop = threading.Event()
    stop.set()
    pause(100.0, stop)
    assert 0 < free_bytes(tmp_path) < 2**60


def test_addresses_that_may_be_dialled():
    for address in ("8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "::ffff:8.8.8.8"):
        assert may_connect(address)
    # What the standard library of some versions lets pass, and what only it knows.
    for address in ("2002:a00:1::", "fec0::1", "3fff::1", "192.88.99.1", "200::1", "fe80::1%lo"):
        assert not may_connect(address)


def samples():
    """Returns the first and last addresses of every listed network, and many others."""
    for network in BLOCKED_NETWORKS:
        yield network[0]
        yield network[-1]
    for top in range(0, 2**32, 2**20):
        yield ipaddress.IPv4Address(top + 77)
    for top in range(0, 2**16, 16):
        yield ipaddress.IPv6Address((top << 112) + 77)
        yield ipaddress.IPv6Address((0xFFFF << 32) + (top << 16) + 77)


def test_what_the_sdk_refuses_is_refused_here():
    code = (
        "import sys\n"
        "from runpod.serverless.utils.rp_ssrf import is_safe_address\n"
        "print([a for a in sys.stdin.read().split() if not is_safe_address(a)])"
    )
    pytest.importorskip("runpod")
    asked = "\n".join(str(address) for address in samples())
    out = subprocess.run(
        [sys.executable, "-c", code], input=asked, capture_output=True, text=True, check=True
    )
    refused = ast.literal_eval(out.stdout)
    assert len(refused) > 500
    assert [address for address in refused if may_connect(address)] == []


def test_fetching_needs_no_sdk():
    code = (
        "import sys\nsys.modules['runpod'] = None\nsys.modules['requests'] = None\n"
        "import xicon_infer.media.fetch\nprint('torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "False"
