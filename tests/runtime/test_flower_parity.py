"""The same rows through a simulation and through Flower: the same adapters and the same assignments."""

import json
from pathlib import Path

import pytest

import fltac
from fltac.runtime.checkpoint import latest_checkpoint
from fltac.runtime.flower_local import running
from runtime.local_federation import federated, largest_difference, processes_of, run_of, simulated, until
from runtime.owners import SECRETS

pytestmark = pytest.mark.process


def test_a_federation_over_flower_ends_as_the_simulation_does(tmp_path: Path) -> None:
    """One SuperLink and three SuperNodes on loopback, with TLS and node keys; three shapes of heads, dropout."""
    config = simulated(tmp_path)
    fltac.run(config, tmp_path / "simulation")
    with running(federated(tmp_path, config, "federation.quorum=3", "federation.clients=3")) as federation:
        federation.start_run()
        assert federation.wait(240), federation.log("run").read_text()
    until(lambda: not processes_of(federation), "everything that was started has ended")
    expected, found = latest_checkpoint(tmp_path / "simulation"), latest_checkpoint(federation.run_directory)
    assert expected is not None
    assert found is not None
    assert found.state.assignment() == expected.state.assignment()
    assert found.state.clients == expected.state.clients
    assert len(found.state.assignment()) >= 6
    assert largest_difference(expected.state, found.state) < 1e-6

    simulation = json.loads((tmp_path / "simulation" / "summary.json").read_text())
    summary = run_of(federation).summary()
    assert summary is not None
    assert summary["clustering"]["k"] == simulation["clustering"]["k"]
    assert summary["trainable_parameters"].items() <= simulation["trainable_parameters"].items()
    assert 0 < summary["bytes_total"]["up"] - simulation["bytes_total"]["up"] < 60 * 3 * 2, "the messages' first lines"
    scores = summary["slots"]
    assert scores["slots"] == len(found.state.assignment())
    values = [slot["score"] for client in scores["clients"].values() for slot in client.values()]
    assert summary["mean_score"] == pytest.approx(sum(values) / len(values))
    assert scores["distribution"]["min"] == min(values)
    for path in federation.run_directory.rglob("*"):
        if path.is_file():
            assert not [word for word in SECRETS if word.encode() in path.read_bytes()], path
    assert list((federation.run_directory / "adapters").glob("cluster-*/adapter_model.safetensors"))
