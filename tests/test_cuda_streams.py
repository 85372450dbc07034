"""What the extension asks of the CUDA runtime: devices, streams, no waiting, errors. On the fake runtime, which tells."""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from helpers import run_python
from test_cuda import F32, Pair, arrays_of

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy ", "cudaMalloc ", "cudaFree ", "cudaEventQuery")
ALLOCATES = ("cudaMalloc", "cudaFree", "cudaHostAlloc")


def ones(gpu, *shape, **options):
    return gpu.array(np.ones(shape, F32), **options)


def names(gpu):
    return [call[0] for call in gpu.calls()]


def streams(gpu):
    return {call[2] for call in gpu.calls() if call[2] != "-"}


@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 0.1}, {"use_ema": True, "clipvalue": 1.0}])
def test_a_step_waits_for_nothing_and_keeps_its_tables(fake_gpu, options):
    w = [ones(fake_gpu, 20000), ones(fake_gpu, 3)]
    optimizer = fastadam.Adam(**options)
    for _seed in (1, 2):
        optimizer.apply_gradients([(ones(fake_gpu, 20000), w[0]), (ones(fake_gpu, 3), w[1])])
    gradients = [ones(fake_gpu, 20000), ones(fake_gpu, 3)]
    fake_gpu.clear_log()
    optimizer.apply_gradients(zip(gradients, w, strict=True))
    calls = fake_gpu.calls()
    assert not [
        call for call in calls if call[0].startswith(("cudaMalloc", "cudaFree", "cudaStreamSync", "cudaMemcpy"))
    ]
    assert sum(call[0] == "cudaLaunchKernelEx" for call in calls) <= 7
    assert streams(fake_gpu) == {str(fake_gpu.stream)}


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
def test_steps_on_rows_wait_for_nothing(fake_gpu, mode):
    table = ones(fake_gpu, 50, 4)
    optimizer = fastadam.Adam(sparse_update=mode, global_clipnorm=1.0)
    slices = fastadam.IndexedSlices(ones(fake_gpu, 3, 4), fake_gpu.array(np.array([1, 1, 40])))
    for _ in range(2):
        optimizer.apply_gradients([(slices, table)])
    out, ids = ones(fake_gpu, 2, 4), fake_gpu.array(np.array([1, 2]))
    optimizer.gather(table, ids, out=out)
    fake_gpu.clear_log()
    optimizer.apply_gradients([(slices, table)])
    optimizer.gather(table, ids, out=out)
    optimizer.sync()
    assert not [name for name in names(fake_gpu) if name.startswith(("cudaMalloc", "cudaFree", "cudaStreamSync"))]
    assert streams(fake_gpu) == {str(fake_gpu.stream)}


def test_other_numbers_of_indices_allocate_nothing_new(fake_gpu):
    table = ones(fake_gpu, 50, 4)
    optimizer = fastadam.Adam(global_clipnorm=1.0)

    def step(count):
        slices = fastadam.IndexedSlices(ones(fake_gpu, count, 4), fake_gpu.array(np.arange(count)))
        fake_gpu.clear_log()
        optimizer.apply_gradients([(slices, table)])
        return [name for name in names(fake_gpu) if name.startswith(("cudaMalloc", "cudaFree"))]

    step(9)
    assert [step(count) for count in (3, 7, 9, 1)] == [[], [], [], []]


def test_the_device_of_the_caller_is_restored(fake_gpu):
    fake_gpu.set_devices(2)
    stream = fake_gpu.new_stream(1)
    w = ones(fake_gpu, 4, device=1, stream=stream)
    optimizer = fastadam.Adam(0.1)
    for _ in range(2):
        optimizer.apply_gradients([(ones(fake_gpu, 4, device=1, stream=stream), w)])
    assert {call[1] for call in fake_gpu.calls("cudaLaunchKernelEx")} == {"1"}
    changes = [call[1:] for call in fake_gpu.calls("cudaSetDevice")]
    assert changes
    assert changes[-1][-1] == "0"
    assert np.allclose(w.get(), 0.8, rtol=1e-3)
    assert optimizer.get_slot(w, "m").device == 1


def test_a_bad_step_on_one_gpu_is_raised_before_a_step_on_another(fake_gpu):
    fake_gpu.set_devices(2)
    stream = fake_gpu.new_stream(1)
    table, w = ones(fake_gpu, 5, 2), ones(fake_gpu, 4, device=1, stream=stream)
    optimizer = fastadam.Adam(0.1)
    gradient = ones(fake_gpu, 4, device=1, stream=stream)
    optimizer.apply_gradients([(gradient, w)])
    slices = fastadam.IndexedSlices(ones(fake_gpu, 1, 2), fake_gpu.array(np.array([5])))
    optimizer.apply_gradients([(slices, table)])
    before = w.get()
    with pytest.raises(ValueError, match="5 is not a row"):
        optimizer.apply_gradients([(gradient, w)])
    assert np.array_equal(w.get(), before)
    assert int(optimizer.iterations) == 1


