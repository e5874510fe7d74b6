"""Certificates: what the server shows, and whose clients it lets in.

Owns reading and checking the files, and reading them again when they change, so that a renewed
certificate needs no restart. Knows nothing of ports and calls.
"""

import ssl
from pathlib import Path

import grpc
import structlog

from a2sf.errors import InvalidArgument, first_line
from service import files
from service.options import ServerOptions

log = structlog.get_logger(__name__)


class _Files:
    """The certificate files, and how they were when they were last read."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._seen = self._stamps()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Read and check all of them. Raises InvalidArgument, naming flag and file."""
        chain = files.read(self._certificate, "--tls-cert")
        key = files.read(self._key, "--tls-key")
        _check_pair(self._certificate, self._key)
        roots = None
        if self._client_ca is not None:
            roots = files.read(self._client_ca, "--tls-client-ca")
            _check_authority(self._client_ca)
        return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=roots)

    def read_if_changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new ones; None, for what was read before, where nothing or nothing good is.

        Called by grpc before each handshake, in a thread of its own.
        """
        seen = self._stamps()
        if seen == self._seen:
            return None
        # Seen before they are read: what changes meanwhile is read once more.
        self._seen = seen
        try:
            found = self.read()
        except InvalidArgument as error:
            log.error("certificates not taken, earlier ones stay", reason=str(error))  # noqa: TRY400
            return None
        log.info("certificates read again", file=str(self._certificate))
        return found

    def _stamps(self) -> tuple[tuple[int, ...] | None, ...]:
        paths = (self._certificate, self._key, self._client_ca)
        return tuple(files.stamp(path) for path in paths if path is not None)


def server_credentials(options: ServerOptions) -> grpc.ServerCredentials | None:
    """Make the credentials of every port with gRPC; None where it is to speak plain text.

    Raises InvalidArgument for files that cannot be read or do not belong together.
    """
    if options.tls_cert is None or options.tls_key is None:
        return None
    certificates = _Files(options.tls_cert, options.tls_key, options.tls_client_ca)
    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        certificates.read(),
        certificates.read_if_changed,  # type: ignore[arg-type]  # None is for "as before"
        require_client_authentication=options.tls_client_ca is not None,
    )
    return credentials


def _check_pair(certificate: Path, key: Path) -> None:
    # grpc itself would start with any bytes, and fail every handshake.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password of ours, OpenSSL would ask for one at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidArgument(
                "--tls-key", f"{key} is not the key of the certificate {certificate}"
            ) from error
        raise InvalidArgument(
            "--tls-cert",
            f"{certificate} with --tls-key {key}: {first_line(error)}; accepted: PEM files, the "
            "key without a passphrase",
        ) from error


def _check_authority(path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise InvalidArgument(
            "--tls-client-ca", f"{path}: {first_line(error)}; accepted: a PEM file of certificates"
        ) from error
