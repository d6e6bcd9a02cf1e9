"""URLs that lead inside, as far as people have thought of them: none gets as far as a look-up of another host."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.fetching import Fetcher
from tests.waiting import LIMIT

ALLOWED = "img.example.org"
EVIL = "127.0.0.1"

# The same few addresses in all the spellings that some library takes.
NUMBERS = [
    *("127.0.0.1", "127.1", "127.0.1", "0", "0.0.0.0", "2130706433", "017700000001", "0x7f000001", "0x7f.1"),
    *("0x7f.0.0.1", "0177.0.0.1", "0177.0.0.01", "00000177.1", "127.0.0.1.", "127.000.000.001", "0b1111111.0.0.1"),
    *("127.0.0.0x1", "6425673729", "4294967295", "-1", "1e9", "127.0.0.256", "169.254.169.254", "2852039166"),
    *("0xa9fea9fe", "0251.0376.0251.0376", "0xa9.0xfe.0xa9.0xfe", "425.510.425.510", "100.100.100.200"),
    *("192.0.0.192", "168.63.129.16", "10.0.0.1", "172.16.0.1", "192.168.0.1", "224.0.0.1", "255.255.255.255"),
    *("localhost", "localhost.localdomain", "ip6-localhost", "metadata", "metadata.google.internal", "instance-data"),
    *("kubernetes.default.svc", "127.0.0.1.nip.io", "localtest.me", "img.example.org.127.0.0.1.nip.io", "[::1]"),
    *("[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[fe80::1%25lo]"),
    *("[fe80::1%lo]", "[::1%25img.example.org]", "[fd00:ec2::254]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
    *("[v1.img.example.org]", "[img.example.org]", "[127.0.0.1]", "::1", "[::1"),
]
# Full-width and circled digits, other digits and other dots, which IDNA of 2003 would map.
UNICODE = [
    *("\uff11\uff12\uff17.0.0.1", "\u2460\u2461\u2466.0.0.1", "127\u30020\u30020\u30021", "127\uff0e0\uff0e0\uff0e1"),
    *("127\uff610\uff610\uff611", "\u0661\u0662\u0667.0.0.1", "\u2474.0.0.1", "\U0001d7cf\U0001d7d0\U0001d7d5.0.0.1"),
    *("\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3", "\uff4c\uff4f\uff43alhost", "loc\u0430lhost"),
    *("local\xadhost", "\u0456mg.example.org", "img.ex\u0430mple.org", "img\u3002example\u3002org"),
    *("img\uff0eexample.org", "\uff49mg.example.org", "img.example.org\u200b", "img\u200d.example.org"),
    *("\u202eimg.example.org", "img.example.\u2134rg", "\u2139mg.example.org", "img.example.org\u2024evil.org"),
    *("img.example.org\uff0fevil.org", "img.example.org\u2215evil.org", "img.example\u0301.org"),
    *("img.example.org\u2044evil.org", "evil.org\uff03.img.example.org", "evil.org\u2100img.example.org"),
    *("evil.org\ufe56img.example.org", "xn--img-example-org", "xn--mg-0cc.example.org", "img.example.org\xa0"),
    *("\ufeffimg.example.org", "img.e\u212aample.org", "\ud800.example.org", "img.example.org\udc00"),
    *("\xdf.example.org", "IMG\u0130.example.org"),
]
# Who is the host: what stands before the @, after it, before the \, after the #?
TANGLES = [
    *("{a}@{e}", "{a}:80@{e}", "{e}@{a}", "{e}:80@{a}", "{a}:pass@{e}:80", "user@{a}", "user:pass@{a}", "@{a}"),
    *(":@{a}", "{a}%40{e}", "{e}%40{a}", "{a}%00.{e}", "{a}%2f@{e}", "{e}%2f.{a}", "{e}%23.{a}", "{e}%3f.{a}"),
    *("{a}%09", "%69mg.example.org", "{e}\\@{a}", "{a}\\@{e}", "{e}\\.{a}", "{a}\\{e}", "{e}\\{a}", "{e}#@{a}"),
    *("{e}#.{a}", "{e}?@{a}", "{e}?.{a}", "{e}/@{a}", "{e}/.{a}", "{e};{a}", "{e},{a}", "{e}&{a}", "{e} {a}"),
    *("{e}\t{a}", "{e}\n{a}", "{e}\r\nHost: {a}", "{e}\x00{a}", "{a}\x00{e}", "{a} @{e}", "{a}\t@{e}", "{a}\n.{e}"),
    *(" {a}", "{a} ", "\t{a}", "{a}.{e}", "{e}.{a}.", "{a}.", "{a}..", ".{a}", "..{a}", "{a}.evil.org", "evil-{a}"),
    *("evil{a}", "{a}evil", "{a}-evil.org", "sub.{a}", "*.{a}", "example.org", "org", "", ":", ":80", "{a}:"),
    *("{a}:0", "{a}:22", "{a}:080", "{a}:00080", "{a}:+80", "{a}:-80", "{a}:8 0", "{a}:80:80", "{a}:65616"),
    *("{a}:131152", "{a}:\uff18\uff10", "{a}:\u0668\u0660", "{a}:http", "{a}:8080", "{a}:6379"),
    *("{a}:99999999999999999999", "{a}:0x50", "{a}:80@", "{a}:80%40{e}", "[{a}]:80", "{a}]", "[{a}", "{{a}}"),
    *("<{a}>", '"{a}"', "$({a})", "`{a}`", "{a}|{e}", "{a}^{e}"),
    "a" * 64 + ".{a}",
    "a." * 150 + "{a}",
]
STARTS = [
    *("file", "ftp", "ftps", "sftp", "gopher", "dict", "ldap", "ldaps", "tftp", "jar", "netdoc", "data"),
    *("javascript", "ws", "wss", "httpx", "httpss", "shttp", "unix", "http+unix", "phar", "php", "expect", "smb"),
    *("view-source", "blob", "about", "mailto", "s3", "gs", "hdfs", "git", "ssh", "telnet", "rtsp", "imap", "smtp"),
    *("pop3", "feed", "h\u0442tp", "\uff48ttp", "htt\u0440s", "0http"),
]
WHOLE = [
    *("", " ", "/", "//", "http", "http:", "http:/", "http://", "https://", "http:///", "http:////", "http:///{a}/"),
    *("http:/{a}/", "http:{a}/", "//{a}/", "///{a}", "\\\\{a}\\x", "http:\\\\{a}/", "http:/\\{a}/", "http:\\/{a}/"),
    *("http;//{a}/", "http//{a}/", " http://{a}/", "\thttp://{a}/", "\nhttp://{a}/", "ht\ttp://{a}/"),
    *("ht\ntp://{a}/", "http\t://{a}/", "http:\n//{a}/", "http://{a}/\n", "http://{a}/ x", "http://{a}/x y"),
    *("http://{a}/\r\nHost: {e}", "http://{a}/\r\n\r\nGET / HTTP/1.1", "http://{a}/\x00", "http://{a}/\x7f"),
    *("http://{a}/\x1b[2J", "http://{a}/\u2028", "http://{a}/\xa0", "http://{a}/\u3000", "http://{a}/a\\b"),
    *("http://{a}?\t", "http://{a}/#\n", "http://{a}/#\\", "http://{a}/\ud800", "\u200bhttp://{a}/"),
    *("\ufeffhttp://{a}/", "url:http://{a}/", "http://http://{a}/", "http:http://{a}/", "jar:http://{a}!/x.png"),
    *("view-source:http://{a}/", "http%3a//{a}/", "http:%2f%2f{a}/", "{a}", "{a}/x.png", "{a}:80/", "<http://{a}/>"),
    *('"http://{a}/"', "http://{e}/http://{a}/", "http://{e}//{a}/", "http://{e}?http://{a}/"),
    *("http://{e}#http://{a}/", "http://{a}:443/", "https://{a}:80/"),
    "http://{a}/" + "a" * 5000,
    "http://" + "a" * 100_000,
    "http://{a}:" + "8" * 5000 + "/",
    "http://" + "{e}@" * 1000 + "{a}/",
]


def hostile() -> list[str]:
    """Return every form once."""

    def filled(form: str) -> str:
        return form.replace("{a}", ALLOWED).replace("{e}", EVIL)

    authorities = [*NUMBERS, *UNICODE, *map(filled, TANGLES)]
    urls = [f"{scheme}://{authority}/x.png" for authority in authorities for scheme in ("http", "https")]
    urls += [f"{scheme}:{slashes}{ALLOWED}/x.png" for scheme, slashes in itertools.product(STARTS, ("//", "", "/"))]
    urls += map(filled, WHOLE)
    return list(dict.fromkeys(urls))


URLS = hostile()


def test_there_are_many() -> None:
    assert len(NUMBERS) + len(UNICODE) + len(TANGLES) + len(STARTS) + len(WHOLE) >= 200
    assert len(URLS) >= 500


@pytest.mark.parametrize(
    "hosts", [(ALLOWED,), (ALLOWED, f"{ALLOWED}:8000"), (ALLOWED, "cdn.example.org", ".cdn.example")]
)
def test_none_gets_as_far_as_a_look_up(hosts: tuple[str, ...]) -> None:
    requested: list[str] = []

    def resolve(host: str, port: int) -> Sequence[str]:
        requested.append(f"{host}:{port}")
        return []

    fetcher = Fetcher(hosts, timeout=LIMIT, resolve=resolve)
    for url in URLS:
        with pytest.raises(ImageError) as caught:
            fetcher.fetch(url)
        assert (caught.value.code, requested) == ("image_refused", []), url[:200]
        assert len(str(caught.value)) < 200
        assert not any(part in str(caught.value) for part in (ALLOWED, EVIL, "evil"))


def test_the_plain_form_does_get_there() -> None:
    requested: list[str] = []

    def resolve(host: str, port: int) -> Sequence[str]:
        requested.append(f"{host}:{port}")
        return []

    for url in (f"http://{ALLOWED}/x.png", f"HTTPS://{ALLOWED.upper()}:443/x.png#f"):
        with pytest.raises(ImageError):
            Fetcher([ALLOWED], timeout=LIMIT, resolve=resolve).fetch(url)
    assert requested == [f"{ALLOWED}:80", f"{ALLOWED}:443"]
