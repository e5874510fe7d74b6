"""TLS credentials of the server.

Owns reading and checking the certificate files, and reading them again when they change, so that a
renewed certificate needs no restart. Knows nothing of ports and calls.
"""

import ssl
from pathlib import Path

import grpc
import structlog

from a2sf.errors import InvalidArgument, first_line
from service.config import files
from service.config.options import ServerOptions

log = structlog.get_logger(__name__)


class _CertificateFiles:
    """The certificate files, with their state when they were last read."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._last_stamps = self._current_stamps()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Read and check all files. Raises InvalidArgument with the flag and the file."""
        chain = files.read(self._certificate, "--tls-cert")
        key = files.read(self._key, "--tls-key")
        _check_pair(self._certificate, self._key)
        roots = None
        if self._client_ca is not None:
            roots = files.read(self._client_ca, "--tls-client-ca")
            _check_authority(self._client_ca)
        return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=roots)

    def read_if_changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new certificates, or None if nothing has changed or a new file is invalid.

        grpc calls this before each handshake, in a separate thread. None keeps the earlier ones.
        """
        stamps = self._current_stamps()
        if stamps == self._last_stamps:
            return None
        # The stamps are taken before the read, so a change during the read causes another read.
        self._last_stamps = stamps
        try:
            configuration = self.read()
        except InvalidArgument as error:
            log.error("certificates not taken, earlier ones stay", reason=str(error))  # noqa: TRY400
            return None
        log.info("certificates read again", file=str(self._certificate))
        return configuration

    def _current_stamps(self) -> tuple[tuple[int, ...] | None, ...]:
        paths = (self._certificate, self._key, self._client_ca)
        return tuple(files.stamp(path) for path in paths if path is not None)


def server_credentials(options: ServerOptions) -> grpc.ServerCredentials | None:
    """Make the credentials of all gRPC ports; None means plain text.

    Raises InvalidArgument for files that cannot be read or do not match.
    """
    if options.tls_cert is None or options.tls_key is None:
        return None
    certificates = _CertificateFiles(options.tls_cert, options.tls_key, options.tls_client_ca)
    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        certificates.read(),
        certificates.read_if_changed,  # type: ignore[arg-type]  # None keeps the earlier ones
        require_client_authentication=options.tls_client_ca is not None,
    )
    return credentials


def _check_pair(certificate: Path, key: Path) -> None:
    # grpc would start with invalid files, and then fail every handshake.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password argument, OpenSSL would ask for one at the terminal.
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
