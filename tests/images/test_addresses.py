"""Which addresses count as public: the edges of every network that does not."""

from __future__ import annotations

import ipaddress

import pytest

from qwen_vl_classifier.images.addresses import is_public

INSIDE = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.0", "100.100.100.200", "100.127.255.255"),
    *("127.0.0.1", "127.255.255.255", "169.254.0.1", "169.254.169.254", "169.254.170.2", "172.16.0.1"),
    *("172.31.255.255", "192.0.0.1", "192.0.0.192", "192.0.2.1", "192.31.196.1", "192.52.193.1", "192.88.99.1"),
    *("192.168.0.1", "192.168.255.255", "192.175.48.1", "198.18.0.1", "198.19.255.255", "198.51.100.1"),
    *("203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
    *("::", "::1", "::127.0.0.1", "::93.184.216.34", "::ffff:127.0.0.1", "::ffff:93.184.216.34", "::ffff:0:10.0.0.1"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b::5db8:d822", "64:ff9b:1::1", "100::1", "100:0:0:1::1", "2001::1", "2001:0:1::1"),
    *("2001:1::1", "2001:2::1", "2001:10::1", "2001:20::1", "2001:1ff:ffff::1", "2001:db8::1", "2002::1"),
    *("2002:7f00:1::1", "2002:a9fe:a9fe::1", "3fff::1", "3fff:fff::1", "4000::1", "5f00::1", "fc00::1"),
    *("fd00:ec2::254", "fd20:ce::254", "fdff::1", "fe80::1", "febf::1", "fec0::1", "ff02::1", "ff0e::1"),
    *("fe80::1%eth0", "2606:4700::1111%1", "2606:4700::1111%eth0"),
]
OUTSIDE = [
    *("1.1.1.1", "9.255.255.255", "11.0.0.0", "93.184.216.34", "100.63.255.255", "100.128.0.0", "126.255.255.255"),
    *("128.0.0.0", "168.63.129.15", "168.63.129.17", "169.253.255.255", "169.255.0.0", "172.15.255.255"),
    *("172.32.0.0", "191.255.255.255", "192.0.1.0", "192.167.255.255", "192.169.0.0", "198.17.255.255"),
    *("198.20.0.0", "223.255.255.255", "2001:200::1", "2001:4860:4860::8888", "2003::1", "2606:4700::1111"),
    *("2a00:1450:4001::1", "3ffe::1"),
]


@pytest.mark.parametrize("address", INSIDE)
def test_what_could_lead_inside_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", OUTSIDE)
def test_hosts_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "text",
    ["", " ", "localhost", "127.1", "0177.0.0.1", "0x7f.0.0.1", "2130706433", "1.1.1.1 ", "1.1.1.1/32", "１.1.1.1"],
)
def test_what_is_no_address_in_numbers_is_not_public(text: str) -> None:
    assert not is_public(text)


def test_python_knows_of_no_private_network_that_is_missing_here() -> None:
    networks = [
        *ipaddress.IPv4Address._constants._private_networks,
        *ipaddress.IPv6Address._constants._private_networks,
    ]
    assert len(networks) > 15
    for network in networks:
        for address in (network[0], network[-1], network[network.num_addresses // 2]):
            assert not is_public(str(address)), network
