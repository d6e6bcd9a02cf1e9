"""Options of `serve`."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from dataclasses import dataclass, field

from qwen_vl_classifier.config.device_lists import ONE_PROCESS_EACH, listed_devices
from qwen_vl_classifier.config.fields import (
    DEVICES,
    GREY_BITS_HELP,
    MODEL_HELP,
    URL_HOSTS_HELP,
    check_choices,
    check_not_negative,
    check_positive,
    option,
    split_list,
    without_effect,
)
from qwen_vl_classifier.config.spelling import named, spelled
from qwen_vl_classifier.errors import ConfigError

LOG_FORMATS = ("auto", "text", "json")

SERVE_ENGINES = ("local", "ray")
"""What runs the service: processes of this machine, or Ray Serve."""

SERVE_FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "HEIC")
"""The formats that can be accepted; HEIC with the extra `heic`."""

_DEVICES_OF_RAY = ("auto", "cpu", "cuda")

_HOST_NAME = re.compile(r"\[[0-9a-f:.]+\]|[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?", re.IGNORECASE | re.ASCII)

API_KEY_VARIABLE = "QWEN_VL_CLASSIFIER_API_KEY"  # the name of a variable, not a key
"""Where `serve` looks for its key if no file is named."""

ADMIN_KEY_VARIABLE = "QWEN_VL_CLASSIFIER_ADMIN_KEY"  # the same
"""Where `serve` looks for the key of those who change what is served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Options of serving classifiers over HTTP.

    Attributes:
        classifiers: Folders of saved classifiers; each is served by its folder's name, and those of one backbone share
            its passes.

    Raises:
        ConfigError: A value is out of its range, or would let the whole network in.
    """

    classifiers: tuple[str, ...] = field(default=(), metadata={"flag": False})
    host: str = option("127.0.0.1", "address to listen on; one that other machines can reach needs an API key")
    port: int = option(8000, "port to listen on; 0 lets the system choose one", metavar="PORT")
    api_key_file: str = option(
        "", f"file with the clients' API key (default: the variable {API_KEY_VARIABLE})", section="access"
    )
    watch: str = option(
        "", "also serve every classifier saved in this folder, and follow changes without a restart", metavar="FOLDER"
    )
    admin_key_file: str = option(
        "",
        f"file with the key of those who may load classifiers by request (default: the variable {ADMIN_KEY_VARIABLE})",
        section="access",
        rare=True,
    )
    models_root: str = option(
        "", "folder from which classifiers may be loaded by request, beside --watch", metavar="FOLDER", rare=True
    )
    tls_certificate: str = option(
        "",
        "PEM file with the server's certificate and its chain: serve HTTPS",
        metavar="FILE",
        section="access",
        rare=True,
    )
    tls_key: str = option(
        "",
        "PEM file with the certificate's key, without a password (default: in the certificate's file)",
        metavar="FILE",
        section="access",
        rare=True,
    )
    insecure: bool = option(
        False, "allow an address that other machines can reach without an API key", section="access", rare=True
    )
    max_batch: int = option(32, "largest number of examples computed together", metavar="EXAMPLES", section="limits")
    max_batch_tokens: int = option(
        16_384,
        "most tokens computed together; a longer example is computed alone",
        metavar="TOKENS",
        section="limits",
        rare=True,
    )
    queue_size: int = option(
        256,
        "examples that may wait; when there are more, requests get status 429",
        metavar="EXAMPLES",
        section="limits",
    )
    queue_bytes: int = option(
        1_000_000_000,
        "most memory for request bodies and pictures; when more is needed, requests get status 429",
        metavar="BYTES",
        section="limits",
        rare=True,
    )
    deadline: float = option(30.0, "a request that takes longer gets status 504", metavar="SECONDS", section="limits")
    grace: float = option(
        30.0, "time to finish accepted requests, after SIGTERM", metavar="SECONDS", section="limits", rare=True
    )
    header_timeout: float = option(
        5.0, "longest time for the headers of a request to arrive", metavar="SECONDS", section="limits", rare=True
    )
    body_timeout: float = option(
        8.0,
        "longest time for the body of a request to arrive; after it, status 408",
        metavar="SECONDS",
        section="limits",
        rare=True,
    )
    max_body_bytes: int = option(32_000_000, "largest request body", metavar="BYTES", section="limits", rare=True)
    max_items: int = option(64, "most examples in one request", metavar="EXAMPLES", section="limits", rare=True)
    max_text_chars: int = option(
        8_000, "longest text of one example", metavar="CHARACTERS", section="limits", rare=True
    )
    max_example_tokens: int = option(
        20_480, "longest example, text and pictures together", metavar="TOKENS", section="limits", rare=True
    )
    max_explain_tokens: int = option(
        200_000,
        "most work for one explanation: tokens, summed over all its passes",
        metavar="TOKENS",
        section="limits",
        rare=True,
    )
    max_image_bytes: int = option(10_000_000, "largest image file", metavar="BYTES", section="pictures", rare=True)
    max_pixels: int = option(
        25_000_000,
        "largest picture, width x height, by its header",
        metavar="PIXELS",
        also="--max-image-pixels",
        section="pictures",
        rare=True,
    )
    image_formats: str = option(
        "JPEG,PNG,WebP", f"image formats to accept, out of {','.join(SERVE_FORMATS)}", section="pictures", rare=True
    )
    grey_bits: int = option(0, GREY_BITS_HELP, choices=(0, 12, 16), section="pictures", rare=True)
    decode_workers: int = option(
        2, "processes that decode pictures", metavar="PROCESSES", section="pictures", rare=True
    )
    decode_timeout: float = option(
        5.0, "longest time to decode one picture", metavar="SECONDS", section="pictures", rare=True
    )
    decode_memory: int = option(
        1_000_000_000, "most memory of one decoding process", metavar="BYTES", section="pictures", rare=True
    )
    url_hosts: str = option("", URL_HOSTS_HELP, section="pictures")
    image_root: str = option(
        "",
        "folder with pictures that requests may name by path (default: paths are refused)",
        metavar="FOLDER",
        section="pictures",
        rare=True,
    )
    allowed_hosts: str = option(
        "",
        "further host names under which clients may reach a local server, without ports",
        section="access",
        rare=True,
    )
    cors_origins: str = option(
        "", "origins whose web pages may call this server, such as https://example.org", section="access", rare=True
    )
    log_format: str = option(
        "auto", "text, json, or auto: text on a terminal and JSON elsewhere", choices=LOG_FORMATS, rare=True
    )
    max_text_tokens: int = option(
        0,
        "longest text; longer ones are refused; 0 means the longest that the model reads",
        metavar="TOKENS",
        section="limits",
        rare=True,
    )
    model: str = option("", MODEL_HELP, metavar="FOLDER", rare=True)
    device: str = option("auto", f"{DEVICES}; or {ONE_PROCESS_EACH}")
    engine: str = option(
        "local",
        "what runs the service: this machine, or Ray Serve (extra: scale)",
        choices=SERVE_ENGINES,
        section="Ray Serve",
        rare=True,
    )
    replicas: str = option(
        "1",
        "replicas on Ray Serve, each with a GPU if there are any: a number, or MIN:MAX to follow the load",
        section="Ray Serve",
        rare=True,
    )
    ray_address: str = option(
        "",
        "deploy to the Ray cluster at this address, and return (default: Ray on this machine)",
        metavar="ADDRESS",
        section="Ray Serve",
        rare=True,
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_not_negative(self, "max_text_tokens")
        check_positive(
            self,
            *("max_batch", "max_batch_tokens", "queue_size", "queue_bytes", "deadline", "grace", "header_timeout"),
            *("body_timeout", "max_body_bytes", "max_items", "max_text_chars", "max_image_bytes", "max_pixels"),
            *("max_example_tokens", "max_explain_tokens"),
            *("decode_workers", "decode_timeout", "decode_memory"),
        )
        for name in ("deadline", "grace", "header_timeout", "body_timeout", "decode_timeout"):
            if getattr(self, name) == math.inf:
                raise ConfigError(f"{named(name)} inf: give a number of seconds, so that nothing can wait forever")
        if self.tls_key and not self.tls_certificate:
            raise ConfigError(
                f"{named('tls_key')} {self.tls_key}: given without a certificate; give {named('tls_certificate')} too"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"{named('port')} {self.port}: give 0 to 65535")
        if self.models_root and not (self.admin_key_file or os.environ.get(ADMIN_KEY_VARIABLE)):
            raise ConfigError(
                f"{named('models_root')} {self.models_root}: given without an admin key, and nobody could load "
                f"anything from it; give --admin-key-file or {ADMIN_KEY_VARIABLE}"
            )
        listed_devices(self.device)
        self._check_engine()
        _ = self.formats
        self._check_hosts()
        has_key = self.api_key_file or os.environ.get(API_KEY_VARIABLE)
        if not (has_key or self.insecure or is_loopback(self.host)):
            raise ConfigError(
                f"{named('host')} {self.host!r} can be reached from other machines, and there is no API key; "
                f"give --api-key-file or {API_KEY_VARIABLE}, listen on 127.0.0.1, or pass --insecure if a proxy "
                "authenticates callers"
            )

    @property
    def replica_bounds(self) -> tuple[int, int]:
        """The fewest and the most replicas on Ray Serve."""
        low, separator, high = self.replicas.partition(":")
        try:
            fewest, most = int(low), int(high if separator else low)
        except ValueError:
            fewest, most = 0, 0
        if not 0 < fewest <= most:
            raise ConfigError(f"{named('replicas')} {self.replicas!r}: give a number above 0, or MIN:MAX such as 1:4")
        return fewest, most

    def _check_engine(self) -> None:
        """Refuse options that the engine would ignore."""
        _ = self.replica_bounds
        if self.engine == "local":
            ignored = without_effect(self, "without engine ray", "replicas", "ray_address")
        else:
            # Ray's own proxy reads the headers; what one replica loads by request, the others would lack.
            names = ("header_timeout", "admin_key_file", "models_root")
            ignored = without_effect(self, "with engine ray; leave it out", *names)
            if self.ray_address and not self.port:
                raise ConfigError(
                    f"{named('port')} 0: with a cluster, every machine listens on the same port; give its number"
                )
            if self.device not in _DEVICES_OF_RAY:
                raise ConfigError(
                    f"{named('device')} {self.device!r}: with engine ray each replica has the one GPU that Ray gives "
                    f"it; give {', '.join(_DEVICES_OF_RAY)}, and say how many by {spelled('replicas')}"
                )
        if ignored:
            raise ConfigError(ignored[0])

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats to accept, spelled as messages do."""
        known = {name.lower(): name for name in SERVE_FORMATS}
        names = [name.lower() for name in self.names_of("image_formats")]
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"{named('image_formats')} {self.image_formats!r}: give some of {', '.join(SERVE_FORMATS)}"
                )
        if not names:
            raise ConfigError(f"{named('image_formats')} is empty: give some of {', '.join(SERVE_FORMATS)}")
        return tuple(dict.fromkeys(known[name] for name in names))

    def _check_hosts(self) -> None:
        """Refuse names that no client would ever send in the header Host."""
        for listed in ("allowed_hosts", "url_hosts", "cors_origins"):
            if getattr(self, listed) and not self.names_of(listed):
                raise ConfigError(
                    f"{named(listed)} {getattr(self, listed)!r}: names none; give names with commas, or nothing"
                )
        for name in self.names_of("allowed_hosts"):
            if not _HOST_NAME.fullmatch(name):
                raise ConfigError(
                    f"{named('allowed_hosts')} {name!r}: not the name of a host alone; give it without scheme, port, "
                    "path or wildcard, such as box.example.org or [2001:db8::1]"
                )

    def names_of(self, option: str) -> tuple[str, ...]:
        """Return the parts of an option that is a list with commas, such as `url_hosts`."""
        return split_list(getattr(self, option))


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address; of names, `localhost` alone is known to be such."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
