"""One round of a simulation without a run directory, for benchmarks that look at a part of it."""

import time
from dataclasses import dataclass

import torch

from fltac.config import Config
from fltac.records import RoundReport, ServerState
from fltac.runtime.lane_setup import choose_plan
from fltac.runtime.setup import Experiment, prepare, resolved
from fltac.runtime.simulation import Simulation
from fltac.server.round import finish_round, init_server, plan_round


@dataclass(frozen=True)
class Round:
    """What came out, and the seconds of its two halves."""

    experiment: Experiment
    state: ServerState
    report: RoundReport
    train_seconds: float
    server_seconds: float
    up_bytes: int


def play(config: Config) -> Round:
    """Prepares an experiment and plays its first round."""
    experiment = resolved(prepare(config))
    config, model = experiment.config, experiment.model
    torch.set_num_threads(config.training.threads or 1)
    settings = config.server_settings
    state = init_server(settings, model.body_shapes, experiment.head_shapes, experiment.clients)
    plan = choose_plan(config.training, model, next(iter(experiment.tasks.values())), config.training.threads or 1)
    simulation = Simulation(experiment.clients, model, config, plan)
    requests = plan_round(state, settings)
    exchange = simulation.exchange(requests)
    start = time.perf_counter()
    groups = experiment.groups if settings.clustering.rule == "given" else None
    state, report = finish_round(state, requests, exchange.replies, settings, groups)
    took = time.perf_counter() - start
    return Round(experiment, state, report, exchange.train_seconds, took, exchange.up_bytes)