def test_a_gradient_on_another_stream_comes_first(fake_gpu):
    other = fake_gpu.new_stream()
    w, gradient = ones(fake_gpu, 4), ones(fake_gpu, 4, stream=other)
    optimizer = fastadam.Adam()
    optimizer.apply_gradients([(gradient, w)])
    fake_gpu.clear_log()
    optimizer.apply_gradients([(gradient, w)])
    calls = [(call[0], call[2]) for call in fake_gpu.calls()]
    recorded = calls.index(("cudaEventRecord", str(other)))
    waited = calls.index(("cudaStreamWaitEvent", str(fake_gpu.stream)), recorded)
    first_launch = [name for name, _ in calls].index("cudaLaunchKernelEx")
    assert recorded < waited < first_launch


def test_a_step_on_another_stream_waits_for_the_last_one(fake_gpu):
    w = ones(fake_gpu, 4)
    optimizer = fastadam.Adam()
    optimizer.apply_gradients([(ones(fake_gpu, 4), w)])
    fake_gpu.stream = fake_gpu.new_stream()
    gradient = ones(fake_gpu, 4)
    fake_gpu.clear_log()
    optimizer.apply_gradients([(gradient, w)])
    calls = [(call[0], call[2]) for call in fake_gpu.calls()]
    assert calls.index(("cudaStreamWaitEvent", str(fake_gpu.stream))) < [n for n, _ in calls].index(
        "cudaLaunchKernelEx"
    )
    assert {call[2] for call in fake_gpu.calls("cudaLaunchKernelEx")} == {str(fake_gpu.stream)}


@pytest.mark.parametrize(("stream", "found"), [(1, "0"), (2, "2")])
def test_the_numbers_that_stand_for_default_streams(fake_gpu, stream, found):
    w = ones(fake_gpu, 4, stream=stream)
    fastadam.Adam().apply_gradients([(ones(fake_gpu, 4, stream=stream), w)])
    assert {call[2] for call in fake_gpu.calls("cudaLaunchKernelEx")} == {found}


