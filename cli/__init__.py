"""The command line ``ftengine``: parse, build a Config, call one function, print."""

if __name__ != "ftengine.cli":
    raise ImportError(f"import ftengine.cli, not {__name__}: the folder is part of the package ftengine")
