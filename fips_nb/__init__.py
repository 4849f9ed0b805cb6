__version__ = "0.1.0"

_HOME = dict(compress="commands", save="hub", load="hub", evaluate="evaluation", code_model="coded_models",
             hold_as="coded_memory", finetune="finetune_folders")
__all__ = [*_HOME]


def __getattr__(name):
    "Import a function of the package when it is first asked for, so that the package stays light."
    if name not in _HOME: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__(): return [*globals(), *_HOME]
