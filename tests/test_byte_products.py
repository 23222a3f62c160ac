"""Products with packed bytes: those of the weight in fp32, whatever the rows, on each kernel this machine has."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt import byte_products, opaque
from litgpt.byte_products import MOST_COLUMNS, Fbgemm, Kernel, OneDnn

KERNELS = [kind for kind in (Fbgemm, OneDnn) if byte_products._is_right(kind)]
SHAPES = [(16, 64), (33, 24), (1, 7), (300, 1000), (40_000, 8)]
pytestmark = pytest.mark.skipif(not KERNELS, reason="this CPU does not multiply bytes")


def drawn(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    return codes, torch.rand(shape[0], generator=generator) + 0.01


def rows(count: int, columns: int) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KERNELS)
def test_codes_come_back_and_products_are_exact(kind: Kernel, shape: tuple[int, int]) -> None:
    codes, scale = drawn(shape)
    packed, weight = kind(codes, scale), codes.double() * scale.double().unsqueeze(1)
    assert torch.equal(packed.codes(), codes)
    for count in (1, 2, 40, 600):
        for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 4e-3), (torch.float64, 1e-4)):
            x = rows(count, shape[1]).to(dtype)
            kept, exact = x.clone(), x.double() @ weight.t()
            assert (packed.times(x) - exact).norm() < close * exact.norm()
            bias = scale.to(dtype)
            assert (packed.times(x, bias) - exact - bias).norm() < close * (exact + bias).norm()
            assert torch.equal(x, kept)
            assert packed.times(x).dtype == dtype


@pytest.mark.parametrize("kind", KERNELS)
def test_a_row_does_not_depend_on_its_neighbours(kind: Kernel) -> None:
    packed, x = kind(*drawn((300, 1000))), rows(40, 1000)
    together = packed.times(x)
    for count in (1, 3, 17):
        assert torch.equal(torch.cat([packed.times(part) for part in x.split(count)]), together)


@pytest.mark.parametrize("kind", KERNELS)
def test_rows_of_any_size(kind: Kernel) -> None:
    codes, scale = drawn((33, 24))
    packed, weight = kind(codes, scale), codes.double() * scale.double().unsqueeze(1)
    x = rows(6, 24) * torch.tensor([0.0, 1e-33, 1e-20, 1.0, 1e5, 1e30]).unsqueeze(1)
    exact = x.double() @ weight.t()
    assert ((packed.times(x) - exact).norm(dim=1) <= 1e-4 * exact.norm(dim=1)).all()
    for wrong in (float("inf"), float("nan")):
        x = rows(3, 24)
        x[1, 5] = wrong
        finite = packed.times(x).isfinite()
        assert finite[[0, 2]].all()
        assert not finite[1].any()
    assert packed.times(rows(0, 24)).shape == (0, 33)


@pytest.mark.parametrize("kind", KERNELS)
def test_the_largest_sums_do_not_overflow(kind: Kernel) -> None:
    packed = kind(torch.full((1, MOST_COLUMNS), -128, dtype=torch.int8), torch.ones(1))
    for sign in (1, -1):
        y = packed.times(torch.full((1, MOST_COLUMNS), float(sign)))
        assert y.item() == pytest.approx(-128 * MOST_COLUMNS * sign, rel=1e-4)


def test_what_fails_while_packing_is_heard_by_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(torch, "_make_per_channel_quantized_tensor", failing)
    packed = Fbgemm(*drawn((16, 64)))
    for ask in (packed.wait, packed.codes, lambda: packed.times(rows(1, 64))):
        with pytest.raises(RuntimeError, match="no memory"):
            ask()
    assert not byte_products._is_right(Fbgemm)


def test_packing_goes_on_beside_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    go, original = threading.Event(), torch._make_per_channel_quantized_tensor
    monkeypatch.setattr(torch, "_make_per_channel_quantized_tensor", lambda *a: go.wait(10) and original(*a))
    before = threading.active_count()
    codes, scale = drawn((300, 1000))
    packed = [Fbgemm(codes, scale) for _ in range(3)]  # would not come back, if it packed itself
    assert threading.active_count() == before + 3
    go.set()
    assert all(torch.equal(each.codes(), codes) for each in packed)
    assert threading.active_count() == before


def test_where_a_kernel_is_wrong_the_next_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    byte_products.kernel.cache_clear()
    try:
        monkeypatch.setattr(Fbgemm, "product", lambda self, digits: F.linear(digits, self.codes().float()) * 1.1)
        assert byte_products.kernel() is (OneDnn if OneDnn in KERNELS else None)
        byte_products.kernel.cache_clear()
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        assert byte_products.kernel() is None
    finally:
        byte_products.kernel.cache_clear()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_defaults_around_the_first_call_say_nothing_about_the_cpu(default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"), torch.autocast("cpu"):
            assert all(byte_products._is_right(kind) for kind in KERNELS)
    finally:
        torch.set_default_dtype(before)


def test_what_is_no_longer_used_is_let_go() -> None:
    packed = KERNELS[0](*drawn((16, 64)))
    packed.wait()
    number = packed.number
    assert opaque._LIVING[number] is packed
    del packed
    assert number not in opaque._LIVING
