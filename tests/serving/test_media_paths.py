"""Pictures by path: only below one folder, however the path is spelt and whatever is put there."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from pathlib import Path

import pytest

from qwen_vl_classifier.errors import ConfigError, ImageError
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.serving.media import MediaReader, read_below
from tests.serving.media_reading import PNG, read, refusal


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of pictures, with secrets around it and traps in it."""
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    for path in ("a.png", "sub/b.png", "\u00fc.png", "two words.png", "%2e.png", "abcd", "sub/.hidden.png"):
        (root / path).write_bytes(PNG)
    for secret in ("secret.png", "pictures-secret.png", "pictures.png"):
        (tmp_path / secret).write_bytes(b"secret")
    (tmp_path / "pictures2").mkdir()
    (tmp_path / "pictures2" / "secret.png").write_bytes(b"secret")
    (root / "large.png").write_bytes(bytes(10_001))
    (root / "inside").symlink_to("sub/b.png")
    (root / "folder").symlink_to("sub")
    (root / "outside").symlink_to("../secret.png")
    (root / "above").symlink_to("..")
    (root / "./absolute").symlink_to(tmp_path / "secret.png")
    (root / "nowhere").symlink_to("../no-such-file")
    (root / "./circle").symlink_to("circle")
    (root / "./zero").symlink_to("/dev/zero")
    (root / "environment").symlink_to("/proc/self/environ")
    (root / "descriptor").symlink_to("/dev/fd/0")
    os.mkfifo(root / "./pipe")
    return root


