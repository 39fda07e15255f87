"""``ftengine view``: serve a store to viewers in a browser."""

from typing import Annotated

import typer

from ftengine.cli.console import JsonOption, QuietOption, print_json

SHOWN = 10  # cases whose addresses are printed; the page lists all


def view(
    store: Annotated[str, typer.Argument(metavar="STORE")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes any free one.")] = 0,
    case: Annotated[
        list[str] | None,
        typer.Option("--case", help="Print the addresses of this case; repeatable (default: the first)."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the list of cases in the browser.")] = False,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            metavar="URL",
            help="A viewer's page, e.g. https://viewer.example.org, that may read too; repeatable.",
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Serve a local store read-only on 127.0.0.1 for neuroglancer, vizarr and other viewers, until Ctrl-C."""
    _need_packages()
    from ftengine.store.reader import open_store
    from ftengine.store.serve import ADDRESS, listen, make_app, run_server
    from ftengine.store.viewer import case_links

    opened = open_store(store)
    app = make_app(opened, allow_origins=allow_origin or [])
    for name in case or []:
        opened.row_number(name)  # an unknown case is an error before anything is printed
    with listen(port) as sock:
        url = f"http://{ADDRESS}:{sock.getsockname()[1]}/"
        links = [case_links(opened, name, url) for name in case or opened.cases[:SHOWN]]
        if as_json:
            print_json({"url": url, "num_volumes": len(opened), "cases": links})
        else:
            typer.echo(f"{url}  {len(opened)} volumes")
            for link in links:
                typer.echo(f"\n{link['case']}\n  zarr          {link['image_url']}")
                if link["label_url"]:
                    typer.echo(f"  label         {link['label_url']}")
                typer.echo(f"  neuroglancer  {link['neuroglancer_url']}")
            if case is None and len(opened) > len(links):
                typer.echo(f"\n... and {len(opened) - len(links)} more: see {url}, or name one with --case")
        if not quiet:
            typer.echo("ftengine: serving, read-only, to this machine alone; Ctrl-C ends it.", err=True)
        if open_page:
            typer.launch(url)
        run_server(app, sock)


def _need_packages() -> None:
    from ftengine.errors import ConfigError

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"'ftengine view' needs the package {error.name}; install it with: pip install 'ftengine[view]'"
        ) from error