REFUSED = {
    "variable on another device": (lambda g: [(ones(g, 3), ones(g, 3)), (ones(g, 3), ones(g, 3, device=1))],
        r"vars\[1\]: in CUDA device 1, expected CUDA device 0 like vars\[0\]"),
    "gradient on another device": (lambda g: [(ones(g, 3, device=1), ones(g, 3))],
        r"grads\[0\]: in CUDA device 1, expected CUDA device 0 like vars\[0\]"),
    "gradient of the host": (lambda g: [(np.ones(3, F32), ones(g, 3))],
        r"grads\[0\]: in CPU memory, expected CUDA device 0 like vars\[0\]"),
    "variable of the host": (lambda g: [(ones(g, 3), ones(g, 3)), (ones(g, 3), np.ones(3, F32))],
        r"vars\[1\]: in CPU memory, expected CUDA device 0 like vars\[0\]"),
    "gradient for the host": (lambda g: [(ones(g, 3), np.ones(3, F32))], r"grads\[0\]: FakeArray on a GPU, expected CPU"),
    "managed": (lambda g: [(ones(g, 3), ones(g, 3, managed=True))], r"vars\[0\]: FakeArray in managed memory"),
    "managed gradient": (lambda g: [(ones(g, 3, managed=True), ones(g, 3))], r"grads\[0\]: FakeArray in managed memory"),
    "strided": (lambda g: [(ones(g, 3), g.array(np.ones((3, 2), F32)[:, 0]))], r"vars\[0\]: strides \(8,\) for shape \(3,\)"),
    "strided gradient": (lambda g: [(g.array(np.ones((3, 2), F32)[:, 0]), ones(g, 3))],
        r"grads\[0\]: float32 with strides \(8,\) for shape \(3,\), expected a contiguous array in order C like vars\[0\]"),
    "dtype": (lambda g: [(ones(g, 3), g.array(np.ones(3, np.int32)))], r"vars\[0\]: dtype int32, expected float16"),
    "gradient of another dtype": (lambda g: [(g.array(np.ones(3)), ones(g, 3))], r"grads\[0\]: float64, expected float32 like"),
    "byte-swapped": (lambda g: [(ones(g, 3), g.array(np.ones(3, ">f4")))], r"vars\[0\]: byte-swapped"),
    "read-only": (lambda g: [(ones(g, 3), ones(g, 3, writable=False))], r"vars\[0\]: read-only"),
    "misaligned": (lambda g: [(ones(g, 3), ones(g, 3, offset=2))], r"vars\[0\]: misaligned"),
    "shape": (lambda g: [(ones(g, 4), ones(g, 3))], r"grads\[0\]: shape \(4,\), expected \(3,\) like vars\[0\]"),
    "list": (lambda g: [([1.0, 2.0, 3.0], ones(g, 3))], r"grads\[0\]: in CPU memory, expected CUDA device 0"),
    "indices": (lambda g: [(fastadam.IndexedSlices(ones(g, 2), ones(g, 2)), ones(g, 3))],
        r"grads\[0\]\.indices: float32 \(2,\), expected a contiguous array of int32 or int64"),
    "indices of two axes": (lambda g: [(fastadam.IndexedSlices(ones(g, 2), g.array(np.zeros((2, 1), int))), ones(g, 3))],
        r"grads\[0\]\.indices: expected one axis"),
    "indices on another device": (
        lambda g: [(fastadam.IndexedSlices(ones(g, 2), g.array(np.zeros(2, int), device=1)), ones(g, 3))],
        r"grads\[0\]\.indices: in CUDA device 1, expected CUDA device 0"),
    "values of the host": (lambda g: [(fastadam.IndexedSlices(np.ones(2, F32), g.array(np.zeros(2, int))), ones(g, 3))],
        r"grads\[0\]\.values: in CPU memory, expected CUDA device 0"),
    "number of indices": (lambda g: [(fastadam.IndexedSlices(ones(g, 2), g.array(np.zeros(3, int))), ones(g, 3))],
        r"grads\[0\]\.values: shape \(2,\), expected \(3,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_any_launch(fake_gpu, case):
    fake_gpu.set_devices(2)
    make, message = REFUSED[case]
    pairs = make(fake_gpu)
    optimizer = fastadam.Adam()
    fake_gpu.clear_log()
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.apply_gradients(pairs)
    assert not list(fake_gpu.calls("cudaLaunchKernelEx"))
    assert int(optimizer.iterations) == 0
    assert optimizer.get_slot_names() == []


def test_a_step_that_is_refused_later_changes_nothing(fake_gpu):
    pair = Pair(fake_gpu, arrays_of("float32"))
    pair.step(arrays_of("float32", 1))
    gradients = [fake_gpu.array(g) for g in arrays_of("float32", 2)]
    gradients[-1] = ones(fake_gpu, 5)
    with pytest.raises(ValueError, match=r"grads\[5\]: shape \(5,\), expected \(1,\)"):
        pair.device.apply_gradients(zip(gradients, pair.twins, strict=True))
    pair.check()


@pytest.mark.parametrize("function", ["cudaLaunchKernelEx", "cudaMalloc", "cudaMemcpyAsync", "cudaHostAlloc"])
def test_errors_of_the_runtime_are_raised(fake_gpu, function):
    w = ones(fake_gpu, 4)
    gradient = ones(fake_gpu, 4)
    fake_gpu.fail(function, 2)
    with pytest.raises(RuntimeError, match="CUDA: out of memory"):
        fastadam.Adam().apply_gradients([(gradient, w)])
    fastadam.Adam().apply_gradients([(gradient, w)])


@pytest.mark.parametrize(("count", "error", "reason"), [(0, 35, "driver version is insufficient"), (0, 0, "no CUDA")])
def test_without_a_driver_or_a_gpu_every_use_says_so(fake_gpu, count, error, reason, capsys):
    w = ones(fake_gpu, 3)
    fake_gpu.set_devices(count, error)
    assert not fastadam.cuda.is_available()
    for use in (
        lambda: fastadam.Adam().apply_gradients([(w, w)]),
        lambda: fastadam.cuda.array([1.0]),
        lambda: fastadam.Variable(w),
        lambda: fastadam.Adam().gather(w, [0]),
    ):
        with pytest.raises(RuntimeError, match=f"arrays on a GPU cannot be updated here: .*{reason}"):
            use()
    fastadam.show_config()
    assert reason in capsys.readouterr().out
    fastadam.Adam().apply_gradients([(np.ones(3, F32), np.ones(3, F32))])


def test_nothing_of_cuda_is_imported_for_arrays_of_the_host():
    done = run_python(
        "import sys, fastadam, numpy as np; fastadam.Adam().apply_gradients([(np.ones(3), np.ones(3))]);"
        "print('fastadam._cuda' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stderr


def test_a_build_without_cuda_says_so(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "fastadam._cuda", None)
    monkeypatch.delattr(fastadam, "_cuda", raising=False)
    monkeypatch.setattr("fastadam._core.native.gpu._cpu.cuda_build", "not built: no GPU was found")
    assert not fastadam.cuda.is_available()
    with pytest.raises(RuntimeError, match="the CUDA kernels are not built: "):
        fastadam.cuda.array([1.0])
