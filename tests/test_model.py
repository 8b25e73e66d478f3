"""FastUNet against the reference: the same keys, the same function, the same gradients."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fastunet import FastUNet, dispatch, explain
from fastunet.built import as_built
from fastunet.parity import compare
from fastunet.reference import DoubleConv, UNet

from .ops.cases import Names

FEATURES = (4, 6, 9)
OPERATORS = 11  # of such a network, one after another
KINDS = ["bilinear", "bilinear_conv", "nearest", "transpose"]
NORMS = [None, "batch", "instance"]


@pytest.fixture(autouse=True)
def through_the_operators() -> Iterator[None]:
    """A CPU trains with the reference itself, unless the operators are asked for."""
    with contextlib.nullcontext() if torch.cuda.is_available() else dispatch.forced("torch"):
        yield


def pair(**config) -> tuple[UNet, FastUNet]:
    """A reference and a FastUNet of the same fresh weights and running statistics."""
    reference = UNet(2, 3, FEATURES, **config)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    fast = FastUNet(2, 3, FEATURES, **config)
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def assert_parity(candidate: torch.Tensor, baseline: torch.Tensor, truth: nn.Module, x: torch.Tensor) -> None:
    """By the one rule; ``truth`` is the reference, run in float64."""
    with torch.no_grad():
        exact = copy.deepcopy(truth).double()(x.double())
    tf32 = x.is_cuda and x.dtype == torch.float32
    parity = compare(candidate.detach(), baseline.detach(), exact, tf32=tf32, stages=OPERATORS)
    assert parity.ok, str(parity)


def assert_close(a: torch.Tensor | None, b: torch.Tensor | None, tolerance: float = 1e-12) -> None:
    """In float64, where nothing but the order of sums may differ."""
    assert a is not None
    assert b is not None
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_same_function_gradients_and_statistics(kind, norm, activation, seed):
    reference, fast = pair(upsample=kind, norm=norm, activation=activation, align_corners=seed % 2 == 0)
    reference.double()
    fast.double()
    assert list(reference.state_dict()) == list(fast.state_dict())
    x = torch.randn(2, 2, 13, 18, dtype=torch.float64)
    for training in (True, False):
        reference.train(training)
        fast.train(training)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        want, got = reference(a), fast(b)
        assert_close(got, want)
        weight = torch.randn_like(want)
        (want * weight).sum().backward()
        (got * weight).sum().backward()
        assert_close(b.grad, a.grad, 1e-9)
        for p, q in zip(reference.parameters(), fast.parameters(), strict=True):
            assert_close(q.grad, p.grad, 1e-9)
        with torch.no_grad():
            assert_close(fast(x), reference(x))
    for name, value in reference.state_dict().items():
        assert_close(fast.state_dict()[name].double(), value.double())


def test_defaults_are_the_references():
    with torch.device("meta"):
        assert FastUNet().config == UNet().config
        assert {k: v.shape for k, v in FastUNet().state_dict().items()} == {
            k: v.shape for k, v in UNet().state_dict().items()
        }


def test_weights_load_strictly_both_ways(seed):
    reference, fast = pair(norm="batch")
    reference.load_state_dict(fast.state_dict())
    fast.load_state_dict(reference.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        FastUNet(2, 3, (4, 6, 8), norm="batch").load_state_dict(reference.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_parity_in_working_dtypes(dtype, norm, seed):
    reference, fast = pair(norm=norm)
    x = torch.randn(1, 2, 40, 40).to(dtype)  # small maps make instance norm amplify every rounding
    reference.eval().to(dtype)
    fast.eval().to(dtype)
    with torch.no_grad():
        candidate, baseline = fast(x), reference(x)
    assert_parity(candidate, baseline, reference, x)
    assert candidate.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_serve_the_whole_network(kind, seed, device):
    """Through Triton end to end; on a CPU that is the interpreter."""
    reference, fast = pair(upsample=kind, norm="batch")
    reference.eval().to(device)
    fast.eval().to(device)
    x = torch.randn(1, 2, 9, 12, device=device)
    with torch.no_grad(), dispatch.forced("triton"):
        candidate = fast(x)
    with torch.no_grad():
        baseline = reference(x)
    assert_parity(candidate, baseline, reference, x)


@pytest.mark.parametrize("norm, wanted", [(None, True), ("batch", True), ("instance", False)])
def test_the_head_goes_with_the_layer_before_it(norm, wanted, seed, device):
    """In one pass, where no gradient wants the map between and nothing stands there."""
    fast = FastUNet(1, 2, (2, 3), norm=norm).eval().to(device)
    x = torch.randn(1, 1, 8, 8, device=device)
    with dispatch.forced("triton"):
        with torch.no_grad(), Names() as inference:
            fast(x)
        with Names() as training:
            fast(x)
    assert ("fastunet::conv2d_relu_head" in inference.seen) == wanted
    assert "fastunet::conv2d_relu_head" not in training.seen


@pytest.mark.parametrize(
    "options",
    [{"features": (4,)}, {"features": (2, 3, 4), "decoder_convs": (1, 2)}, {"features": (2, 3), "decoder_convs": (3,)}],
    ids=["no decoder", "one convolution in the last level", "three"],
)
def test_whatever_is_before_it_a_head_comes_last(options, seed, device):
    reference, fast = UNet(1, 2, **options).eval().to(device), FastUNet(1, 2, **options).eval().to(device)
    fast.load_state_dict(reference.state_dict())
    x = torch.randn(1, 1, 5, 6, device=device)
    with torch.no_grad():
        assert_parity(fast(x), reference(x), reference, x)
        with dispatch.forced("triton"):
            assert_parity(fast(x), reference(x), reference, x)


def test_a_stride_before_the_head_is_not_passed_by(seed):
    """Such a network was not built so, but its layers are as they may be."""
    reference, fast = UNet(1, 2, (2, 3)).eval(), FastUNet(1, 2, (2, 3)).eval()
    for net in (reference, fast):
        setattr(net.get_submodule("ups.0.conv.net"), "2", nn.Conv2d(2, 2, 3, stride=2, padding=1))
    fast.load_state_dict(reference.state_dict())
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert_parity(fast(x), reference(x), reference, x)


@pytest.mark.parametrize("norm", [None, "batch"])
def test_inference_compiles_in_one_graph(norm, seed):
    fast = FastUNet(1, 2, (2, 3), norm=norm).eval()
    x = torch.randn(1, 1, 8, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        torch.compiler.reset()
        with mode():
            y = torch.compile(fast, fullgraph=True, backend="aot_eager")(x)
            torch.testing.assert_close(y, fast(x))


class TestFoldedNorm:
    """Prepared weights must never outlive a change."""

    @pytest.fixture
    def nets(self, seed):
        reference, fast = pair(norm="batch")
        return reference.eval().double(), fast.eval().double()

    def agree(self, reference, fast):
        x = torch.randn(1, 2, 12, 12, dtype=next(fast.parameters()).dtype)
        with torch.no_grad():
            if x.dtype == torch.float64:
                assert_close(fast(x), reference(x), 1e-10)
            else:
                assert_parity(fast(x), reference(x), reference, x)

    def test_is_kept_between_calls(self, nets):
        _, fast = nets
        self.agree(*nets)
        kept = {conv: prepared.weights[torch.float64, False, False][0] for conv, prepared in fast._prepared.items()}
        self.agree(*nets)
        assert kept and all(fast._prepared[conv].weights[torch.float64, False, False][0] is kept[conv] for conv in kept)

    def test_one_dtypes_are_not_let_go_for_anothers(self, nets):
        """A captured graph may be reading them."""
        fast, x = nets[1].float(), torch.randn(1, 2, 12, 12)
        with torch.no_grad():
            fast(x)
            kept = {conv: prepared.weights[torch.float32, False, False][0] for conv, prepared in fast._prepared.items()}
            with torch.autocast("cpu", torch.bfloat16):
                fast(x)
        assert kept and all(fast._prepared[conv].weights[torch.float32, False, False][0] is kept[conv] for conv in kept)

    @staticmethod
    def step(net):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.SGD(net.parameters(), 0.01).step()

    @staticmethod
    def scale(net):
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(p * 1.5)

    CHANGES = {
        "optimiser-step": step,
        "copy-under-no-grad": scale,
        "load_state_dict": lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}),
        "running-statistics": lambda net: net.downs[0].conv.net[1].running_mean.add_(1.0),
        "norm-weight": lambda net: nn.init.constant_(net.bottleneck.net[1].weight, 3.0),
        "data-replaced": lambda net: setattr(net.head.weight, "data", net.head.weight.data * 2),
        "parameter-replaced": lambda net: setattr(net.head, "weight", nn.Parameter(net.head.weight.detach() * 3)),
        "to-float": lambda net: net.float(),
        "train-then-eval": lambda net: (net.train()(torch.ones(2, 2, 12, 12, dtype=torch.float64)), net.eval()),
    }

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_is_folded_anew_after(self, change, nets):
        self.agree(*nets)
        for net in nets:
            change(net)
        self.agree(*nets)

    def test_data_writes_are_seen_after_refresh(self, nets):
        self.agree(*nets)
        for net in nets:
            net.head.weight.data.mul_(2)
        nets[1].refresh()
        self.agree(*nets)

    def test_frozen_norm_still_gives_gradients(self, nets):
        reference, fast = nets
        x = torch.randn(1, 2, 12, 12, dtype=torch.float64)
        reference(x).square().sum().backward()
        fast(x).square().sum().backward()
        for p, q in zip(reference.parameters(), fast.parameters(), strict=True):
            assert_close(q.grad, p.grad, 1e-9)

    def test_inference_mode_does_not_leak(self, nets):
        reference, fast = nets
        x = torch.randn(1, 2, 12, 12, dtype=torch.float64)
        with torch.inference_mode():
            fast(x)
        fast.requires_grad_(False)
        x.requires_grad_()
        fast(x).sum().backward()  # would fail on weights made in inference mode
        got, x.grad = x.grad, None
        reference(x).sum().backward()
        assert_close(got, x.grad, 1e-9)


@pytest.mark.parametrize(
    "remake", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(remake, seed):
    _, fast = pair(norm="batch")
    x = torch.randn(1, 2, 12, 12)
    with torch.no_grad():
        before = fast.eval()(x)
        twin = remake(fast)
        twin.head.bias.add_(1)
        assert_close(fast(x), before, 0)
        assert not torch.equal(twin(x), before)


# Inductor once, as it compiles C++ for half a minute each time; the others are traced as for it.
@pytest.mark.parametrize(
    "kind, norm, backend",
    [("bilinear", None, "aot_eager"), ("bilinear", "batch", "inductor"), ("transpose", "instance", "aot_eager")],
    ids=str,
)
def test_compiles_without_a_graph_break(kind, norm, backend, seed):
    reference, fast = pair(upsample=kind, norm=norm)
    x = torch.randn(1, 2, 33, 32)
    for training in (False, True):
        reference.train(training)
        fast.train(training)
        torch.compiler.reset()
        plain = copy.deepcopy(reference)  # whose running statistics are updated
        if training and backend == "inductor":
            # Who compiles has a compiled reference today: Inductor sums a norm's statistics in its own order, with
            # about three times eager's root mean square of errors, the reference's as ours.
            plain = torch.compile(plain)
        assert_parity(torch.compile(fast, fullgraph=True, backend=backend)(x), plain(x), reference, x)
        fast.load_state_dict(reference.state_dict())


def test_compiled_training_step_gives_the_same_gradients(seed):
    """Those of eager code: the kernels of both are torch's own."""
    _, fast = pair(upsample="transpose")
    twin = copy.deepcopy(fast)
    x = torch.randn(1, 2, 12, 12)
    torch.compiler.reset()
    torch.compile(fast, fullgraph=True)(x).square().mean().backward()
    twin(x).square().mean().backward()
    for p, q in zip(twin.parameters(), fast.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        parity = compare(q.grad, p.grad, p.grad.double(), stages=2 * OPERATORS)
        assert parity.ok, str(parity)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_autocast(norm, seed, device):
    reference, fast = pair(norm=norm)
    x = torch.randn(1, 2, 16, 16, device=device)
    for net in (reference, fast):
        net.eval().to(device)
    with torch.no_grad():
        with torch.autocast(device, torch.bfloat16):
            candidate, baseline = fast(x), reference(x)
        after, plain = fast(x), reference(x)
    assert candidate.dtype == baseline.dtype == torch.bfloat16
    assert_parity(candidate, baseline, reference, x)
    assert_parity(after, plain, reference, x)  # leaving autocast leaves its weights


def test_autocast_leaves_float64_alone(seed):
    reference, fast = pair(norm="batch")
    x = torch.randn(1, 2, 12, 12, dtype=torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_close(fast.double().eval()(x), reference.double().eval()(x))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_any_strides_in(layout, seed):
    reference, fast = pair()
    x = torch.randn(2, 2, 12, 12)
    x = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": x.repeat_interleave(2, 3)[..., ::2],
        "expanded": x[:1].expand(2, -1, -1, -1),
    }[layout]
    assert_parity(fast(x), reference(x), reference, x)


def test_empty_batch():
    assert FastUNet(1, 2, FEATURES)(torch.zeros(0, 1, 12, 12)).shape == (0, 2, 12, 12)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 2, H, W\)"):
        FastUNet(2, 3, FEATURES)(torch.zeros(1, 1, 12, 12))


