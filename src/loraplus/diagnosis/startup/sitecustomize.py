"""Has the doctor watch a Python process, once that process imports torch; then does what else would be done here.

Python imports a module of this name as it starts. It is found first on PYTHONPATH, in every process that a launcher
starts, and in whatever Python: so nothing but the standard library is imported until torch is.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys

_WATCHED = "torch.optim.optimizer"
_HERE = os.path.dirname(os.path.abspath(__file__))


class _OnceImported:
    """A finder that calls the doctor when torch's optimizers have been imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != _WATCHED:
            return None
        sys.meta_path.remove(_OnceImported)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                _start()

            spec.loader.exec_module = exec_module
        return spec


def _start():
    settings = json.loads(os.environ["LORAPLUS_DOCTOR"])
    # This very package, whether or not the script's Python has one.
    root = os.path.join(settings["package"], "__init__.py")
    if "loraplus" not in sys.modules and importlib.util.find_spec("loraplus") is None:
        spec = importlib.util.spec_from_file_location(
            "loraplus", root, submodule_search_locations=[settings["package"]]
        )
        if spec is not None and spec.loader is not None:
            sys.modules["loraplus"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules["loraplus"])
    # torch itself is only half imported here, so what imports more of it waits for an optimizer, or for a gradient.
    _call_first(sys.modules[_WATCHED].Optimizer, "__init__", settings)
    _call_first(sys.modules["torch.autograd"], "backward", settings)


def _call_first(owner, name, settings):
    """Begins to watch before the first call of a function, which is then put back."""
    own = getattr(owner, name)

    def first(*args, **kwargs):
        setattr(owner, name, own)
        from loraplus.diagnosis.watched_process import watch

        watch(settings)
        return getattr(owner, name)(*args, **kwargs)

    setattr(owner, name, first)


def _rest():
    """The `sitecustomize` that is further along the path, which ours stands in front of."""
    others = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if "LORAPLUS_DOCTOR" in os.environ:
    sys.meta_path.insert(0, _OnceImported)
    _rest()
