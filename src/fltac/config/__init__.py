"""The typed configuration of a run, unknown keys refused with the nearest valid name."""

from fltac.config.aggregation import AggregationConfig
from fltac.config.clustering import GRADIENT_DIRECTIONS, ClusteringConfig
from fltac.config.data import PartitionConfig, TaskConfig
from fltac.config.loading import evaluation_settings, load_config, parse_override, read_yaml, to_yaml
from fltac.config.presets import PRESETS
from fltac.config.sections import (
    BackboneConfig,
    Config,
    EvaluationConfig,
    FederationConfig,
    OutputConfig,
    ServerConfig,
    ServerSettings,
    WireConfig,
)
from fltac.config.training import LoraConfig, TrainingConfig

__all__ = [
    "GRADIENT_DIRECTIONS",
    "PRESETS",
    "AggregationConfig",
    "BackboneConfig",
    "ClusteringConfig",
    "Config",
    "EvaluationConfig",
    "FederationConfig",
    "LoraConfig",
    "OutputConfig",
    "PartitionConfig",
    "ServerConfig",
    "ServerSettings",
    "TaskConfig",
    "TrainingConfig",
    "WireConfig",
    "evaluation_settings",
    "load_config",
    "parse_override",
    "read_yaml",
    "to_yaml",
]
