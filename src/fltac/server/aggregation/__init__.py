"""How the members of a cluster become one adapter: published rules, server optimizers, and what a rule misses."""

from fltac.server.aggregation.error import product_error
from fltac.server.aggregation.means import mean_adapter, shrunk, weights_of
from fltac.server.aggregation.optimizer import optimized
from fltac.server.aggregation.parts import Part
from fltac.server.aggregation.rules import combined

__all__ = ["Part", "combined", "mean_adapter", "optimized", "product_error", "shrunk", "weights_of"]
