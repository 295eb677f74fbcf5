"""Names of topologies, and what is refused."""

from __future__ import annotations

import pytest

from visor_jax.errors import RequestError
from visor_jax.scale.topologies import parse_topology


@pytest.mark.parametrize(
    ("name", "chips", "devices", "hosts"),
    [
        ("v4:2x2x2", 8, 8, 2),
        ("v5e:4x4", 16, 16, 4),
        ("v5e:16x16", 256, 256, 64),
        ("v5p:4x4x4", 64, 64, 16),
        ("v6e:2x4", 8, 8, 2),
        ("tpu7x:2x2x1", 4, 8, 1),
        ("h100x8", 8, 8, 1),
        ("h200x16", 16, 16, 2),
        ("h100x8:2", 16, 16, 2),
    ],
)
def test_chips_devices_and_hosts(name: str, chips: int, devices: int, hosts: int) -> None:
    topology = parse_topology(name)
    assert (topology.chips, topology.devices, topology.hosts) == (chips, devices, hosts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v9x:4x4", "unknown chip 'v9x'; known are v4, v5e, v5p, v6e, tpu7x, h100, h200"),
        ("v5e", "expected CHIP:AxB"),
        ("v5e:4x4x4", "expected 2 axes, such as v5e:4x4"),
        ("v5p:4x4", "expected 3 axes, such as v5p:4x4x4"),
        ("v5ex4", "expected 2 axes"),
        ("h100:2x4", "expected a count, such as h100x8"),
        ("v5e:16x32", "expected 1 to 256 chips"),
        ("v5e:0x4", "expected 1 to 256 chips"),
        ("", "known are v4, v5e"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(name: str, expected: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_topology(name)
    assert str(refused.value).startswith(f"--topology={name}: ") and expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_links_follow_the_axes_that_a_collective_spans() -> None:
    torus = parse_topology("v5e:16x16")
    assert torus.gather_bandwidth(16) == 2 * torus.chip.link_bandwidth
    assert torus.gather_bandwidth(256) == 4 * torus.chip.link_bandwidth
    cluster = parse_topology("h100x16")
    assert cluster.gather_bandwidth(8) > cluster.gather_bandwidth(16) == cluster.chip.network_bandwidth


@pytest.mark.parametrize(
    ("name", "ways", "spans"),
    [("v5p:4x4x4", 64, True), ("v5p:4x4x4", 16, False), ("v5p:2x2x4", 16, False), ("v5e:16x16", 256, False)],
)
def test_shards_over_three_axes_are_known(name: str, ways: int, spans: bool) -> None:
    assert parse_topology(name).spans_three_axes(ways) is spans
