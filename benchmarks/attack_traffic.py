"""What attackers send to a server, and a probe of its health, each in a process of its own.

    python benchmarks/attack_traffic.py slow_bodies http://127.0.0.1:8000 20

The first argument is a name of `ATTACKS`, the second the server, on loopback alone; the third for how many seconds. One
line of JSON says what came back: how often each status, or for "probe" the seconds of `GET /livez`.
"""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

_LOOPBACK = "127.0.0.1"
_POST = b"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
_FORM = "multipart/form-data; boundary=b"
_PAUSE = 0.02  # of a caller that was refused or cut off, so that the attack is not on the machine's ports


class Attack:
    """Callers that do the same thing until a time is over.

    Args:
        port: Of the server, on loopback.
        seconds: How long.

    Attributes:
        statuses: How often each status came back; "cut off" where the server closed the connection.
    """

    def __init__(self, port: int, seconds: float) -> None:
        self.statuses: Counter[str] = Counter()
        self.port = port
        self._until = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """How much longer it goes on."""
        return max(0.0, self._until - time.monotonic())

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.seconds_left > 0

    def connect(self) -> socket.socket:
        """Open a connection."""
        return socket.create_connection((_LOOPBACK, self.port), timeout=60)

    def repeat(self, callers: int, call: Callable[[socket.socket], None], pause: float = _PAUSE) -> None:
        """Let so many callers open a connection, do something with it, close it, and begin again."""

        def loop() -> None:
            while self.running:
                try:
                    with self.connect() as one:
                        call(one)
                except OSError:
                    self.statuses["cut off"] += 1
                time.sleep(pause)

        threads = [threading.Thread(target=loop, daemon=True) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(self.seconds_left + 1)

    def answer(self, one: socket.socket) -> None:
        """Wait for an answer and count its status."""
        head = one.recv(65536)
        self.statuses[head.split(b" ", 2)[1].decode() if head.startswith(b"HTTP/") else "none"] += 1
        while one.recv(65536):
            pass

    def post(self, body: bytes, kind: str = "application/json", path: str = "/v1/classify") -> Callable[..., None]:
        """Return a call that sends a whole request and waits for its answer."""
        head = _POST.replace(b"/v1/classify", path.encode()) + (
            f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )

        def call(one: socket.socket) -> None:
            one.sendall(head)
            one.sendall(body)
            self.answer(one)

        return call


def slow_bodies(attack: Attack) -> None:
    """Send bodies a byte at a time."""

    def call(one: socket.socket) -> None:
        one.sendall(_POST + b"Content-Length: 100000\r\n\r\n")
        while attack.running:
            one.sendall(b" ")
            time.sleep(0.2)

    attack.repeat(300, call)


def slow_readers(attack: Attack) -> None:
    """Ask for a long document over and over on one connection, and read nothing."""

    def call(one: socket.socket) -> None:
        one.settimeout(1)
        while attack.running:
            one.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 50)

    attack.repeat(16, call)


def small_chunks(attack: Attack) -> None:
    """Send bodies in chunks of one byte."""
    block = b"1\r\na\r\n" * 5000

    def call(one: socket.socket) -> None:
        one.sendall(_POST + b"Transfer-Encoding: chunked\r\n\r\n")
        while attack.running:
            one.sendall(block)

    attack.repeat(8, call)


def explanations(attack: Attack) -> None:
    """Ask for explanations of long texts, one after the other."""
    text = " ".join(f"w{number}" for number in range(1500))
    attack.repeat(2, attack.post(json.dumps({"text": text}).encode(), path="/v1/explain"))


def padded_pictures(attack: Attack) -> None:
    """Send JPEG files that are almost all padding, three in a request."""
    stream = io.BytesIO()
    Image.new("RGB", (96, 96), "red").save(stream, "JPEG")
    file = stream.getvalue()
    padded = file[:2] + b"\xff" * 9_900_000 + file[2:]
    attack.repeat(4, attack.post(_form([padded + bytes([number]) for number in range(3)]), _FORM))


