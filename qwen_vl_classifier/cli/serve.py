"""`serve`: answer requests over HTTP until told to stop."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys

from qwen_vl_classifier.cli.flags import VerbParser, add_flags, from_flags
from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.errors import ConfigError, QwenVLClassifierError
from qwen_vl_classifier.extras import require

EXIT_FAILURE = 1
"""The status when the server failed, or cut requests off, for whoever starts it again."""


def add_parser(verbs: argparse._SubParsersAction[VerbParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "serve",
        help="serve saved classifiers over HTTP",
        description="Serve saved classifiers over HTTP; / is a page to try them, /docs describes the interface. "
        "Classifiers that share a backbone share its passes. SIGTERM or SIGHUP finishes what was accepted, then exits "
        "with 0; a second one exits at once.",
        usage="%(prog)s CLASSIFIER [CLASSIFIER ...] [options]",
    )
    parser.add_argument(
        "classifiers", nargs="+", metavar="CLASSIFIER", help="folder of a saved classifier, served by its name"
    )
    add_flags(parser, ServeConfig)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Serve until SIGTERM or an interrupt; print the address once health checks are answered, and again once ready."""
    config = from_flags(ServeConfig, flags, classifiers=tuple(flags.classifiers))
    for module in ("fastapi", "uvicorn", "httptools"):
        require(module, extra="serve")

    from qwen_vl_classifier.serving.app import create_app
    from qwen_vl_classifier.serving.http.server import Server
    from qwen_vl_classifier.serving.observability import logging_to_stderr

    with logging_to_stderr(config.log_format), _listening(config.host, config.port) as listener:
        host, port = listener.getsockname()[:2]
        server = Server(config, listener)
        url = f"{'https' if config.tls_certificate else 'http'}://{_in_url(host)}:{port}"

        def tell(what: str) -> None:
            with contextlib.suppress(OSError):  # nobody may read it any more
                print(f"{what} {', '.join(app.state.service.names)} at {url}", flush=True)

        app = create_app(config, on_ready=lambda: tell("serving"), on_failure=server.fail)

        try:
            return server.run(app, announce=lambda: tell("loading"))
        except QwenVLClassifierError:
            raise
        except Exception as error:
            # The log has the traceback; this line is for a person who looks at the end of it.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"qwen-vl-classifier serve: the server failed ({reason}); its log says more", file=sys.stderr)
            return EXIT_FAILURE


def _listening(host: str, port: int) -> socket.socket:
    """Bind the address, so that one which is not free is an error of one line.

    Raises:
        ConfigError: It cannot be taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, dualstack_ipv6=both)
    except OSError as error:
        # The text of an error number of the system, without what `create_server` adds; names have numbers of their own.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror
        raise ConfigError(
            f"host {host!r}, port {port}: cannot listen there ({reason}); give an address of this machine and a port "
            "that is free"
        ) from None


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
