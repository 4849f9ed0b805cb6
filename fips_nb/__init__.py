__version__ = "0.2.0"

_HOME = dict(compress="run.compress", load="store.hub", save="store.hub", evaluate="run.evaluate", finetune="run.finetune",
             compare="run.compare", info="run.folders", bench="run.folders", export="run.folders")
__all__ = [*_HOME]


def __getattr__(name):
    "Import a function of the package when it is first asked for, so that the package stays light."
    if name not in _HOME: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__(): return [*globals(), *_HOME]


from .store import announce as _announce  # noqa: E402

_announce.wait()
