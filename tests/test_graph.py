"""CUDA graphs of a forward pass: when one is captured, replayed, captured anew or left alone."""

from __future__ import annotations

import copy

import pytest
import torch

from fastunet import FastUNet, dispatch, graph


@pytest.fixture
def model(seed: int) -> FastUNet:
    return FastUNet(1, 2, (4, 8), norm="batch").eval()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Captures that were made. A stand-in replays what the model computed at its capture, as a stale graph would."""
    made = []

    def capture(forward, x):
        made.append(x.shape)
        frozen = copy.deepcopy(forward.__self__)
        return lambda x: frozen(x)

    monkeypatch.setattr(graph, "_capture", capture)
    monkeypatch.setattr(graph, "_on_gpu", lambda x: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def same(model: FastUNet, x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(y, copy.deepcopy(model)(x))  # a copy has no graphs


@torch.no_grad()
def test_one_capture_for_each_signature(model, captures):
    a, b = torch.rand(1, 1, 8, 8), torch.rand(2, 1, 8, 8)
    with model.cuda_graph():
        for x in (a, b, a + 1, b + 1, a.transpose(2, 3)):
            assert same(model, x, model(x))
        assert len(captures) == 3  # other strides are another signature
        with dispatch.forced("torch"):
            model(a)
        with torch.autocast("cpu", torch.bfloat16):
            model(a)
        assert len(captures) == 5
    model(a)
    assert len(captures) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.head.weight.add_(1),
        lambda m: m.bottleneck.net[1].running_mean.add_(1),
        lambda m: m.load_state_dict(FastUNet(1, 2, (4, 8), norm="batch").state_dict()),
        lambda m: setattr(m.head, "bias", torch.nn.Parameter(torch.ones(2))),
        lambda m: m.half().float(),
    ],
    ids=["in-place", "running-statistic", "load_state_dict", "new-parameter", "to"],
)
@torch.no_grad()
def test_changed_weights_are_captured_anew(change, model, captures):
    x = torch.rand(1, 1, 8, 8)
    with model.cuda_graph():
        model(x)
        change(model)
        assert same(model, x, model(x))
        assert len(captures) == 2


@torch.no_grad()
def test_writing_through_data_needs_refresh(model, captures):
    x = torch.rand(1, 1, 8, 8)
    with model.cuda_graph():
        model(x)
        model.head.weight.data.add_(1)
        model.refresh()
        assert same(model, x, model(x))


@torch.no_grad()
def test_no_more_than_so_many_are_kept(model, captures):
    with model.cuda_graph(limit=2):
        for n in (1, 2, 1, 3, 1, 2):  # 2 is dropped when 3 comes, being the least recently used
            model(torch.rand(n, 1, 8, 8))
    assert [shape[0] for shape in captures] == [1, 2, 3, 2]
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"), model.cuda_graph(limit=0):
        pass


def test_where_a_graph_cannot_say_the_same(model, captures, monkeypatch):
    x = torch.rand(1, 1, 8, 8)
    with model.cuda_graph():
        model(x).sum().backward()  # gradients are wanted
        with torch.no_grad():
            model.train()(x)
            model.eval()
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            model(x)
    assert not captures and model.head.weight.grad is not None


@torch.no_grad()
def test_refresh_reaches_the_blocks_around(model, captures):
    x = torch.rand(1, 1, 8, 8)
    with model.cuda_graph():
        model(x)
        with model.cuda_graph():
            model.head.weight.data.add_(1)
            model.refresh()
        assert same(model, x, model(x))


@torch.no_grad()
def test_a_norm_in_train_mode_is_not_replayed(model, captures):
    x = torch.rand(1, 1, 8, 8)
    with model.cuda_graph():
        model(x)
        model.bottleneck.net[1].train()
        assert same(model, x, model(x)) and not torch.equal(model(x), model.eval()(x))


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    """torch's own context does not, where ending the capture fails too."""
    streams = ["the user's"]

    class Stream:
        wait_stream = lambda *_: None

    class Within:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            self.before = list(streams)
            streams.append(self.stream)

        def __exit__(self, *_):
            streams[:] = self.before

    class Capture(Within):
        def __init__(self, graph, stream, **_):
            super().__init__(stream)

        def __exit__(self, *_):
            raise RuntimeError("the capture is invalid")

    launched = []

    def call():
        launched.append(streams[-1])
        if len(launched) == 2:
            raise ValueError("cannot be captured")

    stand_ins = {"Stream": Stream, "stream": Within, "current_stream": Stream, "CUDAGraph": object, "graph": Capture}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with pytest.raises(RuntimeError, match="the capture is invalid"):
        graph.captured(call)
    assert streams == ["the user's"]
    assert launched[0] is launched[1]  # once before, on the stream that is captured


@torch.no_grad()
def test_nothing_is_captured_where_processes_work_together(model, captures, monkeypatch):
    """Fully sharded weights come and go in the same memory without counting a version."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with model.cuda_graph():
        model(torch.rand(1, 1, 8, 8))
    assert not captures


@torch.no_grad()
def test_a_users_capture_prepares_weights_in_each_replay(model, captures, monkeypatch):
    """Kept ones would be let go with the next change; what is laid out in a capture is there in its replays alone."""
    x = torch.rand(1, 1, 8, 8)
    expected = model(x)
    model.refresh()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert not model._prepared


@torch.no_grad()
def test_on_a_cpu_it_is_the_usual_forward(model):
    x = torch.rand(1, 1, 8, 8)
    with model.cuda_graph() as same_model:
        assert same_model is model and same(model, x, model(x))


@pytest.mark.cuda
@torch.no_grad()
def test_on_a_gpu(seed):
    model = FastUNet(1, 2, (16, 32), norm="batch").cuda().half().eval()
    xs = [torch.rand(2, 1, 40, 48, device="cuda").half() for _ in range(3)]
    expected = [model(x) for x in xs]
    with model.cuda_graph():
        results = [model(x) for x in xs]
        assert all(map(torch.equal, results, expected))
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            assert torch.equal(model(xs[0]), expected[0])
        torch.cuda.synchronize()
        model.head.weight.add_(1)
        changed = model(xs[0])
        own, static = torch.cuda.CUDAGraph(), xs[1].clone()
        with torch.cuda.graph(own):
            output = model(static)
        own.replay()
        assert torch.equal(output, model(xs[1]))
        wide = xs[0][:1].expand(2, -1, -1, -1)
        assert torch.equal(model(wide), model(wide.contiguous()))
    assert torch.equal(changed, model(xs[0])) and not torch.equal(changed, expected[0])
    model.head.weight.add_(1)  # the user's graph takes the weights of now
    own.replay()
    assert torch.equal(output, model(xs[1]))