def many_scans(attack: Attack) -> None:
    """Send progressive JPEG files of 24 megapixels, three in a request."""
    noise = np.random.default_rng(0).integers(0, 255, (400, 600, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((6000, 4000)).save(stream, "JPEG", quality=20, progressive=True)
    file = stream.getvalue()
    attack.repeat(4, attack.post(_form([file + bytes([number]) for number in range(3)]), _FORM))


def many_pictures(attack: Attack) -> None:
    """Send 64 pictures of 25 megapixels in one request, again and again."""
    pictures = []
    for number in range(64):
        stream = io.BytesIO()
        picture = Image.new("P", (5000, 5000), number)
        picture.putpalette([number, number, number] * 256)
        picture.save(stream, "PNG", compress_level=1)
        pictures.append(base64.b64encode(stream.getvalue()).decode())
    body = json.dumps({"input": [{"text": "x", "image": picture} for picture in pictures]}).encode()
    attack.repeat(2, attack.post(body))


def blanks_in_base64(attack: Attack) -> None:
    """Send 30 MB of base64 with a blank after every two characters."""
    body = b'{"input":[{"text":"a","image":"' + b"AB " * 10_000_000 + b'"}]}'
    attack.repeat(2, attack.post(body))


def unknown_fields(attack: Attack) -> None:
    """Send objects with 280,000 fields that are not known."""
    fields = ",".join(f'"k{number}":1' for number in range(280_000))
    attack.repeat(2, attack.post(f'{{"input":[{{"text":"a"}}],{fields}}}'.encode()))


def bursts(attack: Attack) -> None:
    """Open a thousand connections, ask once on each at the same moment, and begin again."""
    body = json.dumps({"input": [{"text": "a b"}]}).encode()
    request = _POST + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    while attack.running:
        sockets = [attack.connect() for _ in range(1000)]
        for one in sockets:
            one.sendall(request)
        for one in sockets:
            with one:
                try:
                    attack.answer(one)
                except OSError:
                    attack.statuses["cut off"] += 1


ATTACKS: dict[str, Callable[[Attack], None]] = {
    call.__name__: call
    for call in (
        slow_bodies,
        slow_readers,
        small_chunks,
        explanations,
        padded_pictures,
        many_scans,
        many_pictures,
        blanks_in_base64,
        unknown_fields,
        bursts,
    )
}


def mixed(attack: Attack) -> None:
    """Change from one attack to another at random, every few seconds."""
    choice = random.Random(0)  # noqa: S311  # of a benchmark, not of a key
    while attack.running:
        left = attack.seconds_left
        part = Attack(attack.port, min(left, choice.uniform(2, 10)))
        ATTACKS[choice.choice(list(ATTACKS))](part)
        attack.statuses += part.statuses


def probe(port: int, seconds: float) -> list[float]:
    """Ask `/livez` twenty times a second, on a connection each; return the seconds that each answer took."""
    taken = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        started = time.perf_counter()
        with socket.create_connection((_LOOPBACK, port), timeout=60) as one:
            one.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            while one.recv(65536):
                pass
        taken.append(time.perf_counter() - started)
        time.sleep(0.05)
    return taken


def _form(files: list[bytes]) -> bytes:
    parts = [b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\nx\r\n']
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    parts += [head + file + b"\r\n" for file in files]
    return b"".join([*parts, b"--b--\r\n"])


def main() -> None:
    """Do what the command line says, and print what came of it as one line of JSON."""
    name, url, seconds = sys.argv[1], urlsplit(sys.argv[2]), float(sys.argv[3])
    if url.hostname != _LOOPBACK or not url.port:
        raise SystemExit(f"{sys.argv[2]}: only {_LOOPBACK} is attacked")
    outcome: Any
    if name == "probe":
        outcome = probe(url.port, seconds)
    else:
        attack = Attack(url.port, seconds)
        (mixed if name == "mixed" else ATTACKS[name])(attack)
        outcome = attack.statuses
    print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
