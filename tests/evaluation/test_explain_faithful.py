"""Do explanations point where they should? On scenes whose contents are known. Numbers: docs/explanation/explain.md."""

import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """The module that measures."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import explain

    return explain


def measured(
    benchmark, backbone, method: str, tap: str, *, scenes: int, training_scenes: int, draws: int, baseline=None
):
    """Measure a method on scenes of a seed that the page does not use."""
    classifier = benchmark.probe(backbone, tap, scenes=training_scenes)
    some = list(itertools.islice(benchmark.cases(20, None), scenes))
    fitting = (case for case in benchmark.cases(21, None) if benchmark.named(case[1], case[2]))
    return benchmark.measure(classifier, method, baseline, some, list(itertools.islice(fitting, scenes)), draws=draws)


@pytest.mark.soak
@pytest.mark.parametrize("method", ["gradients", "occlusion"])
def test_removing_what_a_map_marks_costs_more_than_random_squares(benchmark, tiny_backbone, method):
    found = measured(benchmark, tiny_backbone, method, "last:-1", scenes=10, training_scenes=60, draws=2)
    assert found.deletion.mean > 0.05
    assert found.weight.mean > 2


@pytest.mark.soak
@pytest.mark.parametrize("tap", ["mean:-1", "last:-1"])
@pytest.mark.parametrize("method", ["gradients", "occlusion"])
def test_the_targets_are_reached_on_a_hundred_scenes(benchmark, tiny_backbone, method, tap):
    found = measured(benchmark, tiny_backbone, method, tap, scenes=100, training_scenes=300, draws=8)
    assert found.deletion.low > 0.05
    assert found.weight.low > 2


def test_a_touched_square_is_one_that_the_thing_reaches_into(benchmark):
    thing = benchmark.Thing("circle", "red", False, 28.0, 14.0, 10.0, 0.0)
    scene = benchmark.Scene(84, 56, (255, 255, 255), (thing,))
    assert benchmark.touched(scene, thing, (2, 3)).tolist() == [[True, True, False], [False, False, False]]