class Doubled(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Halved(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) / 2


class Doubling(DoubleConv):
    def forward(self, x):
        return 2 * super().forward(x)


def in_bottleneck(place: int, replacement: Callable[[], nn.Module]) -> Callable[[UNet], UNet]:
    def change(network: UNet) -> UNet:
        torch.manual_seed(0)
        network.bottleneck.net[place] = replacement()  # pyright: ignore
        return network

    return change


def with_another_level(network: UNet) -> UNet:
    level: Any = network.ups[0].conv
    level.__class__ = Doubling
    return network


def with_another_upsampling(network: UNet) -> UNet:
    torch.manual_seed(0)
    up: Any = network.ups[0]
    up.kind, up.up = "transpose", nn.ConvTranspose2d(FEATURES[-1], FEATURES[-1], 4, stride=2, padding=1)
    return network


WIDTH, BEFORE = FEATURES[-1], FEATURES[-2]
REPLACED = {
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "GroupNorm": in_bottleneck(1, lambda: nn.GroupNorm(1, WIDTH)),
    "norm of its own": in_bottleneck(1, lambda: Doubled(WIDTH)),
    "convolution of its own": in_bottleneck(0, lambda: Halved(BEFORE, WIDTH, 3, padding=1)),
    "padding": in_bottleneck(0, lambda: nn.Conv2d(BEFORE, WIDTH, 3, padding=1, padding_mode="reflect")),
    "wide filter": in_bottleneck(0, lambda: nn.Conv2d(BEFORE, WIDTH, 5, padding=2)),
    "wide border": in_bottleneck(0, lambda: nn.Conv2d(BEFORE, WIDTH, 3, padding=2)),
    "transposed of another stride": with_another_upsampling,
    "ELU": in_bottleneck(2, nn.ELU),
    "no activation": in_bottleneck(2, nn.Identity),
    "leaky": in_bottleneck(5, lambda: nn.LeakyReLU(0.3)),
    "level of its own": with_another_level,
}


@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED)
def test_a_replaced_layer_is_not_passed_by(change, seed):
    """Whoever puts another module in place of one gets what it computes, and its gradients."""
    reference, fast = (change(network).double().eval() for network in pair(norm="batch"))
    x = torch.randn(2, 2, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        assert_close(fast(x), reference(x))
    ours, theirs = fast(x), reference(x)
    assert_close(ours, theirs)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for a, b in zip(fast.parameters(), reference.parameters(), strict=True):
        assert_close(a.grad, b.grad)
    reasons = {row.choice.reason for row in explain(fast, x.shape).rows}
    assert reasons == {"a layer of the model was replaced; the reference network runs as it is"}


BUILT: list[dict[str, Any]] = [
    {},
    {"norm": "batch"},
    {"norm": "instance", "order": "conv_act_norm"},
    {"downsample": "stride"},
    {"padding": "valid", "match": "center_crop"},
]


@pytest.mark.parametrize("options", BUILT, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "nearest_conv"])
def test_a_network_as_it_was_built_is_known(kind, options):
    network = FastUNet(2, 3, FEATURES, upsample=kind, activation="leaky_relu", **options)
    assert as_built(network)
    pool = network.downs[0].pool
    network.downs[0].pool = nn.AvgPool2d(2)  # pyright: ignore[reportAttributeAccessIssue]
    assert not as_built(network)
    network.downs[0].pool = pool  # pyright: ignore[reportAttributeAccessIssue]
    network.dropout = nn.Dropout2d()  # beside the layers
    torch.nn.utils.parametrizations.weight_norm(network.head)
    assert as_built(network)
