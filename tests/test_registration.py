"""The name in transformers after `import hf_geoscale` alone: when it is registered, and what that leaves alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A transformers and a torch that are imported in no time, with what registration looks at.
STAND_INS = {
    "torch/__init__.py": "from . import compiler",
    "torch/compiler.py": "def disable(function): return function",
    "transformers/__init__.py": "",
    "transformers/interface.py": """
class Interface:
    mapping = {}
    @classmethod
    def register(cls, key, value): cls.mapping = {**cls.mapping, key: value}
    def __contains__(self, key): return key in type(self).mapping
    def __getitem__(self, key): return type(self).mapping[key]
""",
    "transformers/before.py": "",
    "transformers/modeling_utils.py": """
from . import before
from .interface import Interface
class AttentionInterface(Interface): pass
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
""",
    "transformers/masking_utils.py": """
from .interface import Interface
class AttentionMaskInterface(Interface): pass
ALL_MASK_ATTENTION_FUNCTIONS = AttentionMaskInterface()
""",
    "transformers/models.py": """
from .modeling_utils import ALL_ATTENTION_FUNCTIONS
from .masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from . import later
""",
    "transformers/later.py": "",
}

CHECK = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
import transformers.later
assert "geoscale" in ALL_ATTENTION_FUNCTIONS, "attention"
assert "geoscale" in ALL_MASK_ATTENTION_FUNCTIONS, "mask"
assert "hf_geoscale.integrations" not in sys.modules
print("registered")
"""

ORDERS = {
    "before": "import sys, hf_geoscale",
    "after transformers": "import sys, transformers, hf_geoscale",
    "after its modelling code": "import sys, transformers.modeling_utils, hf_geoscale",
    "after a model": "import sys; import transformers.models; import hf_geoscale",
    "twice": """
import sys, hf_geoscale
for name in [name for name in sys.modules if name.startswith("hf_geoscale")]:
    del sys.modules[name]
import hf_geoscale
""",
    "reloaded": "import sys, importlib, hf_geoscale; importlib.reload(hf_geoscale); importlib.reload(hf_geoscale.registration)",
    # while transformers' module runs, half of it is there
    "in the middle": """
import sys
class Eager:
    done = False
    def find_spec(self, name, path=None, target=None):
        if "transformers.modeling_utils" in sys.modules and not self.done:
            self.done = True
            import hf_geoscale
sys.meta_path.insert(0, Eager())
import transformers.models, hf_geoscale
""",
    # another hook finds the module first, and ours never hears of it
    "behind another hook": """
import sys, hf_geoscale, importlib.machinery
class First:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.PathFinder.find_spec(name, path) if name.endswith("_utils") else None
sys.meta_path.insert(0, First())
import transformers.models
""",
    # as import hooks of tracing libraries do: find the module through all finders, and replace the loader
    "under a loader that wraps": """
import sys, hf_geoscale, importlib.util
class Loader:
    def __init__(self, inner): self.inner = inner
    def create_module(self, spec): return self.inner.create_module(spec)
    def exec_module(self, module): self.inner.exec_module(module)
class Wrapping:
    busy = False
    def find_spec(self, name, path=None, target=None):
        if self.busy or not name.startswith("transformers."): return None
        self.busy = True
        try: spec = importlib.util.find_spec(name)
        finally: self.busy = False
        if spec is not None: spec.loader = Loader(spec.loader)
        return spec
sys.meta_path.insert(0, Wrapping())
""",
    "with a loader that takes no attributes": """
import sys, hf_geoscale, importlib.machinery
class Loader:
    __slots__ = ("inner",)
    def __init__(self, inner): self.inner = inner
    def create_module(self, spec): return None
    def exec_module(self, module): self.inner.exec_module(module)
class Slots:
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == "transformers.modeling_utils" else None
        if spec is not None: spec.loader = Loader(spec.loader)
        return spec
sys.meta_path.insert(1, Slots())
""",
}


@pytest.fixture
def run(tmp_path):
    """Run code in a process of its own with the stand-ins, and return what it prints."""
    for name, text in STAND_INS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(code: str) -> str:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    return run


@pytest.mark.parametrize("order", ORDERS)
def test_the_name_is_there(order, run):
    assert run(ORDERS[order] + CHECK) == "registered"


def test_what_is_registered_already_stays(run):
    code = """
import sys, hf_geoscale
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
AttentionInterface.register("geoscale", len)
del sys.modules["hf_geoscale.registration"]
import hf_geoscale.registration
hf_geoscale.registration.install()
assert ALL_ATTENTION_FUNCTIONS["geoscale"] is len
print(sum(type(finder).__name__ == "InterfaceFinder" for finder in sys.meta_path))
"""
    assert run(code) == "1"


def test_modules_are_those_of_an_ordinary_import(run):
    """The loader of a module that we waited for is the usual one, unchanged, and its source can be read."""
    code = """
import hf_geoscale, importlib, importlib.util, inspect
import transformers.modeling_utils as module, transformers.masking_utils
loader = module.__spec__.loader
assert type(loader).__name__ == "SourceFileLoader" and "exec_module" not in vars(loader), vars(loader)
assert "class AttentionInterface" in inspect.getsource(module)
assert importlib.util.find_spec("no_such_module_at_all") is None
try:
    import transformers.no_such_module
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run(code) == "transformers.no_such_module"


def test_a_second_import_of_the_module_is_registered_on(run):
    code = """
import sys, hf_geoscale
import transformers.modeling_utils, transformers.masking_utils
for name in [name for name in sys.modules if name.startswith("transformers")]:
    del sys.modules[name]
"""
    assert run(code + CHECK) == "registered"


def test_a_failing_import_fails_as_without_us(run):
    code = """
import sys, hf_geoscale
sys.modules["transformers.interface"] = None
try:
    import transformers.modeling_utils
except ImportError as error:
    print("transformers.interface" in str(error), "transformers.modeling_utils" in sys.modules)
"""
    assert run(code) == "True False"


def test_importing_the_package_imports_nothing_dear(run):
    code = """
import sys
before = set(sys.modules)
import hf_geoscale
assert not {name for name in set(sys.modules) - before if not name.startswith("hf_geoscale")} - {"__future__"}
print("nothing")
"""
    assert run("import importlib, typing\n" + code) == "nothing"


def test_the_package_takes_the_name_over_in_the_real_transformers():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    import hf_geoscale.integrations

    assert hf_geoscale.integrations.FAMILIES
    assert ALL_ATTENTION_FUNCTIONS["geoscale"].__name__ == "attention_by_name"
    assert ALL_MASK_ATTENTION_FUNCTIONS["geoscale"].__name__ == "mask_by_name"