class TestPaths:
    @pytest.mark.parametrize(
        "text",
        [
            *("a.png", "./a.png", "sub/b.png", "sub/./b.png", "sub//b.png", "\u00fc.png", "two words.png", "%2e.png"),
            *(
                "sub/.hidden.png",
                "inside",
                "folder/b.png",
                "./abcd",
                "{root}/a.png",
                "{root}/sub/b.png",
                "{root}//a.png",
            ),
            *("file://{root}/a.png", "file:{root}/a.png", "FILE://LOCALHOST{root}/a.png", "file://{root}/%61.png"),
            *("file://{root}/%C3%BC.png", "file://{root}/two%20words.png", "file://{root}/%252e.png", "{link}/a.png"),
            "file://{link}/sub/b.png",
        ],
    )
    def test_below_the_folder(self, text: str, root: Path, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(root)
        text = text.format(root=root, link=link)
        assert read(text, root=link) == PNG
        assert str(link) in text or read(text, root=root) == PNG

    def test_a_path_that_is_base64_too_is_base64(self, root: Path) -> None:
        assert read("abcd", root=root) == base64.b64decode("abcd")

    def test_a_file_that_is_too_large_or_grows(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert len(read("large.png", root=root, max_bytes=10_001)) == 10_001
        assert refusal("large.png", root=root, max_bytes=10_000).code == "image_too_large"
        status = os.stat_result((0o100644, 0, 0, 1, 0, 0, 10, 0, 0, 0))
        monkeypatch.setattr(os, "fstat", lambda _: status)
        with pytest.raises(ImageError, match="too large"):
            read_below(root, "large.png", 10_000)

    @pytest.mark.parametrize(
        ("text", "name", "target"), [("a.png", "a.png", "../secret.png"), ("sub/b.png", "sub", "..")]
    )
    def test_a_link_that_appears_while_the_path_is_opened(
        self, text: str, name: str, target: str, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (root.parent / "b.png").write_bytes(b"secret")
        look_up = Path.resolve

        def resolve(path: Path, strict: bool = False) -> Path:
            resolved = look_up(path, strict)
            if path.name == Path(text).name:  # now that it has been looked at, exchange it
                (root / name).rename(root / "moved")
                (root / name).symlink_to(target)
            return resolved

        monkeypatch.setattr(Path, "resolve", resolve)
        refusal(text, root=root)
        assert (root / text).read_bytes() == b"secret"

    def test_a_root_that_is_no_folder(self, root: Path) -> None:
        for path in (root / "a.png", root / "none"):
            with pytest.raises(ConfigError, match="is not a folder"):
                MediaReader(limits=ImageLimits(), fetcher=None, root=path)

    def test_no_descriptor_is_left_open(self, root: Path) -> None:
        there = {(status.st_dev, status.st_ino) for status in map(Path.lstat, (root, *root.parent.rglob("*")))}
        for text in (
            "a.png",
            "sub/b.png",
            "sub",
            "./pipe",
            "no.png",
            "sub/no.png",
            "a.png/b.png",
            "outside",
            "large.png",
        ):
            try:
                read_below(root, text, 1000)
            except ImageError:
                continue
        for number in os.listdir("/dev/fd"):  # noqa: PTH208  # they are numbers
            with contextlib.suppress(OSError):  # that of the folder which was being listed
                status = os.fstat(int(number))
                assert (status.st_dev, status.st_ino) not in there


# What stands for the folder above, in all the spellings that some library takes.
UP = [
    *("..", "../", ".../", "....//", "..;/", "..\\", "..%5c", "..%2f", "%2e%2e/", "%2e%2e%2f", "%2e./", ".%2e/"),
    *("..%00/", "%252e%252e/", "%252e%252e%252f", "..%252f", "%c0%ae%c0%ae/", "%c0%ae%c0%ae%c0%af", "..%c0%af"),
    *("%uff0e%uff0e/", "\uff0e\uff0e/", "..\uff0f", "..\u2215", "..\u2044", "\u2025/", "\u2024\u2024/"),
    *("\u3002\u3002/", ".\u200b./", "..\xa0/", ".. /", " ../", "../ ", "..\t/", "..\n/", "..\x00/", "\x00../"),
    *("./../", "././../", "sub/../../", "sub/..//../", "sub/%2e%2e/%2e%2e/", "no-such/../../", "a.png/../../"),
    *("above/", "above/./", "folder/../../", "folder/../", "..//", "..///", "/../", "//../", "\\..\\", "/..\\"),
    *(".\\..\\", "..\\", "..%255c", "..%u2216", "0x2e0x2e/", "&#46;&#46;/", "{up}/"),
]
WHOLE = [
    *("{above}/secret.png", "{above}//secret.png", "//{above}/secret.png", "{root}/../secret.png"),
    *("{root}/sub/../../secret.png", "{root}-secret.png", "{root}.png", "{root}2/secret.png", "{root}", "{root}/"),
    *(
        "{root}/.",
        "",
        ".",
        "./",
        "sub",
        "./sub/",
        "sub/../a.png",
        "folder",
        "outside",
        "./outside",
        "{root}/outside",
        "./absolute",
    ),
    *("nowhere", "./circle", "circle/a.png", "./zero", "environment", "descriptor", "./pipe", "{root}/pipe"),
    *("file://{root}/pipe", "a.png/", "a.png/.", "a.png//", "a.png/b.png", "inside/", "a.png\x00", "a.png\x00.jpg"),
    *("a.png%00", "a.png::$DATA", "A.PNG.", "a.png ", " a.png", "a.png\n", "a.png?x", "a.png#x", "a.png;x"),
    *("~/secret.png", "~root/x", "$HOME/x", "${HOME}/x", "%HOME%/x", "`id`", "$(id)", "|id", "*.png", "?.png"),
    *("[a].png", "{a,b}.png", "-", "--help", "./con", "./nul", "/etc/passwd", "//etc/passwd", "/etc//passwd"),
    *("/./etc/passwd", "/proc/self/environ", "/proc/self/cmdline", "/proc/self/fd/0", "/proc/self/root/etc/passwd"),
    *("/proc/self/cwd/a.png", "/proc/1/maps", "/dev/zero", "/dev/stdin", "/dev/fd/0", "/dev/tty", "/dev/mem"),
    *("/sys/kernel/notes", "/run/secrets/x", "/var/run/docker.sock", "C:\\secret.png", "C:/secret.png"),
    *("\\\\host\\share\\secret.png", "//host/share/secret.png", "\\\\?\\C:\\secret.png", "\\\\.\\pipe\\x"),
    *("file:///etc/passwd", "file:/etc/passwd", "file:etc/passwd", "file://etc/passwd", "file://host/etc/passwd"),
    *("file://127.0.0.1/etc/passwd", "file://localhost/etc/passwd", "file:////etc/passwd", "file:a.png"),
    *("file:./a.png", "file:///a.png", "file://", "file:", "file:///", "file://{root}/../secret.png"),
    *("file://{root}/%00", "file://{root}/%2e%2e/secret.png", "file://{root}/%2E%2E%2Fsecret.png"),
    *("file://{root}%2f..%2fsecret.png", "file://{root}/..%5csecret", "file://{above}/secret.png"),
    *("file://{above}/%73ecret.png", "file://x@localhost{root}/a.png", "file://localhost:80{root}/a.png"),
    *("file://%6cocalhost{root}/a.png", "file:\\\\{root}\\a.png", "file://{root}/%ff%fe.png", "file://{root}/\ud800"),
    *("fi\nle://{root}/a.png", "url:file://{root}/a.png", "file+x://{root}/a.png", "\ud800.png", "a\udcff.png"),
    *("\u0430.png", "\uff41.png", "a\u0301.png", "a.pn\u0261"),
]


class TestTraversal:
    def forms(self, root: Path) -> list[str]:
        names = {"{root}": str(root), "{above}": str(root.parent), "{up}": ".." + "/.." * 20}
        tails = ("secret.png", "pictures2/secret.png", "../" * 30 + "etc/passwd")
        forms = [start + tail for start in UP for tail in tails]
        forms += [f"{root}/{start}secret.png" for start in UP]
        forms += [f"file://{root}/{start}secret.png" for start in UP]
        forms += [*WHOLE, "a" * 300 + ".png", "a/" * 3000 + "b.png", "x" * 100_001 + ".png", "./" * 4000 + "a.png"]
        for name, value in names.items():
            forms = [form.replace(name, value) for form in forms]
        return list(dict.fromkeys(forms))

    def test_nothing_outside_is_read_and_nothing_repeated(self, root: Path) -> None:
        forms = self.forms(root)
        assert len(UP) + len(WHOLE) >= 170
        assert len(forms) >= 400
        said = set()
        for text in forms:
            with pytest.raises(ImageError) as caught:
                pytest.fail(ascii(read_below(root, text, 10_000)) + " of " + ascii(text[:200]))
            assert caught.value.code in ("image_refused", "image_missing"), ascii(text[:200])
            said.add(str(caught.value))
        assert len(said) < 10  # whole sentences, that do not depend on the text
        assert not any(word in message for message in said for word in ("secret", "etc", "proc", str(root), "a.png"))

    def test_a_reader_takes_some_for_base64_and_reads_none(self, root: Path) -> None:
        reader = MediaReader(limits=ImageLimits(), fetcher=None, root=root)

        async def work() -> list[bytes | BaseException]:
            return list(await asyncio.gather(*map(reader.read, self.forms(root)), return_exceptions=True))

        decoded = 0
        for text, outcome in zip(self.forms(root), asyncio.run(work()), strict=True):
            if isinstance(outcome, bytes):
                assert outcome == base64.b64decode(text, validate=True)
                decoded += 1
            else:
                assert isinstance(outcome, ImageError), ascii(text[:200])
        assert decoded < 10
        reader.close()

    def test_what_is_outside_cannot_be_told_from_what_is_not_there(self, root: Path) -> None:
        for there, missing in [
            ("outside", "nowhere"),
            ("../secret.png", "../no-such.png"),
            (str(root.parent / "secret.png"), str(root.parent / "no-such.png")),
            ("above/secret.png", "above/no-such.png"),
            ("/etc/passwd", "/etc/no-such-file"),
        ]:
            assert str(refusal(there, root=root)) == str(refusal(missing, root=root))
