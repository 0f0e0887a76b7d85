"""Logs of runs, read and drawn: hyperparameters with decisions, routing, runs side by side."""

from meta_optax.analysis._compare import Comparison, RunSummary, compare_runs
from meta_optax.analysis._draw import (
    BLUE,
    GREEN,
    GREY,
    RED,
    draw_line,
    draw_loss,
    draw_rates,
    draw_usage,
)
from meta_optax.analysis._load import Log, load_log
from meta_optax.analysis._plots import plot_hyperparameters, plot_routing

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "RED",
    "Comparison",
    "Log",
    "RunSummary",
    "compare_runs",
    "draw_line",
    "draw_loss",
    "draw_rates",
    "draw_usage",
    "load_log",
    "plot_hyperparameters",
    "plot_routing",
]
