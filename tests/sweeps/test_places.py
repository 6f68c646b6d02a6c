"""How workers share a machine's threads and GPUs."""

from __future__ import annotations

from filtrun.sweeps.places import CONTEXT, Device, environment, on_devices, threads_each, visible

GB = 2**30
TOLD = "0, GPU-a, 24576\n1, GPU-b, 24576\n2, GPU-c, 81920\nno line\n"


def test_devices_are_those_the_environment_lets_through() -> None:
    assert [d.name for d in visible(TOLD, None)] == ["0", "1", "2"]
    assert visible(TOLD, "2,0") == [Device("2", 80 * GB), Device("0", 24 * GB)]
    assert [d.name for d in visible(TOLD, "GPU-b")] == ["1"] and visible(TOLD, "") == []


def test_cells_share_a_device_as_its_memory_allows() -> None:
    small, large = Device("0", 24 * GB), Device("1", 80 * GB)
    assert on_devices(4, [small, large], None) == ["0", "1"]  # nothing measured yet: one each
    assert on_devices(4, [small, large], GB) == ["0", "1", "0", "1"]
    ten = 10 * GB - CONTEXT  # with its context 10: two in 21.6, seven in 72
    assert on_devices(99, [small, large], ten) == ["0", "1"] * 2 + ["1"] * 5
    assert on_devices(9, [small], 100 * GB) == ["0"] and on_devices(1, [small, large], GB) == ["0"]


def test_threads_do_not_oversubscribe() -> None:
    assert [threads_each(n, 8) for n in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    set_ = environment(2, "3", 5, {"OMP_NUM_THREADS": "1", "HOME": "x"})
    assert (set_["OMP_NUM_THREADS"], set_["MKL_NUM_THREADS"], set_["CUDA_VISIBLE_DEVICES"]) == ("5", "5", "3")
    kept = environment(1, None, None, {"OMP_NUM_THREADS": "1"})
    assert kept["OMP_NUM_THREADS"] == "1" and "CUDA_VISIBLE_DEVICES" not in kept
