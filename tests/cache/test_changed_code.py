"""Never a wrong program: whatever changes of what a trace has read, the next launch compiles.

Each case is launched twice as it is, so that the second is served by the cache, then with one change. What comes out is
compared with what the compiler makes of the changed script.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from autopar import Mesh, Plan
from tests.cache.launches import Launches, said, some_of, text_of, traced


@dataclass(frozen=True)
class Change:
    """``files`` of a script beside the usual ones, and in ``edited`` of them ``before`` becomes ``after``."""

    edited: str
    before: str
    after: str
    files: dict[str, str] = field(default_factory=dict)


def model(body: str, head: str = "", build: str = "return Net()", init: str = "", base: str = "nn.Module") -> str:
    """A file of a model whose forward has ``body``."""
    return "\n".join(
        [
            "import functools, enum, types, os, dataclasses, importlib",
            "import torch",
            "from torch import nn",
            "from torch.nn import functional as F",
            "import parts, settings",
            *head.splitlines(),
            f"class Net({base}):",
            "    def __init__(self):",
            "        super().__init__()",
            "        self.up = nn.Linear(4, 4)",
            *(f"        {line}" for line in init.splitlines()),
            "    def forward(self, x):",
            "        x = self.up(x)",
            *(f"        {line}" for line in body.splitlines()),
            "        return x.square().mean()",
            "def build():",
            *(f"    {line}" for line in build.splitlines()),
        ]
    )


def of_model(before: str, after: str, parts: str = "", **given: str) -> Change:
    files = {"model_file.py": model(**given), **({"parts.py": parts} if parts else {})}
    return Change("model_file.py", before, after, files)


def of_parts(before: str, after: str, parts: str, **given: str) -> Change:
    return Change("parts.py", before, after, {"model_file.py": model(**given), "parts.py": parts})


def of_settings(before: str, after: str, settings: str, parts: str, **given: str) -> Change:
    """In a file of which nothing else runs."""
    files = {"model_file.py": model(**given), "parts.py": parts, "settings.py": settings}
    return Change("settings.py", before, after, files)


PATCHES = "def other(*args, **kwargs):\n    return args[-1] * 5\n"

CHANGES = {
    "a line of a helper": Change("parts.py", "x + settings.SHIFT", "x - settings.SHIFT"),
    "a base class in another file": Change("parts.py", "return x * 2", "return x * 3"),
    "a constant of another module": Change("settings.py", "1.5", "2.5"),
    "a constant": of_model("SCALE = 2", "SCALE = 3", head="SCALE = 2", body="x = x * SCALE"),
    "an attribute": of_model("= 2.0", "= 4.0", init="self.scale = 2.0", body="x = x * self.scale"),
    "a class attribute": of_parts(
        "scale = 2", "scale = 3", "class Sizes:\n    scale = 2\n", body="x = x * parts.Sizes().scale"
    ),
    "a method of what forward makes": of_parts(
        "x * 2", "x * 3", "class Maker:\n    def run(self, x):\n        return x * 2\n", body="x = parts.Maker().run(x)"
    ),
    "the base of what forward makes": of_parts(
        "x * 2",
        "x * 3",
        "class Old:\n    def run(self, x):\n        return x * 2\nclass Maker(Old):\n    pass\n",
        body="x = parts.Maker().run(x)",
    ),
    "an operator of an object": of_parts(
        "x * 2",
        "x * 3",
        "class Call:\n    def __call__(self, x):\n        return x * 2\n",
        init="self.call = parts.Call()",
        body="x = self.call(x)",
    ),
    "an object that is a setting": of_model(
        "scale=2", "scale=3", init="self.config = types.SimpleNamespace(scale=2)", body="x = x * self.config.scale"
    ),
    "a dataclass of settings": of_parts(
        "= 2",
        "= 3",
        "import dataclasses\n@dataclasses.dataclass\nclass Config:\n    scale: int = 2\nCONFIG = Config()\n",
        body="x = x * parts.CONFIG.scale",
    ),
    "a closure": of_parts(
        "times(2)",
        "times(3)",
        "def times(n):\n    def run(x):\n        return x * n\n    return run\ndouble = times(2)\n",
        body="x = parts.double(x)",
    ),
    "a decorator": of_parts(
        "* 2",
        "* 3",
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def run(x):\n        return f(x) * 2\n"
        "    return run\n@twice\ndef same(x):\n    return x\n",
        body="x = parts.same(x)",
    ),
    "a default argument": of_parts(
        "n=2", "n=3", "def times(x, n=2):\n    return x * n\n", body="x = parts.times(x)"
    ),
    "a default by keyword": of_parts(
        "n=2", "n=3", "def times(x, *, n=2):\n    return x * n\n", body="x = parts.times(x)"
    ),
    "a partial": of_model("n=2", "n=3", head="times = functools.partial(lambda x, n: x * n, n=2)", body="x = times(x)"),
    "a lambda on the model": of_model("x * 2", "x * 3", init="self.act = lambda x: x * 2", body="x = self.act(x)"),
    "a property": of_model(
        "return 2", "return 3", body="x = x * Sizes().scale",
        head="class Sizes:\n    @property\n    def scale(self):\n        return 2",
    ),
    "a static method": of_model(
        "return 2", "return 3", body="x = x * Sizes.scale()",
        head="class Sizes:\n    @staticmethod\n    def scale():\n        return 2",
    ),
    "an enumeration": of_model(
        "TWO = 2", "TWO = 3", body="x = x * Sizes.TWO.value", head="class Sizes(enum.Enum):\n    TWO = 2"
    ),
    "a table of functions": of_parts(
        "x * 2", "x * 3", "def double(x):\n    return x * 2\nTABLE = {'double': double}\n",
        body="x = parts.TABLE['double'](x)",
    ),
    "a function that is found by its name": of_parts(
        "x * 2", "x * 3", "def double(x):\n    return x * 2\n",
        init="self.kind = 'double'",
        body="x = getattr(parts, self.kind)(x)",
    ),
    "an import inside": of_parts(
        "x * 2", "x * 3", "def double(x):\n    return x * 2\n", body="from parts import double\nx = double(x)"
    ),
    "a generator": of_parts(
        "range(2)", "range(3)", "def some():\n    yield from range(2)\n", body="for n in parts.some():\n    x = x + n"
    ),
    "what a cached function remembers": of_parts(
        "x * 2",
        "x * 3",
        "import functools\n@functools.cache\ndef which():\n    return run\ndef run(x):\n    return x * 2\nwhich()\n",
        body="x = parts.which()(x)",
    ),
    "a tensor": of_model(
        "2.0, 1.0", "3.0, 1.0", head="TABLE = torch.tensor([2.0, 1.0, 0.0, 1.0])", body="x = x * TABLE"
    ),
    "a tensor on the model": of_model(
        "2.0, 1.0", "3.0, 1.0", init="self.table = torch.tensor([2.0, 1.0, 0.0, 1.0])", body="x = x * self.table"
    ),
    "a hook": of_model(
        "out * 2", "out * 3", body="pass",
        head="def hook(module, args, out):\n    return out * 2",
        build="net = Net()\nnet.up.register_forward_hook(hook)\nreturn net",
    ),
    "a method for a kind of argument": of_parts(
        "@which.register(int)",
        "@which.register(str)",
        "import functools\n@functools.singledispatch\ndef which(n, x):\n    return x * 3\n@which.register(int)\n"
        "def of_int(n, x):\n    return x * 2\n",
        body="x = parts.which(1, x)",
    ),
    "a method for a kind of argument, from elsewhere": of_model(
        "pass  # patch", "parts.which.register(int, other)", body="x = parts.which(1, x)", head=PATCHES,
        build="pass  # patch\nreturn Net()",
        parts="import functools\n@functools.singledispatch\ndef which(n, x):\n    return x * 3\n@which.register(int)\n"
        "def of_int(n, x):\n    return x * 2\n",
    ),
    "a global that a method of what forward makes reads": of_model(
        "OTHER = 2", "OTHER = 3", body="x = Maker().run(x)",
        head="OTHER = 2\nclass Maker:\n    def run(self, x):\n        return x * OTHER",
    ),
    "an object that a method of what forward makes reads": of_model(
        "scale = 2", "scale = 3", body="x = Maker().run(x)",
        head="class Sizes:\n    def __init__(self):\n        self.scale = 2\nSIZES = Sizes()\nclass Maker:\n"
        "    def run(self, x):\n        return x * SIZES.scale",
    ),
    "an object that a method of what forward makes reads, set elsewhere": of_model(
        "SIZES.scale = 2", "SIZES.scale = 3", body="x = Maker().run(x)",
        head="class Sizes:\n    pass\nSIZES = Sizes()\nSIZES.scale = 2\nclass Maker:\n    def run(self, x):\n"
        "        return x * SIZES.scale",
    ),
    "a module that a method of what forward makes calls": of_model(
        "LeakyReLU(0.2)", "LeakyReLU(0.3)", body="x = Maker().run(x)",
        head="ACT = nn.LeakyReLU(0.2)\nclass Maker:\n    def run(self, x):\n        return ACT(x)",
    ),
    "an attribute that a class answers": of_model(
        "return 2", "return 3", body="x = x * self.scale",
        head="class Asked(nn.Module):\n    def __getattr__(self, name):\n        if name == 'scale':\n"
        "            return 2\n"
        "        return super().__getattr__(name)",
        base="Asked",
    ),
    "a metaclass": of_model(
        "return 2", "return 3", body="x = x * Sizes.scale",
        head="class Meta(type):\n    @property\n    def scale(cls):\n        return 2\nclass Sizes(metaclass=Meta):\n"
        "    pass",
    ),
    "a descriptor": of_model(
        "return 2", "return 3", body="x = x * self.scale",
        head="class Two:\n    def __get__(self, owner, cls):\n        return 2",
        init="type(self).scale = Two()",
    ),
    "a module in a list of Python": of_model(
        "nn.ReLU()", "nn.Tanh()", body="for f in self.steps:\n    x = f(x)", init="self.steps = [nn.ReLU()]"
    ),
    "which function is called": of_model(
        "run = double", "run = triple", body="x = run(x)",
        head="def double(x):\n    return x * 2\ndef triple(x):\n    return x * 3\nrun = double",
    ),
    "a comprehension": of_parts(
        "x * 2", "x * 3", "def all_of(x):\n    return [y for y in (x * 2, x)]\n", body="x = sum(parts.all_of(x))"
    ),
    "a tuple of names": of_parts(
        "_make((2,))", "_make((3,))",
        "import collections\nSizes = collections.namedtuple('Sizes', 'scale')\nSIZES = Sizes._make((2,))\n",
        body="x = x * parts.SIZES.scale",
    ),
    "a backward by hand": of_parts(
        "grad * 2",
        "grad * 3",
        "import torch\nclass Own(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n"
        "        return x * 2\n    @staticmethod\n    def backward(ctx, grad):\n        return grad * 2\n",
        body="x = parts.Own.apply(x)",
    ),
    "a method that somebody replaces": of_model(
        "pass  # patch", "Net.scale = other", body="x = self.scale(x)",
        head=PATCHES,
        build="Net.scale = lambda self, x: x * 2\npass  # patch\nreturn Net()",
    ),
    "a method that nobody replaces any more": of_model(
        "Maker.run = other", "pass", body="x = Maker().run(x)",
        head=PATCHES + "class Maker:\n    def run(self, x):\n        return x * 2",
        build="Maker.run = other\nreturn Net()",
    ),
    "a function of torch that somebody replaces": of_model(
        "pass  # patch", "F.gelu = other", body="x = F.gelu(x)", head=PATCHES,
        build="gelu = F.gelu\npass  # patch\nnet = Net()\nnet.back = gelu\nreturn net",
    ),
    "a function of torch that another replaces": of_model(
        "pass  # patch", "F.silu = F.gelu", body="x = F.silu(x)", build="pass  # patch\nreturn Net()"
    ),
    "a method that a function which remembers has called": of_settings(
        "self.base * 2", "self.base * 3",
        "class Cfg:\n    def __init__(self):\n        self.base = 2\n    def scale(self):\n"
        "        return self.base * 2\n",
        "import functools\nfrom settings import Cfg\nCFG = Cfg()\n@functools.cache\ndef scale_of(cfg):\n"
        "    return cfg.scale()\nscale_of(CFG)\n",
        body="x = x * parts.scale_of(parts.CFG)",
    ),
    "an object that a function which remembers has made": of_settings(
        "k * 2", "k * 3",
        "class Maker:\n    def run(self, n):\n        return [k * 2 for k in range(n)]\n",
        "import functools\nfrom settings import Maker\n@functools.lru_cache\ndef table(n):\n"
        "    return Maker().run(n)\ntable(3)\n",
        body="x = x * parts.table(3)[1]",
    ),
    "a method that a method which remembers has called": of_settings(
        "n * 2", "n * 3",
        "class Maker:\n    def make(self, n):\n        return n * 2\n",
        "import functools\nimport settings\nclass Cfg:\n    def __init__(self):\n"
        "        self.maker = settings.Maker()\n    @functools.lru_cache(None)\n"
        "    def scale(self):\n        return self.maker.make(2)\n"
        "CFG = Cfg()\nCFG.scale()\n",
        init="self.cfg = parts.CFG", body="x = x * self.cfg.scale()",
    ),
    "a global of a method that a function which remembers has called": of_settings(
        "FACTOR = 2", "FACTOR = 3",
        "FACTOR = 2\nclass Maker:\n    def make(self, n):\n        return n * FACTOR\n",
        "import functools, types\nimport settings\nclass Cfg:\n    def __init__(self):\n"
        "        self.maker = settings.Maker()\nCFG = Cfg()\n@functools.cache\ndef scale():\n"
        "    return CFG.maker.make(2)\nscale()\n",
        body="x = x * parts.scale()",
    ),
    "an object that a callback of torch makes": of_settings(
        "x * 2", "x * 3",
        "class Maker:\n    def run(self, x):\n        return (x * 2).square().sum(-1)\n",
        "from settings import Maker\ndef dist(a, b):\n    return Maker().run(a - b)\n",
        body="x = F.triplet_margin_with_distance_loss(x, x + 1, x * 2, distance_function=parts.dist)",
    ),
    "a backward by hand in a base of another file": of_settings(
        "grad * 2", "grad * 3",
        "import torch\nclass Base(torch.autograd.Function):\n    @staticmethod\n    def backward(ctx, grad):\n"
        "        return grad * 2\n",
        "import torch\nfrom settings import Base\nclass Own(Base):\n    @staticmethod\n    def forward(ctx, x):\n"
        "        return x * 2\n",
        body="x = parts.Own.apply(x)",
    ),
    "a layer of torch that somebody replaces": of_model(
        "pass  # patch", "nn.Linear.forward = other", body="pass", head=PATCHES, build="pass  # patch\nreturn Net()"
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def torch_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch.nn.functional, "gelu"), (torch.nn.functional, "silu"), (torch.nn.Linear, "forward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


QUICK = (
    "a line of a helper", "a dataclass of settings", "a function of torch that somebody replaces",
    "an object that a function which remembers has made",
)  # fmt: skip


@pytest.mark.parametrize("name", some_of(QUICK, CHANGES))
def test_what_changes_is_compiled_again(name: str, launches: Launches) -> None:
    change = CHANGES[name]
    launches.write(**change.files)
    with said() as messages:
        first, second = launches.launch(), launches.launch()
    assert (first.compiled, second.compiled) == (1, 0), messages
    assert second.text == first.text
    launches.edit(change.edited, change.before, change.after)
    third = launches.launch()
    assert third.compiled == 1
    with launches.imported() as module:
        wanted = traced(module.build(), Mesh(dp=2), Plan(), (torch.ones(4, 4),), {})
    assert third.text == text_of(wanted) != first.text


OPERATOR = """
    import torch
    from torch.library import custom_op

    @custom_op("cachetest::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def of_fakes(x):
        return x.new_empty(x.shape)
"""


@pytest.mark.slow
def test_an_operator_that_says_its_shape_otherwise(launches: Launches) -> None:
    body = "with torch.no_grad():\n    y = parts.twice(x)\nx = x + y"
    launches.write(**{"model_file.py": model(body), "parts.py": OPERATOR})
    assert [launches.launch().compiled for _ in range(2)] == [1, 0]
    launches.edit("parts.py", "x.new_empty(x.shape)", "torch.empty_like(x)")
    assert launches.launch().compiled == 1
