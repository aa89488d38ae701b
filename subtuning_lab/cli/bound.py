"""The command `bound`: the paper's rates and the test set's bound, term by term. No torch."""

from typing import TYPE_CHECKING, Annotated

import typer

from subtuning_lab.cli.output import Json, tell

if TYPE_CHECKING:
    from subtuning_lab.theory.bounds import Bound


def bound(
    n: Annotated[int, typer.Option(help="Training images.")],
    tuned_params: Annotated[int, typer.Option(help="Tuned parameters, r' in the paper.")],
    delta: Annotated[float, typer.Option(help="Distance of the tuned parameters from the pretrained ones.")],
    n_blocks: Annotated[int, typer.Option(help="Blocks of the backbone, L.")],
    max_blocks: Annotated[int, typer.Option(help="Most blocks that greedy may choose, k.")],
    confidence: Annotated[float, typer.Option(help="Probability that a bound holds, in (0, 1).")] = 0.95,
    training_error: Annotated[
        float | None, typer.Option(help="In [0, 1]; with it the rates bound the error, without it the gap.")
    ] = None,
    params: Annotated[int | None, typer.Option(help="All parameters, r: shows full finetuning's rate too.")] = None,
    full_delta: Annotated[
        float | None, typer.Option(help="Distance that full finetuning goes; the same if not given.")
    ] = None,
    errors: Annotated[int | None, typer.Option(help="Wrong test images: shows the test set's bound too.")] = None,
    n_test: Annotated[int | None, typer.Option(help="Test images; as many as --n if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Show the generalization bounds of a tuned subset, term by term, and say which are vacuous."""
    import pandas as pd

    import subtuning_lab as lab

    _check_pairs({"--full-delta": full_delta, "--n-test": n_test}, {"--params": params, "--errors": errors})
    common = {"n": n, "confidence": confidence, "empirical_error": training_error}
    sizes = {"tuned_params": tuned_params, "n_blocks": n_blocks, "max_blocks": max_blocks}
    bounds = [lab.subtuning_bound(delta=delta, **sizes, **common)]
    if params is not None:
        distance = delta if full_delta is None else full_delta
        bounds.append(lab.full_finetuning_bound(params=params, delta=distance, **common))
    if errors is not None:
        bounds.append(lab.test_set_bound(errors, n if n_test is None else n_test, confidence))
    terms, summary = lab.bound_table(bounds)[["bound", "term", "amount"]], pd.DataFrame(map(_summary, bounds))
    if as_json:
        tell({"terms": terms, "bounds": summary}, as_json)
        return
    tell({"terms": terms, "bounds": summary.drop(columns="assumes")}, as_json)
    for row in summary.itertuples():
        typer.echo(f"{row.bound}: {row.assumes}")


def _summary(bound: "Bound") -> dict[str, object]:
    says = "vacuous" if bound.vacuous else f"{bound.of} <= {bound.value:.3g}"
    row = {"bound": bound.name, "of": bound.of, "value": bound.value, "confidence": bound.confidence, "says": says}
    return row | {"assumes": "; ".join(bound.assumptions)}


def _check_pairs(given: dict[str, object], needs: dict[str, object]) -> None:
    """Raises ValueError for an option that means nothing without the one that stands in the same place."""
    for (name, value), (other, base) in zip(given.items(), needs.items(), strict=True):
        if value is not None and base is None:
            raise ValueError(f"{name} is {value}, which means nothing without {other}")
