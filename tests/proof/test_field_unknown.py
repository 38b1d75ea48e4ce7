"""Operators without a form of their own, Fourier transforms, and complex numbers in the field."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.compiler import compile_program
from autopar.proof import field
from autopar.proof import field_lockstep as registers_the_forms  # noqa: F401
from autopar.proof.field_complex import FORMS as OF_COMPLEX
from autopar.proof.field_complex import ComplexFieldTensor
from autopar.proof.field_fourier import spectrogram
from autopar.proof.field_proof import prove_in_field
from autopar.proof.field_tensor import FORMS, FieldTensor, elements_of
from autopar.proof.field_uninterpreted import recorded

aten = torch.ops.aten
F64 = torch.float64


def drawn(*shape: int, name: str = "x") -> FieldTensor:
    return FieldTensor(field.drawn(shape, name, 0), F64)


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(elements_of(one), elements_of(other))


# ---------------------------------------------------------------- rows

UNKNOWN: list[tuple[Any, tuple[Tensor, ...], dict[int, int], int]] = [  # operator, operands, dims of its rows, of rows
    (lambda x: aten.linalg_inv_ex.default(x)[0], (drawn(4, 3, 3),), {0: 0}, 0),
    (lambda x: aten.linalg_qr.default(x)[1], (drawn(2, 4, 3, 3),), {0: 1}, 1),
    (aten._cdist_forward.default, (drawn(4, 3), drawn(5, 3, name="y")), {0: 0}, 0),
    (aten._cdist_forward.default, (drawn(6, 3), drawn(4, 3, name="y")), {1: 0}, 1),
    (aten.grid_sampler_2d.default, (drawn(2, 4, 5, 5), drawn(2, 3, 6, 2, name="y")), {0: 1}, 1),
    (aten.grid_sampler_2d.default, (drawn(4, 2, 5, 5), drawn(4, 3, 6, 2, name="y")), {0: 0, 1: 0}, 0),
    (aten.grid_sampler_2d.default, (drawn(2, 3, 5, 5), drawn(2, 4, 6, 2, name="y")), {1: 1}, 2),
]
REST: dict[Any, tuple[Any, ...]] = {
    aten._cdist_forward.default: (2.0, None),
    aten.grid_sampler_2d.default: (0, 0, False),
}


@pytest.mark.parametrize("operator, operands, dims, made", UNKNOWN, ids=map(str, range(len(UNKNOWN))))
def test_rows_that_are_treated_alone_may_be_split(
    operator: Any, operands: tuple[Tensor, ...], dims: dict[int, int], made: int
) -> None:
    rest = REST.get(operator, ())
    with recorded() as met:
        whole = operator(*operands, *rest)
    assert len(met) == 1
    for half in (0, 2):
        part = [x.narrow(dims[at], half, 2) if at in dims else x for at, x in enumerate(operands)]
        assert same(operator(*part, *rest), whole.narrow(made, half, 2))


def test_what_is_mixed_may_not_be_split() -> None:
    x = drawn(4, 4, 4)
    whole = aten.linalg_inv_ex.default(x)[0]
    for dim in (1, 2):
        part = x.narrow(dim, 0, 2)
        square = part.narrow(3 - dim, 0, 2)
        assert not same(aten.linalg_inv_ex.default(square)[0], whole.narrow(dim, 0, 2).narrow(3 - dim, 0, 2))


def test_equal_operands_in_other_places_are_others() -> None:
    x = drawn(3, 3)
    one, other = (aten.linalg_inv_ex.default(each)[0] for each in (x, x.t()))
    assert not bool((one.elements == other.elements).any())
    again = aten.linalg_inv_ex.default(FieldTensor(x.elements.clone(), F64))[0]
    assert same(one, again) and not same(one, aten.linalg_qr.default(x)[0])


# ---------------------------------------------------------------- Fourier transforms


def number(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)


@pytest.mark.parametrize("normalization", [0, 1, 2])
@pytest.mark.parametrize("dims", [[1], [2, 1], [0, 1, 2]])
def test_transforms_are_torchs(dims: list[int], normalization: int) -> None:
    real, given = number(3, 6, 5), torch.complex(number(3, 6, 5), number(3, 6, 5).flip(0))
    for forward in (True, False):
        wanted = aten._fft_c2c.default(given, dims, normalization, forward)
        assert torch.allclose(OF_COMPLEX["_fft_c2c"](given, dims, normalization, forward), wanted, atol=1e-12)
    for onesided in (True, False):
        wanted = aten._fft_r2c.default(real, dims, normalization, onesided)
        assert torch.allclose(FORMS["_fft_r2c"](real, dims, normalization, onesided), wanted, atol=1e-12)
    for last in (6, 7):
        half = given.narrow(dims[-1], 0, min(last // 2 + 1, given.shape[dims[-1]]))
        if half.shape[dims[-1]] == last // 2 + 1:
            wanted = aten._fft_c2r.default(half, dims, normalization, last)
            assert torch.allclose(OF_COMPLEX["_fft_c2r"](half, dims, normalization, last), wanted, atol=1e-12)


def test_spectrograms_are_torchs() -> None:
    for more in ({}, {"normalized": True, "onesided": False}):
        wanted = torch.stft(number(3, 40), 8, 3, 6, torch.hann_window(6, dtype=F64), False, return_complex=True, **more)
        found = spectrogram(number(3, 40), 8, 3, 6, torch.hann_window(6, dtype=F64), return_complex=True, **more)
        assert torch.allclose(found, wanted, atol=1e-12)


def test_transforms_are_linear_in_the_field() -> None:
    x, y = drawn(4, 6), drawn(4, 6, name="y")
    both = aten._fft_r2c.default(x + y * 3, [1], 0, True)
    each = aten._fft_r2c.default(x, [1], 0, True) + aten._fft_r2c.default(y, [1], 0, True) * 3
    assert isinstance(both, ComplexFieldTensor) and same(torch.view_as_real(both), torch.view_as_real(each))


def test_complex_numbers_divide_and_have_a_size() -> None:
    a, b = (ComplexFieldTensor(drawn(3, 3, name=f"{name} re"), drawn(3, 3, name=f"{name} im")) for name in "ab")
    back = a / b * b
    assert same(torch.view_as_real(back), torch.view_as_real(a))
    assert same(a.abs(), (a.real * a.real + a.imag * a.imag).sqrt())
    assert same(torch.view_as_real((a + b) @ b), torch.view_as_real(a @ b + b @ b))
    a.narrow(0, 0, 1).mul_(2)  # through a view
    assert same(torch.view_as_real(a[:1] / 2 * b[:1]), torch.view_as_real(a[:1] * b[:1] / 2))


# ---------------------------------------------------------------- programs


class Mixed(nn.Module):
    """Frequencies with weights of their own, and the inverse of a matrix of each row; its loss is a mean of 648."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(9, 9), nn.Linear(9, 18)
        self.weight = nn.Parameter(torch.randn(5, 9, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        spectrum = torch.fft.rfft(h, dim=1) * torch.view_as_complex(self.weight)
        h = torch.fft.irfft(spectrum, n=9, dim=1)
        matrix = h.unflatten(-1, (3, 3))
        return self.down(torch.linalg.inv(matrix @ matrix.mT + torch.eye(3)).flatten(-2)).square().mean()


@pytest.mark.parametrize("mesh", [Mesh(dp=2), Mesh(tp=2)], ids=str)
def test_programs(mesh: Mesh) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 9, 9)
    found = prove_in_field(compile_program(Mixed(), mesh, Plan(check_numerics=False), (x,)), args=(x,))
    assert found.holds and found.unknown == ("aten.linalg_inv_ex.default",), found
    assert "gradient of weight" in found.proved


# ---------------------------------------------------------------- order statistics, histograms, parts of floats


@pytest.mark.parametrize("interpolation", ["linear", "lower", "higher", "nearest", "midpoint"])
@pytest.mark.parametrize("dim, keepdim", [(0, False), (-1, True), (None, False), (None, True)])
def test_quantiles_are_torchs(dim: int | None, keepdim: bool, interpolation: str) -> None:
    x, more = number(4, 7), {"interpolation": interpolation}
    for q in (0.3, torch.tensor([0.0, 0.3, 0.85], dtype=F64)):
        for operator in (torch.quantile, torch.nanquantile):
            wanted = operator(x, q, dim, keepdim, **more)
            assert torch.allclose(FORMS["quantile"](x, q, dim, keepdim, **more), wanted, atol=1e-12)


def test_medians_histograms_and_parts_of_floats() -> None:
    x = number(4, 7)
    assert all(map(torch.equal, FORMS["nanmedian.dim"](x, 1), aten.nanmedian.dim(x, 1)))
    counts = aten.histc.default(drawn(4, 6), 8, -1, 1)
    assert int(counts.elements.sum()) == 24 and not same(counts, aten.histc.default(drawn(4, 6), 8, -2, 1))
    halves = [aten.histc.default(drawn(4, 6).narrow(0, place, 2), 8, -1, 1) for place in (0, 2)]
    assert same(counts, halves[0] + halves[1])
    assert not same(aten.histc.default(drawn(4, 6), 8), sum(aten.histc.default(h, 8) for h in drawn(4, 6).split(2)))
    mantissa, exponent = aten.frexp.Tensor(drawn(5))
    assert exponent.dtype is torch.int32 and mantissa.dtype is F64 and exponent.shape == mantissa.shape


class Statistics(nn.Module):
    def __init__(self, give: Any) -> None:
        super().__init__()
        self.up, self.give = nn.Linear(8, 8).double(), give

    def forward(self, x: Tensor) -> Tensor:
        return self.give(self.up(x))  # type: ignore[no-any-return]


STATISTICS: dict[str, Any] = {
    "nanmedian": lambda h: h.nanmedian(-1).values.square().mean(),
    "quantile": lambda h: h.quantile(0.3, dim=-1).square().mean(),
    "histogram": lambda h: h.square().mean() + h.detach().histc(4, -1.0, 1.0).square().sum(),
    "frexp": lambda h: (torch.frexp(h)[0].square() * torch.exp2(torch.frexp(h)[1].double())).mean(),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_proved(name: str) -> None:
    x = number(4, 8)
    program = compile_program(Statistics(STATISTICS[name]), Mesh(dp=2), Plan(check_numerics=False), (x,))
    found = prove_in_field(program, args=(x,))
    assert found.holds and not found.unknown, found
