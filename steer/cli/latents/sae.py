"""`steer sae`: autoencoders trained, checked against the model, their latents scored and shown."""

from pathlib import Path
from typing import Annotated, cast

import typer

import probes.model
import probes.saes
import probes.thinking
import steer.report
import steer.training
from steer.cli.loading import model_of
from steer.cli.options import DeviceMap, Dtype, Json, Model, Output, Seed, console, end, free

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=__doc__)

Source = Annotated[
    str, typer.Argument(help="An autoencoder: a folder, a file, a repository of the hub, or reasoner-L15.")
]
Texts = Annotated[Path, typer.Argument(help="JSONL: completions of ours, or lines of {text}.")]
SiteWord = Annotated[str | None, typer.Option("--site", help="Where it belongs, if its own label is wrong.")]
Part = Annotated[str, typer.Option(help="The folder or file within a repository.")]
Pickle = Annotated[bool, typer.Option("--pickle", help="Read the weights of a .pt file whose source you trust.")]
Top = Annotated[int, typer.Option(min=1, help="Latents to show.")]


@app.command()
def train(
    model: Model,
    texts: Texts,
    output: Output,
    site: Annotated[str, typer.Option(help="Such as L12.resid_post.")],
    d_sae: Annotated[int, typer.Option(min=2, help="Latents.")] = 3072,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to train on; texts are read as often as it takes.")
    ] = 600_000,
    architecture: Annotated[str, typer.Option(help="topk, batchtopk, jumprelu or standard.")] = "topk",
    k: Annotated[int, typer.Option(min=1, help="Active latents, of topk and batchtopk.")] = 32,
    lr: Annotated[float, typer.Option(help="The rate, of Adam.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Tokens a step.")] = 1024,
    seed: Seed = 0,
    store: Annotated[
        Path | None, typer.Option(help="A folder to keep the work in: a killed run goes on there.")
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Train an autoencoder with SAELens' trainer on what MODEL holds at a site, and say what it explains."""
    free(output)
    where = probes.model.Site.parse(site)
    kind = cast("probes.saes.Architecture", architecture)  # which refuses another
    how = probes.saes.SAETraining(d_sae, tokens, kind, k, lr=lr, batch_size=batch_size, seed=seed)
    loaded = model_of(model, dtype=dtype, device_map=device_map)
    spans = probes.thinking.text_spans(loaded, texts)
    sae = probes.saes.train_sae(loaded, spans, where, how, store=store)
    probes.saes.save_sae(sae, output, model=model)
    fit = probes.saes.check_sae(loaded, sae, spans[:200], force=True)
    recovered = steer.training.recovered_loss(loaded, sae, spans[:50])
    console.print(recovered.table())
    facts = {"explained": fit.declared.variance, "l0": fit.declared.l0, "recovered": recovered.recovered}
    end(fit.table(), facts, as_json)


@app.command()
def check(
    model: Model,
    sae: Source,
    texts: Texts,
    site: SiteWord = None,
    part: Part = "",
    pickle: Pickle = False,
    force: Annotated[bool, typer.Option("--force", help="Tell, and refuse nothing.")] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """How much an autoencoder explains where its label puts it, and next door; refused where the label is wrong."""
    made = probes.saes.load_sae(sae, part=part, site=site, pickle=pickle)
    loaded = model_of(model, dtype=dtype, device_map=device_map)
    fit = probes.saes.check_sae(loaded, made, probes.thinking.text_spans(loaded, texts), force=force)
    console.print(made.table())
    facts = {"explained": fit.declared.variance, "l0": fit.declared.l0, "best": str(fit.best.site)}
    end(fit.table(), facts, as_json)


@app.command()
def score(
    model: Model,
    sae: Source,
    texts: Texts,
    site: SiteWord = None,
    part: Part = "",
    pickle: Pickle = False,
    top: Top = 20,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A page of these latents, an HTML file.")
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """ReasonScore of every latent (Galichin et al. 2025), and with --output a page of the highest."""
    if output is not None:
        free(output, "file")
    made = probes.saes.load_sae(sae, part=part, site=site, pickle=pickle)
    loaded = model_of(model, dtype=dtype, device_map=device_map)
    spans = probes.thinking.text_spans(loaded, texts)
    found = probes.saes.reason_score(loaded, made, spans)
    if output is not None:
        steer.report.save_latents(loaded, made, found.top(top), spans, output, scores=found)
    facts = {"top": found.top(top), "declared": len(found.declared()), "tokens": found.n_tokens}
    end(found.table(top), facts, as_json)
