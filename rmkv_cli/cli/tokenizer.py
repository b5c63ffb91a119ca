import typer
app = typer.Typer()
@app.command()
def nothing() -> None: ...
