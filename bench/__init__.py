"""Side-by-side measurements; every performance figure of this project comes from a program in this folder."""

if __name__ != "ftengine.bench":
    raise ImportError(f"import ftengine.bench, not {__name__}: the folder is part of the package ftengine")
