"""Keys for trying a federation out: a development CA, the server's certificate, and a key for each node."""

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fltac.errors import InputError
from fltac.records import CLIENT_ID
from fltac.runtime.run_directory import refuse_occupied

LOCAL = ("localhost", "127.0.0.1")
DAYS = 365
HOST = re.compile(r"[A-Za-z0-9*]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")


def write_certificates(out: Path, hosts: Sequence[str] = (), nodes: Sequence[str] = (), days: int = DAYS) -> None:
    """Writes ``ca.crt``, ``server.pem`` and their ``.key``, and for each node ``nodes/<name>.key`` and ``.pub``.

    Private keys can be read by their owner alone.

    Args:
        out: Empty or missing.
        hosts: Names and addresses under which the SuperLink is reached, besides those of this machine itself.
        nodes: Names of nodes.
        days: For which the certificates hold, from a day ago on; 0 or less makes them expired.

    Raises:
        InputError: the folder is not empty or cannot be written, or a name is none.
    """
    names = [_alternative(host) for host in dict.fromkeys((*LOCAL, *hosts))]
    for node in nodes:
        if not CLIENT_ID.fullmatch(node):
            raise InputError(f"--node: got {node!r}; allowed are up to 64 letters, digits, dots, hyphens, underscores")
    refuse_occupied(out)
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _name("fltac development CA")
    ca = (
        _certificate(authority, authority, ca_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    server = (
        _certificate(_name("fltac SuperLink"), authority, server_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    try:
        (out / "nodes").mkdir(parents=True, exist_ok=True)
        _write(out / "ca.crt", ca.public_bytes(pem))
        _write(out / "server.pem", server.public_bytes(pem))
        for name, key in (("ca", ca_key), ("server", server_key)):
            _write_private(out / f"{name}.key", _private(key, serialization.PrivateFormat.PKCS8))
        for node in dict.fromkeys(nodes):
            key = ec.generate_private_key(ec.SECP384R1())
            _write_private(out / "nodes" / f"{node}.key", _private(key, serialization.PrivateFormat.OpenSSH))
            public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
            _write(out / "nodes" / f"{node}.pub", public + b"\n")
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if len(host) > 253 or not HOST.fullmatch(host):
            raise InputError(f"--host: got {host!r}; expected a host name or an IP address") from None
        return x509.DNSName(host)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    begin = now - timedelta(days=1 if days > 0 else 2 - days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + timedelta(days=days) if days > 0 else now - timedelta(days=1 - days))
    )


def _usage(sign: bool) -> x509.KeyUsage:
    """Of a CA (it signs certificates) or of a server."""
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey, layout: serialization.PrivateFormat) -> bytes:
    return bytes(key.private_bytes(serialization.Encoding.PEM, layout, serialization.NoEncryption()))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write_private(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
