"""What a trainer publishes: the files of the codec, made with one copy of the weights in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch

from learner.trainer.publish import Publisher, parameters_digest, to_weights
from protocols.delta import write_delta
from protocols.messages import Publish
from protocols.weights import WeightDtype, Weights, file_digest, read_keyframe, weights_digest

Parameters = dict[str, torch.nn.Parameter]


def model(elements: int) -> Parameters:
    """A large tensor and some small ones, of which one is empty and one a scalar."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"embed": (elements // 2, 1), "layer": (elements // 4, 2), "norm": (7,), "none": (0, 3), "scale": ()}
    return {name: torch.nn.Parameter(0.02 * torch.randn(size, generator=draw)) for name, size in sizes.items()}


def step(parameters: Parameters, rate: float) -> None:
    """Move every weight by up to `rate`."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(rate * (2 * torch.rand(parameter.shape, generator=draw) - 1))


def kinds(message: Publish) -> list[str]:
    return [item.kind for item in message.objects]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deltas_and_folds_are_those_of_the_whole_weights_however_they_are_cut(
    tmp_path: Path, dtype: WeightDtype, threads: int
) -> None:
    parameters = model(6000)
    publisher = Publisher(tmp_path / "run", dtype=dtype, keyframe_every=3, threads=threads, part_elements=1000)
    seen: list[Weights] = []
    for version in range(4):
        message = publisher.publish(parameters, version=version)
        seen.append(to_weights(parameters, dtype))
        assert message.digest == weights_digest(seen[-1]) == parameters_digest(parameters, dtype)
        assert kinds(message) == [["keyframe"], ["delta"], ["delta", "fold"], ["keyframe"]][version]
        for item in message.objects:
            assert file_digest(tmp_path / "run" / item.name) == item.digest
            if item.kind == "keyframe":
                assert weights_digest(read_keyframe(tmp_path / "run" / item.name)) == message.digest
            else:
                assert item.base is not None
                expected = write_delta(
                    tmp_path / item.name,
                    seen[item.base],
                    seen[version],
                    base_version=item.base,
                    version=version,
                    kind=item.kind,
                    part_elements=1000,
                )
                assert item == expected
        step(parameters, 1e-7)


@pytest.mark.parametrize("threads", [1, 2])
def test_one_copy_of_the_weights_is_kept_and_none_made(tmp_path: Path, threads: int) -> None:
    parameters = model(2**22)
    copy_bytes, part_bytes = 2 * 2**22, 2 * 2**16
    publisher = Publisher(tmp_path, dtype="bfloat16", keyframe_every=4, threads=threads, part_elements=2**16)
    peaks: list[int] = []
    published: list[list[str]] = []
    tracemalloc.start()
    try:
        for version, rate in enumerate((0, 1e-7, 1e-7, 1e-7, 1e-7, 0.1)):
            step(parameters, rate)
            tracemalloc.reset_peak()
            published.append(kinds(publisher.publish(parameters, version=version)))
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert published == [["keyframe"], ["delta"], ["delta", "fold"], ["delta", "fold"], ["keyframe"], ["keyframe"]]
    # Per thread: a part's new values and the encoder's scratch, 4 bytes an element; two parts wait their turn.
    assert max(peaks) <= copy_bytes + (4 * threads + 2) * part_bytes + 2**19


def test_weights_that_move_far_are_published_whole_until_the_next_scheduled_keyframe(tmp_path: Path) -> None:
    parameters = model(6000)
    publisher = Publisher(tmp_path, dtype="bfloat16", keyframe_every=5, part_elements=1000)
    rates = (0, 1e-7, 1.0, 1e-7, 1e-7, 1e-7, 1e-7)
    published = []
    for version, rate in enumerate(rates):
        step(parameters, rate)
        message = publisher.publish(parameters, version=version)
        published.append(kinds(message))
        assert message.digest == weights_digest(to_weights(parameters, "bfloat16"))
    whole, delta = ["keyframe"], ["delta"]
    assert published == [whole, delta, whole, whole, whole, whole, delta]
    assert len(list(tmp_path.iterdir())) == len(rates), "what was begun and did not win is gone"


def test_after_an_error_nothing_is_built_on_what_is_half_done(tmp_path: Path) -> None:
    parameters = model(6000)
    publisher = Publisher(tmp_path, dtype="bfloat16", keyframe_every=9, part_elements=1000)
    publisher.publish(parameters, version=0)
    step(parameters, 1e-7)
    with pytest.raises(KeyError, match="norm"):
        publisher.publish({name: value for name, value in parameters.items() if name != "norm"}, version=1)
    message = publisher.publish(parameters, version=1)
    assert kinds(message) == ["keyframe"]
    assert message.digest == weights_digest(to_weights(parameters, "bfloat16"))
