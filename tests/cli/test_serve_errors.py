"""What `serve` says when it cannot serve, in this process."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import pytest

from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.extras import install_command


class TestErrors:
    """Each is one line that says what to do, and status 2."""

    def error_of(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        assert main(["serve", *arguments]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("qwen-vl-classifier serve: ")
        assert errors.count("\n") == 1
        return errors

    def test_a_folder_that_holds_no_classifier(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = signal.getsignal(signal.SIGTERM)
        assert "no classifier.json in it" in self.error_of(capsys, str(tmp_path), "--port", "0")
        assert signal.getsignal(signal.SIGTERM) is before

    def test_a_port_that_is_taken(self, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            error = self.error_of(capsys, "claims", "--port", port)
        assert f"port {port}: cannot listen there (Address already in use)" in error

    @pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
    def test_an_address_of_another_machine(self, host: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert "cannot listen there" in self.error_of(capsys, "claims", "--host", host, "--insecure", "--port", "0")

    def test_an_open_door_without_a_key(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("QWEN_VL_CLASSIFIER_API_KEY", raising=False)
        assert "--api-key-file" in self.error_of(capsys, "claims", "--host", "0.0.0.0", "--port", "0")

    def test_a_key_file_that_is_missing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        error = self.error_of(capsys, "claims", "--port", "0", "--api-key-file", str(tmp_path / "key"))
        assert "cannot be read" in error

    def test_a_certificate_that_cannot_be_used(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "certificate.pem"
        assert "No such file" in self.error_of(capsys, "claims", "--port", "0", "--tls-certificate", str(path))
        path.write_text("no PEM")
        assert "give a certificate in PEM" in self.error_of(
            capsys, "claims", "--port", "0", "--tls-certificate", str(path)
        )
        assert "without a certificate" in self.error_of(capsys, "claims", "--port", "0", "--tls-key", str(path))

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            (("--replicas", "0"), "replicas '0': give a number above 0, or MIN:MAX such as 1:4"),
            (("--engine", "ray", "--replicas", "3:2"), "replicas '3:2': give a number above 0, or MIN:MAX"),
            (("--replicas", "2"), "--replicas 2 has no effect without engine ray"),
            (("--ray-address", "auto"), "--ray-address auto has no effect without engine ray"),
            (("--engine", "ray", "--header-timeout", "3"), "--header-timeout 3.0 has no effect with engine ray"),
            (("--engine", "ray", "--admin-key-file", "key"), "--admin-key-file key has no effect with engine ray"),
            (("--engine", "ray", "--device", "cuda:0,cuda:1"), "each replica has the one GPU that Ray gives it"),
            (("--engine", "ray", "--device", "all"), "and say how many by --replicas"),
            (
                ("--engine", "ray", "--ray-address", "127.0.0.1:1", "--port", "0"),
                "every machine listens on the same port",
            ),
            (
                ("--engine", "ray", "--ray-address", "127.0.0.1:1"),
                "no cluster can be reached there (Connection refused)",
            ),
        ],
    )
    def test_options_of_an_engine(self, options: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert why in self.error_of(capsys, "claims", *options)

    @pytest.mark.parametrize("module", ["fastapi", "uvicorn", "httptools"])
    def test_an_extra_that_is_not_installed(
        self, module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        error = self.error_of(capsys, "claims")
        assert f"{module} is not installed; run: {install_command('serve')}" in error


def test_every_option_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help-all"])
    text = capsys.readouterr().out
    for flag in ("host", "port", "api-key-file", "insecure", "max-batch", "queue-size", "deadline", "max-body-bytes"):
        assert f"--{flag}" in text
