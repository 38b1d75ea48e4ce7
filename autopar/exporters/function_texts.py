"""Bodies of the ONNX functions of autopar's operators that are written by hand, in ONNX's own text form.

Each is for any sizes and any dtype. Of experts, only the rows that were sent to one meet its matrix: ``Scan`` goes over
the experts, ``NonZero`` finds the rows of each. Recurrent layers are ONNX's own ``LSTM``, ``GRU`` and ``RNN``, whose
gates have another order; or, where these do not fit (an LSTM with a projection, float64, which ONNX Runtime does not
have), ``Scan`` over the steps.
"""

from __future__ import annotations

EXPERT_LINEAR = """
ExpertLinear (rows, weight, ids) => (out) {
    count = Shape <start = 0, end = 1> (ids)
    given = Shape <start = 0, end = 1> (rows)
    one = Constant <value_ints = [1]> ()
    some = Max (given, one)
    repeats = Div (count, some)
    copies = Max (repeats, one)
    width = Shape <start = 2, end = 3> (weight)
    shape = Concat <axis = 0> (count, width)
    zero = Constant <value_float = 0.0> ()
    zero_alike = CastLike (zero, rows)
    nothing = Expand (zero_alike, shape)
    first = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    axis = Constant <value_ints = [0]> ()
    experts = Shape <start = 0, end = 1> (weight)
    end = Squeeze (experts, axis)
    numbers = Range (first, end, step)
    whole = Cast <to = 7> (ids)
    out = Scan <num_scan_inputs = 2, body = of_expert (found, matrix, number) => (after) {
        here = Equal (whole, number)
        transposed = NonZero (here)
        places = Transpose (transposed)
        last = Constant <value_ints = [1]> ()
        flat = Squeeze (places, last)
        sources = Div (flat, copies)
        taken = Gather <axis = 0> (rows, sources)
        product = MatMul (taken, matrix)
        after = ScatterND (found, places, product)
    }> (nothing, weight, numbers)
}"""

# what stands for torch's gates, one after the other along dim 0, in ONNX: their order there
ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}
OWN = {
    "lstm": ("LSTM", ""),
    "gru": ("GRU", "linear_before_reset = 1, "),
    "rnn_tanh": ("RNN", 'activations = ["Tanh"], '),
    "rnn_relu": ("RNN", 'activations = ["Relu"], '),
}
STEPS = {  # from the products of the input (a) and of the hidden state (b), bias included; r is for a projection
    "lstm": """
        sum = Add (a, b)
        i, f, g, o = Split <axis = -1, num_outputs = 4> (sum)
        open = Sigmoid (i)
        keep = Sigmoid (f)
        candidate = Tanh (g)
        show = Sigmoid (o)
        kept = Mul (keep, c)
        new = Mul (open, candidate)
        c_after = Add (kept, new)
        shown = Tanh (c_after)
        r = Mul (show, shown)""",
    "gru": """
        a_reset, a_update, a_new = Split <axis = -1, num_outputs = 3> (a)
        b_reset, b_update, b_new = Split <axis = -1, num_outputs = 3> (b)
        sum_reset = Add (a_reset, b_reset)
        reset = Sigmoid (sum_reset)
        sum_update = Add (a_update, b_update)
        update = Sigmoid (sum_update)
        part = Mul (reset, b_new)
        sum_new = Add (a_new, part)
        candidate = Tanh (sum_new)
        difference = Sub (h, candidate)
        kept = Mul (update, difference)
        r = Add (candidate, kept)""",
    "rnn_tanh": """
        sum = Add (a, b)
        r = Tanh (sum)""",
    "rnn_relu": """
        sum = Add (a, b)
        r = Relu (sum)""",
}


def recurrent_layer(name: str, cell: str, states: int, weights: int, hidden: int, own: bool) -> str:
    """The function for a layer of ``weights`` weights; ``own``: by ONNX's operator, of size ``hidden``."""
    bias, projection = weights >= 4, weights in (3, 5)
    given = ["w_ih", "w_hh", *(["b_ih", "b_hh"] if bias else []), *(["w_hr"] if projection else [])]
    names = ["x", *["h", "c"][:states], *given]
    body = _own(cell, states, bias, hidden) if own else _steps(cell, states, bias, projection)
    return f"{name} ({', '.join(names)}) => (y, last) {{{body}\n}}"


def _own(cell: str, states: int, bias: bool, hidden: int) -> str:
    operator, options = OWN[cell]
    lines = ["first = Constant <value_ints = [0]> ()", "second = Constant <value_ints = [1]> ()"]
    for name in ("w_ih", "w_hh", *(("b_ih", "b_hh") if bias else ())):
        lines += _reordered(name, ORDER[cell])
    if bias:
        lines.append("biases = Concat <axis = -1> (b_ih_own, b_hh_own)")
    lines += [f"{state}_first = Unsqueeze ({state}, first)" for state in ("h", "c")[:states]]
    starts = ", ".join(["h_first", *(["c_first"] if states > 1 else [])])
    results = "all, h_last, c_last" if states > 1 else "all, h_last"
    call = f"x, w_ih_own, w_hh_own, {'biases' if bias else ''}, , {starts}"
    lines += [
        f"{results} = {operator} <{options}hidden_size = {hidden}> ({call})",
        "y = Squeeze (all, second)",
        f"last = Squeeze ({'c_last' if states > 1 else 'h_last'}, first)",
    ]
    return "".join(f"\n    {line}" for line in lines)


def _reordered(name: str, order: tuple[int, ...]) -> list[str]:
    """The gates of a weight in ONNX's order, with a dim of size 1 before them, for the one direction."""
    lines, joined = [], name
    if len(order) > 1:
        parts = [f"{name}_{gate}" for gate in range(len(order))]
        joined = f"{name}_joined"
        lines.append(f"{', '.join(parts)} = Split <axis = 0, num_outputs = {len(order)}> ({name})")
        lines.append(f"{joined} = Concat <axis = 0> ({', '.join(parts[gate] for gate in order)})")
    return [*lines, f"{name}_own = Unsqueeze ({joined}, first)"]


def _steps(cell: str, states: int, bias: bool, projection: bool) -> str:
    def product(result: str, given: str, weight: str, added: str) -> str:
        ends = f"\n        {result} = Add ({result}_plain, {added})" if bias else ""
        return f"\n        {result}{'_plain' if bias else ''} = MatMul ({given}, {weight}){ends}"

    turned = ["w_ih", "w_hh", *(["w_hr"] if projection else [])]
    before = "".join(f"\n    {name}_t = Transpose <perm = [1, 0]> ({name})" for name in turned)
    after = "h_after, c_after, h_each" if states > 1 else "h_after, h_each"
    own = "h_after = MatMul (r, w_hr_t)" if projection else "h_after = Identity (r)"
    results = "h_last, c_last, y" if states > 1 else "h_last, y"
    names = "h, c" if states > 1 else "h"
    return (
        f"{before}\n    {results} = Scan <num_scan_inputs = 1, body = step ({names}, x_now) => ({after}) {{"
        f"{product('a', 'x_now', 'w_ih_t', 'b_ih')}{product('b', 'h', 'w_hh_t', 'b_hh')}{STEPS[cell]}"
        f"\n        {own}\n        h_each = Identity (h_after)\n    }}> ({names}, x)"
        f"\n    last = Identity ({'c_last' if states > 1 else 'h_last'})"
    )
