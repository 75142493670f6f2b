"""The frozen backbone, its adapters as stacked lanes, and their exchange format."""
