"""Reading the text form: arguments, and the messages for a wrong text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import ProgramFileError
from autopar.ir.parse import parse
from autopar.ir.read_graph import parse_argument
from autopar.ir.text import DTYPES, argument_text
from tests.conftest import Golden
from tests.texts import MLP, ROLES, line

# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("written", "argument"),
    [
        ("-3", -3),
        ("9223372036854775807", 2**63 - 1),
        ("1e-05", 1e-5),
        ("-0.0", -0.0),
        ("1e+38", 1e38),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("True", True),
        ("None", None),
        ('"mean"', "mean"),
        ('"\\u00e9\\n"', "é\n"),
        ("[]", []),
        ("[1, [2, None], -1.5]", [1, [2, None], -1.5]),
        ("(1,)", (1,)),
        ("()", ()),
        ("(1, (2, 3))", (1, (2, 3))),
        ("slice(None, 2, None)", slice(None, 2, None)),
        ("f32", torch.float32),
        ("bool", torch.bool),
        ("torch.strided", torch.strided),
        ("torch.contiguous_format", torch.contiguous_format),
        ("torch.quint8", torch.quint8),
        ('device("cpu")', torch.device("cpu")),
        ('device("cuda:3")', torch.device("cuda:3")),
    ],
)
def test_arguments(written: str, argument: Any) -> None:
    assert argument_text(argument) == written
    again = parse_argument(written)
    assert again == argument
    assert type(again) is type(argument)
    assert math.copysign(1, again) == math.copysign(1, argument) if isinstance(argument, float) else True


def test_nan() -> None:
    assert argument_text(math.nan) == "nan"
    assert math.isnan(parse_argument("nan"))


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name: str) -> None:
    assert parse_argument(name) is DTYPES[name]
    assert f": {name}[2]" in str(parse(f"program mesh()\n x = input : {name}[2]\n return x"))


plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(list(DTYPES.values()))
)
nested = st.recursive(plain, lambda inner: st.lists(inner) | st.tuples(inner) | st.tuples(inner, inner), max_leaves=8)


@given(nested)
@settings(max_examples=300, deadline=None)
def test_any_argument_reads_back(argument: Any) -> None:
    written = argument_text(argument)
    assert written.isascii() and "\n" not in written
    assert parse_argument(written) == argument


# ---------------------------------------------------------------- errors

ERRORS = {
    "empty": ("", "line 1: expected the header of a program"),
    "no header": ("  x = input", "line 1: expected the header"),
    "bad header": ("program dp=2\n return", "line 1: expected a header like 'program mesh"),
    "bad mesh": ("program mesh(dp=0)\n return", "line 1: mesh axis dp=0"),
    "no return": ("program mesh()\n\n  x = input", "line 3: expected 'return ...' as the last line"),
    "no body": ("program mesh()", "line 1: expected 'return ...'"),
    "two returns": ("program mesh()\n return\n return", "line 3, column 2: expected nothing after 'return'"),
    "undefined": (line("aten.neg(z)"), "line 3, column 16: expected a value that is defined above, found 'z'"),
    "undefined source": (line("z[0]"), "column 7: expected a value that is defined above, found 'z'"),
    "twice": (
        "program mesh()\n x = input\n x = input\n return",
        "line 3, column 2: expected a name that is not defined",
    ),
    "Python's": ("program mesh()\n sum = input\n return", "expected a name that is none of Python's own, e.g. 'sum_1'"),
    "no equals": ("program mesh()\n x input\n return", "line 2, column 4: expected '=', found 'input'"),
    "unknown operator": (line("aten.no_such(x)"), "column 7: expected a registered operator"),
    "unknown overload": (line("aten.add.Nope(x)"), "expected a registered operator"),
    "unknown library": (line("nolib.neg(x)"), "import the library that defines it first"),
    "module function": (line("load_library.x(x)"), "expected a registered operator"),
    "file operator": (line('aten.from_file("a")'), "a program may call .it opens files., found 'aten.from_file'"),
    "unknown ours": (line("op.no_such(x)"), "an operator of autopar.operators, found 'op.no_such'"),
    "python": (line("python.max(x)"), "expected a registered operator"),
    "unknown collective": (line("comm.shout(x, tp)"), r"expected a collective \(enter, release"),
    "unknown axis": (line("comm.enter(x, dp)"), r"expected an axis of mesh\(tp=2\), found 'dp'"),
    "no axis": (line("comm.enter(x)"), "expected argument axis= of comm.enter"),
    "no dim": (line("comm.all_gather(x, tp) : f32[16]"), "expected argument dim= of comm.all_gather"),
    "no length": (line("comm.all_gather(x, tp, dim=0)"), "expected argument length="),
    "too many": (line("comm.enter(x, tp, tp)"), "expected '\\)'"),
    "axis twice": (line("comm.enter(x, tp, axis=tp)"), "expected '\\)'"),
    "unclosed": (line("aten.neg(x"), "expected ',', found the end of the line"),
    "positional last": (line("aten.add.Tensor(alpha=1, x)"), "others cannot follow one"),
    "bad slice": (line("aten.neg(slice(1))"), r"slice\(start, stop, step\)"),
    "bad device": (line('aten.neg(device("moon"))'), "expected a device"),
    "bad torch": (line("aten.neg(torch.load)"), "expected a constant of torch, found 'torch.load'"),
    "rest": (line("aten.neg(x) f32[2]"), "expected the end of the line, found 'f32"),
    "bad dtype": (line("aten.neg(x) : f33[2]"), r"expected a dtype \(f64, f32.*found 'f33'"),
    "no shape": (line("aten.neg(x) : f32"), r"expected '\['"),
    "bad size": (line("aten.neg(x) : f32[-2]"), "expected a size, found '-2"),
    "bad type axis": (line("aten.neg(x) : f32[2@dp]"), "expected an axis of mesh"),
    "bad partial": (line("aten.neg(x) : f32[2]{tp}"), "expected ':'"),
    "placeholder": (line("weights w"), "expected an operator such as 'aten.add.Tensor\\('.* param, buffer, const"),
    "no target": ("program mesh()\n w = param : f32[2]\n return", "expected the name of the param, found ':'"),
    "saved outside": (line("saved"), "expected an operator"),
    "bad section": (
        "program mesh()\n return\nbackward:\n return",
        "line 3: found 'backward:', expected a section 'forward:'",
    ),
    "no inference": ("program mesh()\n return\nforward:\n return", "at the end: expected a section 'inference:'"),
    "bad grad": (ROLES.replace("grad loss", "grad los"), r"line 19.*expected the name of an output \(loss, logits\)"),
    "bad update": ("program mesh()\n x = input\n return update x", "expected the name of a buffer and '='"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_line_and_what_was_expected(case: str) -> None:
    source, message = ERRORS[case]
    with pytest.raises(ProgramFileError, match=message) as caught:
        parse(source)
    assert len(str(caught.value).splitlines()) <= 2


def test_an_error_shows_the_line(golden: Golden) -> None:
    with pytest.raises(ProgramFileError) as caught:
        parse(MLP.replace("gelu(linear)", "gelu(liner)"))
    golden("text_error", caught.value)
